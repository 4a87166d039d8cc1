"""CPU offload: tensors wait in host memory while a GPU is needed for something else.

An offloaded tensor keeps its identity: its storage is emptied and later filled again. So everything that shares it
(FSDP's shards, the optimizer's parameters, views) is right again without being told. Copies go through pinned memory on
the current stream; `overlapped_offload` uses streams of its own. To print an empty storage torch would read address 0,
which ends the process or the GPU's context, so `repr` says that the tensor is offloaded.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any

import torch
from torch import Tensor

from astracli.kernels.upload import host_memory
from astracli.training.fsdp import local


class CpuOffload:
    """Moves a set of tensors as a whole between their device and host memory. Host memory is kept for the next time.

    `constant`: nobody writes to the tensors, so offloading them again copies nothing. On a CPU both lie in the same
    memory.
    """

    def __init__(self, tensors: Iterable[Tensor], *, constant: bool = False):
        self._storages: dict[int, torch.UntypedStorage] = {}
        for tensor in tensors:
            if not local(tensor).untyped_storage().resizable():
                tensor.data = tensor.data.clone()  # on a CPU: it maps the checkpoint's file
            storage = local(tensor).untyped_storage()
            self._storages.setdefault(storage._cdata, storage)
        self._bytes = {key: storage.nbytes() for key, storage in self._storages.items()}
        self._host: dict[int, Tensor] = {}
        self._constant = constant
        self.offloaded = False

    @property
    def nbytes(self) -> int:
        return sum(self._bytes.values())

    def to_host(self) -> None:
        """Empty the device's storages; their bytes wait on the host. A second call does nothing."""
        if not self.offloaded:
            self.save()
            self.leave()

    def to_device(self) -> None:
        """Fill the storages again, byte for byte."""
        if self.offloaded:
            self.make_room()
            self.fill()

    def save(self) -> None:
        """Copy to the host, on the current stream: the first half of `to_host`."""
        for key, storage in self._storages.items():
            if key in self._host and self._constant:
                continue
            if key not in self._host:
                self._host[key] = host_memory(self._bytes[key], storage.device, self)
            self._host[key].copy_(_flat(storage), non_blocking=True)

    def leave(self) -> None:
        """Empty the storages, whose bytes `save` has copied: the other half of `to_host`."""
        for storage in self._storages.values():
            empty(storage)
        self.offloaded = True

    def make_room(self) -> None:
        """Allocate memory for the storages: the first half of `to_device`."""
        for key, storage in self._storages.items():
            storage.resize_(self._bytes[key])

    def fill(self) -> None:
        """Copy from the host, on the current stream: the other half of `to_device`."""
        for key, storage in self._storages.items():
            _flat(storage).copy_(self._host[key], non_blocking=True)
        self.offloaded = False

    @contextmanager
    def moved_in(self) -> Iterator[None]:
        """On the device inside the block, on the host after it."""
        self.to_device()
        try:
            yield
        finally:
            self.to_host()

    def on_host(self, tensor: Tensor) -> Tensor:
        """An offloaded tensor's values, in the host's memory: valid until it is moved in."""
        assert self.offloaded
        here = local(tensor)
        storage = here.untyped_storage()
        if storage.device.type == "cuda":
            torch.cuda.synchronize(storage.device)
        flat = self._host[storage._cdata].view(here.dtype)
        return flat.as_strided(here.size(), here.stride(), here.storage_offset())


def empty(storage: torch.UntypedStorage) -> None:
    """Free its memory; the tensors that share it stay, and can still be printed."""
    if not hasattr(torch.Tensor.__repr__, "shows_offloaded"):
        shown: Any = _showing_offloaded(torch.Tensor.__repr__)
        torch.Tensor.__repr__ = shown  # type: ignore[method-assign]
    storage.resize_(0)


def _showing_offloaded(plain: Callable[..., str]) -> Callable[..., str]:
    """torch's `repr`, for tensors that are there."""

    @wraps(plain)
    def shown(tensor: Tensor, **options: Any) -> str:
        if not _is_empty(tensor):
            return plain(tensor, **options)
        return f"tensor(offloaded, size={tuple(tensor.shape)}, dtype={tensor.dtype}, device={tensor.device})"

    shown.shows_offloaded = True  # type: ignore[attr-defined]
    return shown


def _is_empty(tensor: Tensor) -> bool:
    """Whether a plain tensor has elements and no memory for them."""
    plain = type(tensor) in (Tensor, torch.nn.Parameter) and tensor.layout == torch.strided and not tensor.is_meta
    return plain and tensor.numel() > 0 and tensor.untyped_storage().nbytes() == 0


def _flat(storage: torch.UntypedStorage) -> Tensor:
    """uint8 [bytes], sharing the storage."""
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)
