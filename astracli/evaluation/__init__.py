"""Benchmarks: the worker, one benchmark on an engine, statistics, comparison of two evaluations."""
