"""Language models: texts that are written, asked for, chosen or rewritten for the student."""
