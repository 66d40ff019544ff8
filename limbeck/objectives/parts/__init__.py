"""What several methods of this floor share, or one is too long without: no methods of their own."""
