"""Quicker computation of what models do, for CPUs and GPUs, and packed rows."""
