"""The optimizer: fp32 masters, AdamW, the gradient norm of all ranks, the learning rate of a step.

On a CPU a parameter holds the value that the engine holds (rounded to the wire dtype, computed with in fp32) and the
master keeps what rounding loses; gradients go to the master, and after each update the parameter is the rounded master
again. So trainer and engine compute the same function. On a GPU the parameters are the fp32 masters, and FSDP2 casts
them to bf16 for computing.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from astracli.adapter import WireTensor
from astracli.errors import RunFailed
from astracli.recipe import TrainTable
from astracli.training.fsdp import Ranks, local
from astracli.weights.publisher import Shard

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


def learning_rate(table: TrainTable, step: int) -> float:
    """Rate of step 0, 1, ...: linear warm-up over `warmup_steps`, then the schedule over the steps that are left."""
    if step < table.warmup_steps:
        return table.learning_rate * (step + 1) / table.warmup_steps
    done = min(1.0, (step - table.warmup_steps) / max(1, table.steps - table.warmup_steps))
    if table.schedule == "constant":
        return table.learning_rate
    shape = 1.0 - done if table.schedule == "linear" else 0.5 * (1.0 + math.cos(math.pi * done))
    return table.learning_rate * (table.final_lr_fraction + (1.0 - table.final_lr_fraction) * shape)


class Masters:
    """fp32 masters of the trained parameters and their AdamW state; this rank's shards when sharded."""

    def __init__(self, model: nn.Module, wire: Mapping[str, WireTensor], table: TrainTable, ranks: Ranks):
        """`wire`: training parameter name -> how it travels; parameters it leaves out are frozen.

        Raises RunFailed when it names a parameter that the model does not have.
        """
        self.ranks = ranks
        self.table = table
        self.wire = dict(wire)
        self.parameters = {plain_name(n): p for n, p in model.named_parameters()}
        unknown = sorted(set(self.wire) - set(self.parameters))
        if unknown:
            raise RunFailed(f"the adapter's wire names {unknown[:5]} are no parameters of {type(model).__name__}")
        for name, parameter in self.parameters.items():
            parameter.requires_grad_(name in self.wire)
        self.parameters = {name: self.parameters[name] for name in self.wire}
        self.tied = self._tied_names(model)
        self.rounded = ranks.device.type == "cpu"
        with torch.no_grad():
            self.values = {
                name: local(p.detach()).clone() if self.rounded else local(p.detach())
                for name, p in self.parameters.items()
            }
        self._optimized = {name: nn.Parameter(value) for name, value in self.values.items() if value.numel()}
        self.adamw = torch.optim.AdamW(
            list(self._optimized.values()),
            lr=table.learning_rate,
            betas=table.betas,
            eps=table.eps,
            weight_decay=table.weight_decay,
            fused=True,
        )
        self.publish_to_parameters()

    def _tied_names(self, model: nn.Module) -> dict[str, str]:
        """{name of a tied duplicate: wire name of the parameter that it is}"""
        wire_of = {id(p): self.wire[name].name for name, p in self.parameters.items()}
        own = {tensor.name for tensor in self.wire.values()}
        every = ((plain_name(n), p) for n, p in model.named_parameters(remove_duplicate=False))
        return {name: wire_of[id(p)] for name, p in every if id(p) in wire_of and name not in own}

    @torch.no_grad()
    def publish_to_parameters(self) -> None:
        """parameter <- master rounded to the wire dtype. On a GPU they are one tensor: nothing to do."""
        if not self.rounded:
            return
        for name, parameter in self.parameters.items():
            local(parameter).copy_(self.values[name].to(DTYPES[self.wire[name].dtype]))

    @torch.no_grad()
    def update(self, step: int) -> float:
        """One AdamW update from the parameters' gradients, clipped together. Returns the norm before clipping.

        Raises RunFailed when the norm is not finite.
        """
        gradients = {}
        for name, parameter in self.parameters.items():
            if name in self._optimized and parameter.grad is not None:
                gradients[name] = local(parameter.grad)
        norms = torch._foreach_norm(list(gradients.values())) if gradients else []
        squares = float(torch.stack([n.double() for n in norms]).square().sum()) if gradients else 0.0
        (total,) = self.ranks.sum([squares]) if self.ranks.mesh is not None else [squares]
        norm = math.sqrt(total)
        if not math.isfinite(norm):
            raise RunFailed(
                f"the gradient norm of step {step} is {norm}",
                "lower train.learning_rate, or look at the samples of the steps before",
            )
        if norm > self.table.grad_clip:
            torch._foreach_mul_(list(gradients.values()), self.table.grad_clip / (norm + 1e-6))
        for group in self.adamw.param_groups:
            group["lr"] = learning_rate(self.table, step)
        for name, master in self._optimized.items():
            assert self.rounded or master.data_ptr() == local(self.parameters[name]).data_ptr(), name
            master.grad = gradients.get(name)
        self.adamw.step()
        for name, parameter in self.parameters.items():
            parameter.grad = None
            if name in self._optimized:
                self._optimized[name].grad = None
        self.publish_to_parameters()
        return norm

    def moments(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """AdamW's first and second moments by parameter name; zeros before the first update."""
        first, second = {}, {}
        for name, value in self.values.items():
            state = self.adamw.state.get(self._optimized[name], {}) if name in self._optimized else {}
            first[name] = state["exp_avg"] if state else torch.zeros_like(value)
            second[name] = state["exp_avg_sq"] if state else torch.zeros_like(value)
        return first, second

    @property
    def updates(self) -> int:
        """AdamW updates made so far: what its bias correction counts."""
        for master in self._optimized.values():
            state = self.adamw.state.get(master)
            if state:
                return int(state["step"])
        return 0

    @torch.no_grad()
    def restore(self, first: Mapping[str, Tensor], second: Mapping[str, Tensor], updates: int) -> None:
        """Take over moments (this rank's shards) and the update count; `values` have been filled in place already."""
        for name, master in self._optimized.items():
            self.adamw.state[master] = {
                "step": torch.tensor(float(updates), device=master.device),
                "exp_avg": first[name].clone(),
                "exp_avg_sq": second[name].clone(),
            }
        self.publish_to_parameters()

    @torch.no_grad()
    def wire_shards(self) -> dict[str, Tensor | Shard]:
        """HF name -> this rank's part of the tensor in its wire dtype: what is published. Empty parts are left out.

        Copies, on the device of the masters: training may go on while they are published.
        """
        result: dict[str, Tensor | Shard] = {}
        for name, value in self.values.items():
            tensor = value.to(DTYPES[self.wire[name].dtype], copy=True)
            if self.ranks.mesh is None:
                result[self.wire[name].name] = tensor
            elif tensor.numel():
                parameter: Any = self.parameters[name]
                _, offset = compute_local_shape_and_global_offset(
                    parameter.shape, parameter.device_mesh, parameter.placements
                )
                start = offset[0] * (parameter.numel() // parameter.shape[0])
                result[self.wire[name].name] = Shard(tensor.reshape(-1), start, tuple(parameter.shape))
        return result

    @torch.no_grad()
    def wire_full(self) -> dict[str, Tensor]:
        """HF name -> the whole tensor in its wire dtype, on the CPU of rank 0; {} on other ranks. A collective."""
        result: dict[str, Tensor] = {}
        for name, value in self.as_distributed(self.values).items():
            whole = value.full_tensor() if hasattr(value, "full_tensor") else value
            if self.ranks.first:
                result[self.wire[name].name] = whole.to(DTYPES[self.wire[name].dtype]).cpu().contiguous()
        return result

    def as_distributed(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """This rank's shards as DTensors placed like their parameters, sharing storage; plain tensors unsharded."""
        if self.ranks.mesh is None:
            return dict(tensors)
        from torch.distributed.tensor import DTensor

        result: dict[str, Tensor] = {}
        for name, tensor in tensors.items():
            parameter = self.parameters[name]
            assert isinstance(parameter, DTensor), name
            result[name] = DTensor.from_local(
                tensor,
                parameter.device_mesh,
                parameter.placements,
                run_check=False,
                shape=parameter.shape,
                stride=parameter.stride(),
            )
        return result


def plain_name(name: str) -> str:
    """A parameter's name in the model itself, without the wrapper of recomputation."""
    return name.replace("_checkpoint_wrapped_module.", "")
