"""Quicker layers for CPUs."""
