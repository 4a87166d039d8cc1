"""Ranks that hold all weights and gradients, and divide the optimizer (ZeRO-1, arXiv 1910.02054): `train.sharding`.

A rank computes as a single one does: no weight is gathered and no gradient is exchanged before the update of a
minibatch. Then each gradient is summed over the ranks, and every rank gets the sum of its own part (reduce-scatter). It
updates the master weights of that part, whose moments it alone holds, and all ranks get the new weights (all-gather).
A part is a contiguous range of the flattened parameter, as long on every rank. What is small, or cannot be divided so,
is updated by every rank alike.

At most `IN_FLIGHT` collectives run beside each other: a gradient is freed as soon as its sum is there.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from astracli.training.fsdp import Ranks
from astracli.training.gradients import Gradients

# torch 2.13 gave them new names
_reduce_scatter: Any = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
_all_gather: Any = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor

SMALL = 256
"""Elements; a smaller parameter is not divided."""
IN_FLIGHT = 4


class Parts:
    """Which part of each parameter this rank updates, and what the ranks exchange for it."""

    def __init__(self, parameters: Mapping[str, nn.Parameter], ranks: Ranks):
        self._ranks = ranks
        self._parameters = parameters
        self._lengths: dict[str, int] = {}
        for name, parameter in parameters.items() if ranks.divides_optimizer else ():
            if parameter.numel() >= SMALL and not parameter.numel() % ranks.world_size:
                self._lengths[name] = parameter.numel() // ranks.world_size

    def __contains__(self, name: str) -> bool:
        return name in self._lengths

    def start(self, name: str) -> int:
        """Where this rank's part begins in the flattened parameter."""
        return self._ranks.rank * self._lengths.get(name, 0)

    def of(self, name: str, whole: Tensor) -> Tensor:
        """This rank's part of a tensor like parameter `name`, sharing its storage; the tensor itself when that is not
        divided. A part has as many dimensions as the whole: weight decay goes by them (`adam`)."""
        if name not in self._lengths:
            return whole
        part = whole.reshape(-1)[self.start(name) : self.start(name) + self._lengths[name]]
        return part.view(*[1] * (whole.ndim - 1), -1)

    @torch.no_grad()
    def reduce(self, grads: Gradients) -> dict[str, Tensor]:
        """Gradients of the loss of all ranks: this rank's parts, and whole where a parameter is not divided. A
        collective; `grads` are empty afterwards."""
        found, reduced = grads.found(), {}
        waiting: deque[tuple[Any, Tensor]] = deque()
        names = list(found)
        self._ranks.reduce([found[name] for name in names if name not in self])
        for name in names:
            gradient = found.pop(name)
            grads.forget(name)
            if name not in self:
                reduced[name] = gradient
                continue
            part = torch.empty_like(self.of(name, gradient))
            work = _reduce_scatter(part.view(-1), gradient.reshape(-1), async_op=True)
            waiting.append((work, gradient))
            reduced[name] = part
            del gradient
            while len(waiting) > IN_FLIGHT:
                waiting.popleft()[0].wait()
        for work, _ in waiting:
            work.wait()
        return reduced


class Exchange:
    """The all-gathers of one update: begun when a part is updated, over at the end of the block."""

    def __init__(self, parts: Parts, parameters: Mapping[str, nn.Parameter]):
        self._parts, self._parameters = parts, parameters
        self._waiting: list[Any] = []

    def __enter__(self) -> Exchange:
        return self

    @torch.no_grad()
    def begin(self, names: Collection[str]) -> None:
        """All ranks get each other's parts of these parameters. Every rank must name them in the same order."""
        for name in names:
            if name in self._parts:
                whole = self._parameters[name].detach()
                mine = self._parts.of(name, whole).view(-1)
                self._waiting.append(_all_gather(whole.view(-1), mine, async_op=True))

    def __exit__(self, *_: object) -> None:
        for work in self._waiting:
            work.wait()
