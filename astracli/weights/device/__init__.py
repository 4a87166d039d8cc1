"""Weights on a GPU: differences, digests, scatter, copies to and from the host."""
