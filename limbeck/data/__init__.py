"""Where samples come from: sources, collation and augmentations that can be replayed."""
