"""The trainer alone: its speed, its memory, its kernels, and what goes on beside it."""
