"""Evaluations by themselves and beside training."""
