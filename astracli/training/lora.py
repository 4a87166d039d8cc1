"""LoRA adapters of a policy: factors A and B beside frozen matrices, and the matrices that hold the merged result.

While adapters are on, an adapted matrix holds round(W + alpha / rank * B A), bit for bit what the engine holds
(`weights.format.low_rank`). So a forward pass is an ordinary one, with the kernels that the model has anyway, and
trainer and engine compute the same function. W itself waits beside it, in the dtype of the engine: every update merges
anew from W, and with adapters off (`Adapters.off`) the policy is the initial one, to which the KL term measures.

The gradient of A and B is that at the merged matrix, as if nothing were rounded; that of W is never made
(`kernels.weight_gradients.LowRank`).

Source: LoRA, arXiv 2106.09685. A begins uniformly in +-1 / sqrt(inputs), as in `peft`, B at zero.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path

import torch
from torch import Tensor, nn

from astracli.config.recipe_lora import LoraTable
from astracli.errors import RunFailed
from astracli.kernels import weight_gradients
from astracli.kernels.upload import host_memory
from astracli.models import checkpoint_files, lora_targets
from astracli.models.adapter import ModelAdapter, WireTensor
from astracli.training.fsdp import Ranks, local, start_of
from astracli.training.optimizer import DTYPES, Masters
from astracli.weights.device.merging import merge
from astracli.weights.format.manifest import BASE_BYTES, BaseFile

FACTORS = ("lora_A", "lora_B")


@dataclass(eq=False)
class Target:
    """One matrix with an adapter."""

    name: str
    """Of the matrix in the model, such as `model.layers.0.mlp.up_proj.weight`."""
    wire: WireTensor
    layer: nn.Linear
    a_RI: nn.Parameter
    b_OR: nn.Parameter
    base: Tensor = field(init=False)
    """This rank's rows of W, in the engine's dtype."""
    start: int = 0
    """The first of these rows."""

    @property
    def module(self) -> str:
        """The linear layer's name."""
        return self.name.removesuffix(".weight")

    @property
    def factors(self) -> list[tuple[str, nn.Parameter]]:
        """Of the layer, by their names there."""
        return list(zip(FACTORS, (self.a_RI, self.b_OR), strict=True))

    @property
    def wire_bytes(self) -> int:
        """Of an element of W."""
        return DTYPES[self.wire.dtype].itemsize

    @property
    def merged(self) -> Tensor:
        """This rank's rows of the matrix that passes compute with."""
        return local(self.layer.weight.detach())


class Adapters:
    """All adapters of one policy. They are fp32 parameters, which every rank holds whole."""

    def __init__(
        self,
        model: nn.Module,
        wire: Mapping[str, WireTensor],
        adapter: ModelAdapter,
        table: LoraTable,
        *,
        seed: int,
        origin: Mapping[str, str] | None = None,
    ):
        """Adds parameters to the layers of `model`, before it is sharded. `wire`: of the model. `origin`: what a
        checkpoint says of the weights without adapters. Raises UserError for targets that the model does not have,
        RunFailed for one that is no plain linear layer."""
        self.table = table
        self.scale = table.alpha / table.rank
        self.origin = dict(origin or {})
        shapes = {name: tensor.shape for name, tensor in wire.items()}
        self.targets: list[Target] = []
        for name, (outputs, inputs) in lora_targets.chosen(table, adapter, shapes).items():
            layer = model.get_submodule(name.removesuffix(".weight"))
            if type(layer) is not nn.Linear:
                raise RunFailed(f"`{name}` belongs to a {type(layer).__name__}, an adapter needs a plain linear layer")
            a_RI = nn.Parameter(_uniform((table.rank, inputs), 1 / math.sqrt(inputs), seed, name))
            b_OR = nn.Parameter(torch.zeros(outputs, table.rank))
            self.targets.append(target := Target(name, wire[name], layer, a_RI, b_OR))
            for key, factor in target.factors:
                layer.register_parameter(key, factor)

    @property
    def factors(self) -> dict[str, nn.Parameter]:
        """{name: A or B}, of every target in order."""
        return {f"{target.module}.{key}": factor for target in self.targets for key, factor in target.factors}

    @property
    def wire(self) -> dict[str, WireTensor]:
        """The factors as what is trained: fp32, never rounded."""
        return {name: WireTensor(name, "float32", tuple(factor.shape)) for name, factor in self.factors.items()}

    def attach(self, sums: dict[str, Tensor], ranks: Ranks, *, base_on_host: bool) -> None:
        """Once the model is on its device, sharded or not: keep this rank's rows of every W, and let gradients go to
        `sums`. `base_on_host`: the rows wait in pinned host memory."""
        sizes = [len(target.merged) * target.layer.in_features * target.wire_bytes for target in self.targets]
        starts = list(accumulate((-(-size // 16) * 16 for size in sizes), initial=0))
        device = ranks.device
        memory = host_memory(starts[-1], device, self) if base_on_host and device.type == "cuda" else None
        for target, start, size in zip(self.targets, starts, sizes, strict=False):
            merged, dtype = target.merged, DTYPES[target.wire.dtype]
            if memory is None:
                target.base = merged.to(dtype, copy=True)
            else:  # one piece for all: memory is pinned by the page, and a page only once
                target.base = memory[start : start + size].view(dtype).view(merged.shape).copy_(merged)
            target.start = start_of(target.layer.weight, ranks) // target.layer.in_features
            a, b = ((f"{target.module}.{key}", factor) for key, factor in target.factors)
            weight_gradients.adapt(target.layer, weight_gradients.LowRank(sums, a, b, self.scale))

    def merge(self) -> None:
        """The matrices <- W + scale * B A, rounded once."""
        for target in self.targets:
            if len(target.base):
                merge(target.base, target.a_RI.detach(), self._rows_of_b(target), target.merged)

    @contextmanager
    def off(self) -> Iterator[None]:
        """Inside, the policy is the initial one."""
        for target in self.targets:
            target.merged.copy_(target.base, non_blocking=True)
        try:
            yield
        finally:
            self.merge()

    def on_device(self) -> list[Tensor]:
        """W where it lies beside the merged matrices."""
        return [target.base for target in self.targets if target.base.device == target.a_RI.device]

    def factors_to_send(self) -> dict[str, tuple[Tensor, Tensor]]:
        """{wire name of a matrix: (A, scaled B)}, copies on the CPU: what a receiver merges into its W."""
        both = ((t, t.a_RI.detach().to("cpu", copy=True), t.b_OR.detach() * self.scale) for t in self.targets)
        return {target.wire.name: (a_RI, b_OR.cpu()) for target, a_RI, b_OR in both}

    def _rows_of_b(self, target: Target) -> Tensor:
        return target.b_OR.detach()[target.start : target.start + len(target.base)] * self.scale


def merged_into(model_dir: Path, adapter: ModelAdapter, masters: Masters) -> dict[str, BaseFile]:
    """{wire name of every matrix with an adapter: where W lies}, for receivers. Raises RunFailed for one that they
    cannot read there."""
    places, names = checkpoint_files.places(model_dir, adapter), masters.factors()
    shapes = {tensor.name: tensor.shape for tensor in masters.travels.values()}
    found = {name: places[name] for name in names if name in places}
    odd = [n for n in names if n not in found or found[n].dtype not in BASE_BYTES or found[n].shape != shapes[n]]
    if odd:
        raise RunFailed(
            f"weights.transfer = adapter: engines cannot read {len(odd)} matrices in `{model_dir}` as they are "
            f"trained, for example `{odd[0]}`",
            "send merged weights with `--set weights.transfer=delta`",
        )
    return {name: BaseFile(place.file, place.offset, place.dtype) for name, place in found.items()}


def _uniform(shape: tuple[int, int], bound: float, seed: int, name: str) -> Tensor:
    """Drawn by the run's seed and the matrix's name alone: the same whatever the number of ranks and targets."""
    number = int.from_bytes(hashlib.sha256(f"{seed} {name}".encode()).digest()[:7], "little")
    return torch.empty(shape).uniform_(-bound, bound, generator=torch.Generator().manual_seed(number))
