"""Split master weights: the bf16 parameter is the upper part of its fp32 master, 16 more bits are the lower part.

The passes compute with the master rounded to bf16, and that is what is published. A whole master beside the parameter
would repeat those 16 bits. What rounding lost fits 16 other bits: master bits = (parameter bits << 16) + rest, with a
signed rest. So 4 bytes a parameter hold both, instead of 6, and the passes read the parameter where it lies.

Rounding is to nearest, ties to even. A master exactly half-way between two bf16 numbers (one in 65,536) would have a
rest of 2^15 in one of two directions, which 16 bits cannot tell apart. It is moved by one unit in its last place
(2^-24 of its value) towards the number that it is rounded to.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from astracli.training.cpu_offload import empty


def split(master: Tensor, high: Tensor, rest: Tensor) -> None:
    """high (bf16) <- master (fp32) rounded; rest (int16) <- what that lost. One shape, contiguous. Do not read `master`
    afterwards: `join` gives its values."""
    if master.is_cuda and (kernels := _kernels()) is not None:
        kernels.split(master, high, rest)
        return
    bits = master.view(torch.int32)
    bits = torch.where((bits & 0x7FFFFFFF) > 0x7F800000, 0x7FC00000, bits)  # a NaN of all ones would round to zero
    odd = (bits >> 16) & 1
    bits = torch.where((bits & 0xFFFF) == 0x8000, bits + (2 * odd - 1), bits)
    top = (bits + 0x8000) >> 16
    high.view(torch.int16).copy_(top)
    rest.copy_(bits - (top << 16))


def join(high: Tensor, rest: Tensor, master: Tensor) -> None:
    """master (fp32) <- its two parts."""
    if master.is_cuda and (kernels := _kernels()) is not None:
        kernels.join(high, rest, master)
        return
    master.view(torch.int32).copy_((high.view(torch.int16).int() << 16) + rest.int())


def _kernels() -> Any:
    """The Triton kernels; None where Triton cannot be imported."""
    try:
        from astracli.kernels.gpu import split_masters
    except ImportError:
        return None
    return split_masters


class SplitMasters:
    """Masters by name, each of a parameter or of a part of one. Their storage is empty except inside `whole`; parameter
    and `rest` together are the master."""

    def __init__(self) -> None:
        self._masters: dict[str, Tensor] = {}
        self._parameters: dict[str, Tensor] = {}
        self._rests: dict[str, Tensor] = {}

    def __contains__(self, name: str) -> bool:
        return name in self._masters

    @property
    def rests(self) -> list[Tensor]:
        """int16, the memory that this adds to the parameters."""
        return list(self._rests.values())

    def parts(self, name: str) -> tuple[Tensor, Tensor] | None:
        """The parameter (bf16) and the rest (int16) of a split master; None for a master that is not split."""
        return (self._parameters[name].detach(), self._rests[name]) if name in self._masters else None

    @torch.no_grad()
    def take(self, name: str, parameter: torch.nn.Parameter, part: Callable[[Tensor], Tensor] = lambda t: t) -> Tensor:
        """Store the parameter in bf16 from here on. Returns the master of a part of it (of all of it), whose storage is
        empty. `part`: that part of a tensor like the parameter, contiguous and sharing its storage."""
        whole = parameter.detach()
        master = part(whole).clone(memory_format=torch.contiguous_format)
        parameter.data = whole.to(torch.bfloat16, memory_format=torch.contiguous_format)
        self._masters[name], self._parameters[name] = master, part(parameter.detach())
        self._rests[name] = torch.empty_like(master, dtype=torch.int16)
        self._leave([name])
        return master

    @contextmanager
    def whole(self, names: Collection[str] | None = None) -> Iterator[None]:
        """Inside, these masters (None: all) are in memory and may be written to; afterwards they are split again."""
        chosen = [name for name in (self._masters if names is None else names) if name in self._masters]
        nested = [name for name in chosen if self._masters[name].untyped_storage().nbytes()]
        assert not nested, f"in memory already: {nested[:5]}"
        with torch.no_grad():
            for name in chosen:
                master = self._masters[name]
                master.untyped_storage().resize_(master.nbytes)
                join(self._parameters[name].detach(), self._rests[name], master)
            try:
                yield
            finally:
                self._leave(chosen)

    def _leave(self, names: Collection[str]) -> None:
        for name in names:
            master = self._masters[name]
            split(master, self._parameters[name].detach(), self._rests[name])
            empty(master.untyped_storage())
