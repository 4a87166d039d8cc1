"""fp32 master weights of what is trained: updated from clipped gradients, rounded into the parameters, published.

A parameter holds the value that the engine holds: its master rounded to the wire dtype. The master keeps what rounding
loses; it receives the update, and after that the parameter is the rounded master again. So trainer and engine compute
the same function. On a CPU the parameter is stored and computed with in fp32. On one GPU, and on several that divide
only the optimizer, it is stored in the wire dtype, is what is published, and is the upper part of its master
(`split_masters`). Where FSDP2 shards it over GPUs, the parameters are the fp32 masters, and are cast to bf16 for
computing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from astracli.config.recipe_train import TrainTable
from astracli.errors import RunFailed
from astracli.models.adapter import WireTensor
from astracli.training.adam import Adam, learning_rate
from astracli.training.cpu_offload import CpuOffload
from astracli.training.fsdp import Ranks, local, start_of
from astracli.training.gradients import Gradients
from astracli.training.sharded_optimizer import Exchange, Parts
from astracli.training.split_masters import SplitMasters
from astracli.weights.publish.snapshot import Shard, copies

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


class NotFinite(RunFailed):
    """A gradient is not a number, or has no end."""


class Masters:
    """fp32 masters of the trained parameters and their AdamW state; this rank's part of them (`sharded_optimizer`), or
    its shards where FSDP2 shards the model."""

    def __init__(
        self,
        model: nn.Module,
        wire: Mapping[str, WireTensor],
        table: TrainTable,
        ranks: Ranks,
        *,
        moments_on_host: float = 0.0,
        exact: Collection[nn.Parameter] = (),
    ):
        """`wire`: training parameter name -> how it travels; parameters it leaves out are frozen. `moments_on_host`:
        the part of the moments that waits in host memory, and passes through the device in an update. Where
        `ranks.stores_bf16`, the model's parameters are stored anew, but for frozen ones that are `exact`.

        Raises RunFailed when `wire` names a parameter that the model does not have.
        """
        self.ranks = ranks
        self.table = table
        self.wire = dict(wire)
        self.every = every = {plain_name(n): p for n, p in model.named_parameters()}
        """Every parameter of the model, trained or not."""
        unknown = sorted(set(self.wire) - set(every))
        if unknown:
            raise RunFailed(f"the adapter's wire names {unknown[:5]} are no parameters of {type(model).__name__}")
        for name, parameter in every.items():
            parameter.requires_grad_(name in self.wire)
        self.parameters = {name: every[name] for name in self.wire}
        self.parts = Parts(self.parameters, ranks)
        self.frozen = [parameter for name, parameter in every.items() if name not in self.wire]
        self.tied = tied_names(model, self.travels)
        self.rounded = ranks.stores_bf16 or ranks.precision == torch.float32
        """Whether parameters are the rounded masters; otherwise they are the masters."""
        self.split_masters = SplitMasters()
        """Their `values` are in memory only inside `split_masters.whole`."""
        self._away: CpuOffload | None = None
        self._away_count = 0
        self.before_change: Callable[[], None] = lambda: None
        """Called before what this holds changes or moves: a checkpoint may still be copied from it."""
        with torch.no_grad():
            kept = {id(parameter) for parameter in exact}
            for parameter in self.frozen if ranks.stores_bf16 else ():
                if id(parameter) not in kept:
                    parameter.data = parameter.data.to(ranks.precision)
            self.values = {name: self._master(name, parameter) for name, parameter in self.parameters.items()}
        self.grads = self._gradients(model)
        self.adam = Adam(self.values, table, moments_on_host=moments_on_host, split_masters=self.split_masters)
        self.publish_to_parameters()

    def _master(self, name: str, parameter: nn.Parameter) -> Tensor:
        """The fp32 master. Where parameters are stored in bf16, this one is from here on. One after the other: the fp32
        originals never lie beside all of their masters."""
        if not self.rounded:
            return local(parameter.detach())
        if self.ranks.stores_bf16 and self.wire[name].dtype == "bfloat16":
            return self.split_masters.take(name, parameter, partial(self.parts.of, name))
        return self._mine(name).clone()  # also of what travels in fp32: a version must not change while it is published

    def _mine(self, name: str) -> Tensor:
        """This rank's part of a parameter, sharing its storage."""
        return self.parts.of(name, local(self.parameters[name].detach()))

    def factors(self) -> Mapping[str, tuple[Tensor, Tensor]]:
        """{HF name: A, scaled B}, fp32 copies on the CPU: what is merged into the weights; {} without adapters."""
        return {}

    def _gradients(self, model: nn.Module) -> Gradients:
        grads = Gradients(self.parameters, accumulate=self.ranks.stores_bf16)
        if self.ranks.device.type != "cpu":  # a CPU has no product of bf16 that adds to fp32
            grads.by_products(model)
        return grads

    @property
    def travels(self) -> Mapping[str, WireTensor]:
        """Name of a parameter -> how it travels, of all that make up a version."""
        return self.wire

    @property
    def origin(self) -> Mapping[str, Any]:
        """What a checkpoint says of weights that it needs and does not hold; a checkpoint that says something else does
        not fit."""
        return {}

    @torch.no_grad()
    def publish_to_parameters(self) -> None:
        """Parameters <- masters, of all ranks, rounded to the wire dtype. A collective where the optimizer is
        divided."""
        with Exchange(self.parts, self.parameters) as exchange:
            self._round(self.values)
            exchange.begin(self.values)

    def _round(self, names: Collection[str]) -> None:
        """Parameter <- master rounded to the wire dtype. Nothing to do under mixed precision (they are one tensor), and
        for a split master (the parameter is a part of it)."""
        for name in names if self.rounded else ():
            if name not in self.split_masters:
                self._mine(name).copy_(self.values[name].to(DTYPES[self.wire[name].dtype]))

    @torch.no_grad()
    def update(self, step: int) -> float:
        """One AdamW update from the parameters' gradients, clipped together. Returns the norm before clipping.

        Raises RunFailed when the norm is not finite.
        """
        assert not self.away
        gradients, squares = self._reduced()
        norm = math.sqrt(squares)
        if not math.isfinite(norm):
            raise NotFinite(
                f"the gradient norm of step {step} is {norm}",
                "lower train.learning_rate, or look at the samples of the steps before",
            )
        if norm > self.table.grad_clip:
            torch._foreach_mul_(list(gradients.values()), self.table.grad_clip / (norm + 1e-6))
        for name, value in self.values.items():
            assert self.rounded or value.data_ptr() == local(self.parameters[name]).data_ptr(), name
        self.before_change()
        with Exchange(self.parts, self.parameters) as exchange:

            def updated(names: Collection[str]) -> None:
                self._round(names)
                exchange.begin(names)

            self.adam.step(gradients, learning_rate(self.table, step), updated)
        self.grads.clear()
        self.updated()
        return norm

    def updated(self) -> None:
        """Called when masters and parameters have been updated."""

    def _reduced(self) -> tuple[dict[str, Tensor], float]:
        """This rank's gradients of the loss of all ranks, and the sum of squares over all ranks.

        FSDP has reduced what it shards. Every micro-batch has every parameter in its graph, an empty one too, so the
        lists are the same on all ranks.
        """
        if self.ranks.divides_optimizer:
            reduced = self.parts.reduce(self.grads)
            parts = [gradient for name, gradient in reduced.items() if name in self.parts]
            return reduced, self.ranks.squares((g for name, g in reduced.items() if name not in self.parts), parts)
        found = self.grads.found()
        self.ranks.reduce([gradient for name, gradient in found.items() if self.replicated(name)])
        gradients = {name: part for name, gradient in found.items() if (part := local(gradient)).numel()}
        return gradients, self.ranks.squares(found.values())

    def start(self, name: str) -> int:
        """Where this rank's part begins in the flattened parameter."""
        if not self.ranks.wraps:
            return self.parts.start(name)
        return start_of(self.every[name], self.ranks)

    def replicated(self, name: str) -> bool:
        """Whether every rank of several holds the whole master of this parameter."""
        if self.ranks.divides_optimizer:
            return name not in self.parts
        return self.ranks.wraps and not hasattr(self.every[name], "placements")  # `fsdp.shard`, `exact`

    @property
    def away(self) -> bool:
        """Nothing of this may be touched now: `to_host` was called, `to_device` not yet."""
        return self._away is not None and self._away.offloaded

    def to_host(self) -> None:
        """Leave the device to others: masters, parameters and moments wait on the host. Nothing else may be called
        until `to_device`, which brings them back byte for byte."""
        self.before_change()
        held = self.held()
        if self._away is None or self._away_count != len(held):  # the first update makes the moments
            self._away, self._away_count = CpuOffload(held), len(held)
        self._away.to_host()

    def held(self) -> list[Tensor]:
        """All that this has on its device."""
        masters = [value for name, value in self.values.items() if name not in self.split_masters]
        return [*self.parameters.values(), *masters, *self.split_masters.rests, *self.frozen, *self.adam.on_device()]

    def to_device(self) -> None:
        """Take the device again after `to_host`."""
        if self._away is not None:
            self._away.to_device()

    def restored(self) -> None:
        """`values` and moments were filled from a checkpoint."""
        self._away = None
        self.publish_to_parameters()

    @torch.no_grad()
    def wire_shards(self, *, copy: bool = True) -> dict[str, Tensor | Shard]:
        """HF name -> this rank's part of the tensor in its wire dtype: what is published. Empty parts are left out, and
        rank 0 brings a tensor that all ranks hold.

        The result is a copy: training may go on while it is published. Without `copy`, parameters on a GPU that are in
        their wire dtype are given out themselves. Not on a CPU: there numpy, which reads them, would keep their memory.
        """
        result: dict[str, Tensor | Shard] = {}
        dtypes = {name: DTYPES[tensor.dtype] for name, tensor in self.travels.items()}
        sources = self.sources()
        there = {name: t for name, t in sources.items() if not copy and t.is_cuda and t.dtype == dtypes[name]}
        taken = copies({name: t for name, t in sources.items() if name not in there}, dtypes)
        taken = {name: there[name] if name in there else taken[name] for name in sources}
        for name, tensor in taken.items():
            if self.ranks.mesh is None or (self.replicated(name) and self.ranks.first):
                result[self.travels[name].name] = tensor
            elif tensor.numel() and not self.replicated(name) and self.ranks.in_first_replica:
                shape = tuple(self.every[name].shape)
                result[self.travels[name].name] = Shard(tensor.reshape(-1), self.start(name), shape)
        return result

    def sources(self) -> dict[str, Tensor]:
        """What this rank publishes, by parameter name, in a dtype that rounds to the wire's."""
        return {name: self._mine(name) for name in self.values} if self.ranks.stores_bf16 else self.values

    @torch.no_grad()
    def wire_full(self) -> dict[str, Tensor]:
        """HF name -> the whole tensor in its wire dtype, on the CPU of rank 0; {} on other ranks. A collective."""
        from torch.distributed.tensor import DTensor

        result: dict[str, Tensor] = {}
        for name, value in self.sources().items():
            parameter = self.every[name]
            whole = parameter.detach() if name in self.parts else value  # its parts were exchanged
            if isinstance(parameter, DTensor):
                shape, stride = parameter.shape, parameter.stride()
                placed = DTensor.from_local(value, self.ranks.mesh, parameter.placements, shape=shape, stride=stride)
                whole = placed.full_tensor()
            if self.ranks.first:
                result[self.travels[name].name] = whole.to(DTYPES[self.travels[name].dtype]).cpu().contiguous()
        return result


def tied_names(model: nn.Module, travels: Mapping[str, WireTensor]) -> dict[str, str]:
    """{name of a tied duplicate: wire name of the parameter that it is}"""
    every = [(plain_name(n), p) for n, p in model.named_parameters(remove_duplicate=False)]
    wire_of = {id(p): travels[name].name for name, p in every if name in travels}
    own = {tensor.name for tensor in travels.values()}
    return {name: wire_of[id(p)] for name, p in every if id(p) in wire_of and name not in own}


def plain_name(name: str) -> str:
    """A parameter's name in the model itself, without the wrapper of recomputation."""
    return name.replace("_checkpoint_wrapped_module.", "")
