"""What schemes without data have in common: batches that are made, a teacher that is asked with gradients, losses."""
