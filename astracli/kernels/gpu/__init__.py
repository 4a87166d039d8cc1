"""Quicker layers for GPUs."""
