"""Kernels of the trainer on a GPU. Triton and fla are imported where they are used, never on a CPU."""
