"""The self-describing cache of what a teacher says."""
