"""Grader, benchmarks and training sets."""
