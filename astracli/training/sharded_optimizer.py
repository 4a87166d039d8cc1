"""Ranks that hold all weights and gradients, and divide the optimizer (ZeRO-1, arXiv 1910.02054): `train.sharding`.

A rank computes as a single one does: no weight is gathered, and no gradient is exchanged before the last backward pass
of a minibatch. In that pass, each gradient is summed over the ranks as soon as it is there, and every rank gets the sum
of its own part (reduce-scatter), while gradients of the layers before are computed (`Reduction`). It updates the master
weights of that part, whose moments it alone holds, and all ranks get the new weights (all-gather).
A part is a contiguous range of the flattened parameter, as long on every rank. What is small, or cannot be divided so,
is updated by every rank alike.

At most `IN_FLIGHT` collectives run beside each other: a gradient is freed as soon as its sum is there.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
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

    def sum_whole(self, gradients: Sequence[Tensor]) -> None:
        """Replace gradients that are not divided by those of the loss of all ranks."""
        self._ranks.reduce(gradients)


class Reduction:
    """Gradients of the loss of all ranks, minibatch by minibatch.

    The last backward pass begins the sums of a block's gradients when the gradient of that block's input is there:
    autograd takes what was computed last in the forward pass first, so all gradients of the block's own parameters are
    there as well. Blocks end in the same order on all ranks, which is the order of their collectives.
    """

    def __init__(self, parts: Parts, grads: Gradients):
        self._parts, self._grads = parts, grads
        self._reduced: dict[str, Tensor] = {}
        self._waiting: deque[tuple[Any, Tensor]] = deque()
        self._last_pass = False

    def watch(self, blocks: Sequence[nn.Module], parameters: Mapping[str, nn.Parameter]) -> None:
        """Begin with these blocks' gradients inside the last backward pass; all others are summed behind it."""
        name_of = {id(parameter): name for name, parameter in parameters.items() if name in self._parts}
        uses = Counter(id(parameter) for block in blocks for parameter in block.parameters())
        name_of = {which: name for which, name in name_of.items() if uses[which] == 1}
        for block in blocks:
            own = [name_of[id(parameter)] for parameter in block.parameters() if id(parameter) in name_of]
            block.register_forward_pre_hook(partial(_watch_input, partial(self._ended, own)), with_kwargs=True)

    def before_backward(self, *, last: bool) -> None:
        """`last`: of the minibatch."""
        self._last_pass = last

    def _ended(self, names: Collection[str], _: Tensor) -> None:
        if self._last_pass:
            self._begin(names)

    @torch.no_grad()
    def _begin(self, names: Collection[str]) -> None:
        for name in names:
            if (gradient := self._grads.of(name)) is None:
                continue
            assert name not in self._reduced, f"a gradient of {name} came behind its sum"
            self._grads.forget(name)
            part = torch.empty_like(self._parts.of(name, gradient))
            self._waiting.append((_reduce_scatter(part.view(-1), gradient.reshape(-1), async_op=True), gradient))
            self._reduced[name] = part
            del gradient
            while len(self._waiting) > IN_FLIGHT:
                self._waiting.popleft()[0].wait()

    @torch.no_grad()
    def finish(self) -> dict[str, Tensor]:
        """This rank's parts, and whole where a parameter is not divided. A collective; no gradient is left."""
        self._last_pass = False
        found = self._grads.found()
        whole = {name: gradient for name, gradient in found.items() if name not in self._parts}
        self._parts.sum_whole(list(whole.values()))
        for name in whole:
            self._grads.forget(name)
        rest = [name for name in found if name not in whole]
        found.clear()
        self._begin(rest)
        for work, _ in self._waiting:
            work.wait()
        self._waiting.clear()
        reduced, self._reduced = self._reduced | whole, {}
        return reduced


def _watch_input(ended: Callable[[Tensor], None], block: nn.Module, args: Any, kwargs: Mapping[str, Any]) -> None:
    """Call `ended` when the gradient of the block's input is there."""
    x = next((x for x in (*args, *kwargs.values()) if isinstance(x, Tensor) and x.requires_grad), None)
    if x is not None:
        x.register_hook(ended)


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
