"""The checks that every objective of the catalogue must pass."""
