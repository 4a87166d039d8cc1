"""Triton kernels of the trainer. Imported only where a tensor is on a GPU."""
