"""Models that learn at once, from one another."""
