"""Little, chosen or changed data: what to learn from, and how it is shown."""
