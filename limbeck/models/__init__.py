"""Student and teacher families, and adapters for models of other libraries."""
