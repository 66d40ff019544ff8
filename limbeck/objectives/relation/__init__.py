"""Objectives that compare how the models relate samples to one another."""
