"""Objectives that compare what the models answer: their logits."""
