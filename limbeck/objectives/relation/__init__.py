"""Knowledge in how the teacher relates things to each other: samples, tokens, layers."""
