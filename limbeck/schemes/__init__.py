"""Who teaches whom and when, one scheme a file."""
