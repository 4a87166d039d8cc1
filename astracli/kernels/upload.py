"""Copies from the host to a device that nobody waits for.

A copy from ordinary memory waits until the GPU has done everything that was queued before. A copy from pinned memory is
queued itself, and the next kernels can be launched meanwhile. torch keeps the pinned memory until the copy is done.
"""

from __future__ import annotations

import weakref

import numpy as np
import torch
from torch import Tensor


def upload(array: np.ndarray, device: torch.device) -> Tensor:
    """The array on the device; on a CPU it shares the array's memory."""
    tensor = torch.from_numpy(array)
    return tensor if device.type == "cpu" else tensor.pin_memory().to(device, non_blocking=True)


def host_memory(size: int, device: torch.device, owner: object) -> Tensor:
    """uint8 [size]; for a GPU pinned for as long as `owner` lives, which must keep it for as long. Registered by hand:
    torch's own pinned allocator rounds up to powers of 2."""
    memory = torch.empty(size, dtype=torch.uint8)
    if device.type == "cuda" and size:
        torch.cuda.check_error(torch.cuda.cudart().cudaHostRegister(memory.data_ptr(), size, 0))
        weakref.finalize(owner, torch.cuda.cudart().cudaHostUnregister, memory.data_ptr())
    return memory
