"""Weights on their way from the trainer into an engine."""
