"""AdamW over fp32 masters: the learning rate of a step, and moments that may wait in host memory between updates."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from astracli.config.recipe_train import TrainTable
from astracli.process.layout import BUCKET_BYTES
from astracli.training.cpu_offload import CpuOffload
from astracli.training.overlapped_offload import OverlappedOffload
from astracli.training.split_masters import SplitMasters

MOMENTS = ("exp_avg", "exp_avg_sq")
"""Torch's names of the first and second moment."""


def learning_rate(table: TrainTable, step: int) -> float:
    """Rate of step 0, 1, ...: linear warm-up over `warmup_steps`, then the schedule over the steps that are left."""
    if step < table.warmup_steps:
        return table.learning_rate * (step + 1) / table.warmup_steps
    done = min(1.0, (step - table.warmup_steps) / max(1, table.steps - table.warmup_steps))
    if table.schedule == "constant":
        return table.learning_rate
    shape = 1.0 - done if table.schedule == "linear" else 0.5 * (1.0 + math.cos(math.pi * done))
    return table.learning_rate * (table.final_lr_fraction + (1.0 - table.final_lr_fraction) * shape)


class Adam:
    """Updates `values` in place. Moments that wait in host memory and split masters come to the device for an update,
    bucket by bucket; the numbers are the same as those of one update of all."""

    def __init__(
        self,
        values: Mapping[str, Tensor],
        table: TrainTable,
        *,
        moments_on_host: float = 0.0,
        split_masters: SplitMasters | None = None,
    ):
        """`moments_on_host`: the part of the moments that waits there."""
        self.values = values
        self.split_masters = split_masters or SplitMasters()
        self.away = on_host({name: value.numel() for name, value in values.items()}, moments_on_host)
        self.optimized = {name: nn.Parameter(value) for name, value in values.items() if value.numel()}
        self._offloaded: dict[str, CpuOffload] = {}
        self._overlapped_offload = OverlappedOffload(next(iter(values.values())).device)
        self.adamw = torch.optim.AdamW(
            _groups(self.optimized, table), lr=table.learning_rate, betas=table.betas, eps=table.eps, fused=True
        )

    def step(
        self, gradients: Mapping[str, Tensor], rate: float, updated: Callable[[Collection[str]], None] = lambda _: None
    ) -> None:
        """One update of what has a gradient. `updated` is called with the names of each bucket that is done."""
        for group in self.adamw.param_groups:
            group["lr"] = rate
        stay = buckets({name: self._brings(name) for name in gradients if name not in self.away})
        pass_by = buckets({name: self._brings(name) for name in gradients if name in self.away})
        sets = [[self._offloaded[name] for name in bucket if name in self._offloaded] for bucket in pass_by]

        def resident() -> None:
            for bucket in stay:
                self.step_bucket(bucket, gradients)
                updated(bucket)

        def visitors(index: int) -> list[CpuOffload]:
            self.step_bucket(pass_by[index], gradients)
            updated(pass_by[index])
            return [self._offload(name) for name in pass_by[index]]

        self._overlapped_offload.through(sets, visitors, resident)

    def _brings(self, name: str) -> int:
        """Bytes that come to the device for an update of this."""
        return self.values[name].nbytes * ((2 if name in self.away else 0) + (1 if name in self.split_masters else 0))

    def step_bucket(self, names: Collection[str], gradients: Mapping[str, Tensor]) -> None:
        with self.split_masters.whole(names):
            for name in names:
                self.optimized[name].grad = gradients[name]
            self.adamw.step()
            for name in names:
                self.optimized[name].grad = None

    def _offload(self, name: str) -> CpuOffload:
        """Of the moments of one parameter, on the device now."""
        if name not in self._offloaded:
            state = self.adamw.state[self.optimized[name]]
            self._offloaded[name] = CpuOffload([state[key] for key in MOMENTS])
        return self._offloaded[name]

    def moments(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """First and second moments by parameter name, where they are; zeros before the first update."""
        first, second = ({name: self._moment(name, key) for name in self.values} for key in MOMENTS)
        return first, second

    def _moment(self, name: str, key: str) -> Tensor:
        state = self.adamw.state.get(self.optimized[name]) if name in self.optimized else None
        if not state:
            return torch.zeros_like(self.values[name], device="cpu" if name in self.away else None)
        return self._offloaded[name].on_host(state[key]) if name in self._offloaded else state[key]

    def on_device(self) -> list[Tensor]:
        """Moments that lie beside their masters."""
        there = [self.adamw.state.get(m, {}) for name, m in self.optimized.items() if name not in self.away]
        return [state[key] for state in there if state for key in MOMENTS]

    @property
    def updates(self) -> int:
        """Updates made so far: what the bias correction counts."""
        return next((int(state["step"]) for state in self.adamw.state.values() if state), 0)

    @torch.no_grad()
    def restore(self, name: str, first: Tensor, second: Tensor, updates: int) -> None:
        """Take over one parameter's moments, which then belong to this, and the update count."""
        master = self.optimized.get(name)
        if master is None:  # this rank's shard of it is empty
            return
        moments = {key: moment.to(master.device) for key, moment in zip(MOMENTS, (first, second), strict=True)}
        self.adamw.state[master] = {"step": torch.tensor(float(updates), device=master.device), **moments}
        if name in self.away:
            self._offloaded.pop(name, None)
            self._offload(name).to_host()


def _groups(optimized: Mapping[str, nn.Parameter], table: TrainTable) -> list[dict[str, Any]]:
    """What decays, and what does not (`train.weight_decay_on`)."""
    every = table.weight_decay_on == "all"
    decays = [master for master in optimized.values() if every or master.ndim > 1]
    others = [master for master in optimized.values() if not every and master.ndim <= 1]
    groups = [(decays, table.weight_decay), (others, 0.0)]
    return [{"params": masters, "weight_decay": decay} for masters, decay in groups if masters]


def buckets(brings: Mapping[str, int]) -> list[list[str]]:
    """Names that are updated together, in their order: what they bring to the device for it (bytes) fits a bucket; one
    alone may be over the limit."""
    made: list[list[str]] = []
    size = 0
    for name, its in brings.items():
        if not made or size + its > BUCKET_BYTES:
            made.append([])
            size = 0
        made[-1].append(name)
        size += its
    return made


def on_host(sizes: Mapping[str, int], part: float) -> frozenset[str]:
    """Names of the parameters whose moments wait on the host: at least `part` of all elements. The largest stay as long
    as there is room, since each passes through in one piece."""
    room = (1.0 - part) * sum(sizes.values())
    away = set()
    for name, size in sorted(sizes.items(), key=lambda item: -item[1]):
        if size and size > room:
            away.add(name)
        else:
            room -= size
    return frozenset(away)
