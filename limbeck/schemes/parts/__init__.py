"""What schemes of several kinds share."""
