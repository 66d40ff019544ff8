"""Distillation in steps: assistants, stages, two levels, averages along the way."""
