"""fp32 masters of what is trained: updated from clipped gradients, rounded into the parameters, given out to publish.

A parameter holds the value that the engine holds (rounded to the wire dtype) and the master keeps what rounding loses;
gradients go to the master, and after each update the parameter is the rounded master again. So trainer and engine
compute the same function. On a CPU it is stored and computed with in fp32; on one GPU it is stored in the wire dtype,
is what is published, and is the upper half of its master (`split_masters`); on several the parameters are the fp32
masters, and FSDP2 casts them to bf16 for computing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from astracli.config.recipe import TrainTable
from astracli.errors import RunFailed
from astracli.models.adapter import WireTensor
from astracli.training.adam import Adam, learning_rate
from astracli.training.cpu_offload import CpuOffload
from astracli.training.fsdp import Ranks, local
from astracli.training.gradients import Gradients
from astracli.training.split_masters import SplitMasters
from astracli.weights.publish.snapshot import Shard, copies

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


class Masters:
    """fp32 masters of the trained parameters and their AdamW state; this rank's shards when sharded."""

    def __init__(
        self,
        model: nn.Module,
        wire: Mapping[str, WireTensor],
        table: TrainTable,
        ranks: Ranks,
        *,
        moments_on_host: float = 0.0,
    ):
        """`wire`: training parameter name -> how it travels; parameters it leaves out are frozen. The part
        `moments_on_host` of the moments waits in host memory, and passes through the device in an update. Where
        `ranks.lowers`, the model's parameters become what they are computed with.

        Raises RunFailed when it names a parameter that the model does not have.
        """
        self.ranks = ranks
        self.table = table
        self.wire = dict(wire)
        every = {plain_name(n): p for n, p in model.named_parameters()}
        unknown = sorted(set(self.wire) - set(every))
        if unknown:
            raise RunFailed(f"the adapter's wire names {unknown[:5]} are no parameters of {type(model).__name__}")
        for name, parameter in every.items():
            parameter.requires_grad_(name in self.wire)
        self.parameters = {name: every[name] for name in self.wire}
        self.frozen = [parameter for name, parameter in every.items() if name not in self.wire]
        self.tied = self._tied_names(model)
        self.lowers = ranks.lowers
        """Parameters are stored in what is computed with."""
        self.rounded = ranks.lowers or ranks.precision == torch.float32
        """Parameters are the masters rounded; else they are the masters."""
        self.split_masters = SplitMasters()
        """Of masters that are bf16 parameters and what these lack: their `values` are there inside `whole` alone."""
        self._away: CpuOffload | None = None
        self._away_updates = 0
        self.before_change: Callable[[], object] = lambda: None
        """Called before what this holds changes or moves: a checkpoint may still be copied from it."""
        with torch.no_grad():
            for parameter in self.frozen if self.lowers else ():
                parameter.data = parameter.data.to(ranks.precision)
            self.values = {name: self._master(name, parameter) for name, parameter in self.parameters.items()}
        self.grads = Gradients(self.parameters, accumulate=self.lowers)
        if ranks.device.type != "cpu":  # a CPU has no product of bf16 that adds to fp32
            self.grads.by_products(model)
        self.adam = Adam(self.values, table, moments_on_host=moments_on_host, split_masters=self.split_masters)
        self.publish_to_parameters()

    def _master(self, name: str, parameter: nn.Parameter) -> Tensor:
        """The fp32 master. Its parameter is stored in its wire dtype from here on, where parameters are: one after the
        other, so that the fp32 originals never lie beside all of their masters."""
        value = local(parameter.detach())
        if not self.rounded:
            return value
        if self.lowers and self.wire[name].dtype == "bfloat16":
            return self.split_masters.take(name, parameter, torch.bfloat16)
        return value.clone()  # where it travels in fp32 too: a version must not change while it is published

    def _tied_names(self, model: nn.Module) -> dict[str, str]:
        """{name of a tied duplicate: wire name of the parameter that it is}"""
        wire_of = {id(p): self.wire[name].name for name, p in self.parameters.items()}
        own = {tensor.name for tensor in self.wire.values()}
        every = ((plain_name(n), p) for n, p in model.named_parameters(remove_duplicate=False))
        return {name: wire_of[id(p)] for name, p in every if id(p) in wire_of and name not in own}

    @torch.no_grad()
    def publish_to_parameters(self) -> None:
        """parameter <- master rounded to the wire dtype. Under mixed precision they are one tensor, in halves the
        parameter is a part of its master: nothing to do."""
        if self.rounded:
            for name, parameter in self.parameters.items():
                if name not in self.split_masters:
                    local(parameter).copy_(self.values[name].to(DTYPES[self.wire[name].dtype]))

    def whole(self) -> AbstractContextManager[None]:
        """Inside, every master is in memory, to be read or written; outside, split masters are empty."""
        return self.split_masters.whole()

    @torch.no_grad()
    def update(self, step: int) -> float:
        """One AdamW update from the parameters' gradients, clipped together. Returns the norm before clipping.

        Raises RunFailed when the norm is not finite.
        """
        assert not self.away
        self._average_replicated()
        found = self.grads.found()
        norm = math.sqrt(self.ranks.squares(found.values()))
        gradients = {name: part for name, gradient in found.items() if (part := local(gradient)).numel()}
        if not math.isfinite(norm):
            raise RunFailed(
                f"the gradient norm of step {step} is {norm}",
                "lower train.learning_rate, or look at the samples of the steps before",
            )
        if norm > self.table.grad_clip:
            torch._foreach_mul_(list(gradients.values()), self.table.grad_clip / (norm + 1e-6))
        for name, value in self.values.items():
            assert self.rounded or value.data_ptr() == local(self.parameters[name]).data_ptr(), name
        self.before_change()
        self.adam.step(gradients, learning_rate(self.table, step))
        self.grads.clear()
        self.publish_to_parameters()
        return norm

    def start(self, name: str) -> int:
        """Where this rank's part begins in the flattened parameter."""
        if self.ranks.mesh is None or self.replicated(name) or not self.values[name].numel():
            return 0
        parameter: Any = self.parameters[name]
        _, offset = compute_local_shape_and_global_offset(parameter.shape, parameter.device_mesh, parameter.placements)
        return int(offset[0]) * (parameter.numel() // parameter.shape[0])

    def replicated(self, name: str) -> bool:
        """Whether every rank holds this parameter whole (`fsdp.shard`, `exact`)."""
        return self.ranks.mesh is not None and not hasattr(self.parameters[name], "placements")

    def _average_replicated(self) -> None:
        """Gradients of replicated parameters become the mean over ranks, which sharding makes of all others."""
        if self.ranks.world_size == 1:
            return
        # every micro-batch has every parameter in its graph, an empty one too: the same list on all ranks
        self.ranks.average([gradient for name, gradient in self.grads.found().items() if self.replicated(name)])

    def moments(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """AdamW's first and second moments by parameter name, where they are; zeros before the first update."""
        return self.adam.moments()

    def no_moments(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Zeros, where moments wait between updates."""
        return self.adam.no_moments()

    @property
    def away(self) -> bool:
        """Nothing of this may be touched now: `to_host` was called, `to_device` not yet."""
        return self._away is not None and self._away.offloaded

    def to_host(self) -> None:
        """Leave the device to others: masters, parameters and moments wait on the host. Nothing else may be called
        until `to_device`, which brings them back byte for byte."""
        self.before_change()
        if self._away is None or self._away_updates != min(self.updates, 1):
            # the first update makes the moments, and they join
            masters = [value for name, value in self.values.items() if name not in self.split_masters]
            held = [*self.parameters.values(), *masters, *self.split_masters.rests, *self.frozen]
            held += self.adam.on_device()
            self._away, self._away_updates = CpuOffload(held), min(self.updates, 1)
        self._away.to_host()

    def to_device(self) -> None:
        """Take the device again after `to_host`."""
        if self._away is not None and self._away.offloaded:
            self._away.to_device()

    @property
    def updates(self) -> int:
        """AdamW updates made so far: what its bias correction counts."""
        return self.adam.updates

    def restore(self, first: Mapping[str, Tensor], second: Mapping[str, Tensor], updates: int) -> None:
        """Take over moments (this rank's shards, which then belong to it) and the update count; `values` have been
        filled in place already, inside `whole`."""
        self._away = None
        self.adam.restore(first, second, updates)
        self.publish_to_parameters()

    @torch.no_grad()
    def wire_shards(self, *, copy: bool = True) -> dict[str, Tensor | Shard]:
        """HF name -> this rank's part of the tensor in its wire dtype: what is published. Empty parts are left out; a
        tensor that all ranks hold is rank 0's.

        Copies: training may go on while they are published. Without `copy` those on a GPU that are in their wire dtype
        already are the parameters themselves; on a CPU numpy, through which they are seen, would keep their memory.
        """
        result: dict[str, Tensor | Shard] = {}
        dtypes = {name: DTYPES[self.wire[name].dtype] for name in self.values}
        sources = self._sources()
        there = {name: t for name, t in sources.items() if not copy and t.is_cuda and t.dtype == dtypes[name]}
        taken = copies({name: t for name, t in sources.items() if name not in there}, dtypes)
        taken = {name: there[name] if name in there else taken[name] for name in sources}
        for name, tensor in taken.items():
            if self.ranks.mesh is None or (self.replicated(name) and self.ranks.first):
                result[self.wire[name].name] = tensor
            elif tensor.numel() and not self.replicated(name):
                shape = tuple(self.parameters[name].shape)
                result[self.wire[name].name] = Shard(tensor.reshape(-1), self.start(name), shape)
        return result

    def _sources(self) -> dict[str, Tensor]:
        """What is published, by parameter name, in a dtype that rounds to the wire's."""
        return {name: self.parameters[name].detach() for name in self.values} if self.lowers else self.values

    @torch.no_grad()
    def wire_full(self) -> dict[str, Tensor]:
        """HF name -> the whole tensor in its wire dtype, on the CPU of rank 0; {} on other ranks. A collective."""
        result: dict[str, Tensor] = {}
        for name, value in self.as_distributed(self._sources()).items():
            whole = value.full_tensor() if hasattr(value, "full_tensor") else value
            if self.ranks.first:
                result[self.wire[name].name] = whole.to(DTYPES[self.wire[name].dtype]).cpu().contiguous()
        return result

    def as_distributed(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """This rank's shards as DTensors placed like their parameters, sharing storage; others as they are."""
        if self.ranks.mesh is None:
            return dict(tensors)
        from torch.distributed.tensor import DTensor

        result: dict[str, Tensor] = {}
        for name, tensor in tensors.items():
            parameter = self.parameters[name]
            if self.replicated(name):
                result[name] = tensor
                continue
            assert isinstance(parameter, DTensor), name
            result[name] = DTensor.from_local(
                tensor,
                self.ranks.mesh,
                parameter.placements,
                run_check=False,
                shape=parameter.shape,
                stride=parameter.stride(),
            )
        return result


def plain_name(name: str) -> str:
    """A parameter's name in the model itself, without the wrapper of recomputation."""
    return name.replace("_checkpoint_wrapped_module.", "")
