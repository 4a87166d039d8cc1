"""Faults made on purpose: a run, or an input, and what becomes of it."""
