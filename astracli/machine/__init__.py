"""The facts of a host."""
