"""Losses that compare a student with its teacher, one method a file."""
