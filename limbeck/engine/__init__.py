"""The training loop: precision, compilation, distribution, checkpoints and exact resume."""
