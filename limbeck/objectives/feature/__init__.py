"""Objectives that compare what the models compute on the way: features and attention."""
