"""AdamW over fp32 masters: the learning rate of a step, and moments that may wait in host memory between updates."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from astracli.config.recipe import TrainTable
from astracli.process.layout import BUCKET_BYTES
from astracli.training.cpu_offload import CpuOffload
from astracli.training.overlapped_offload import OverlappedOffload
from astracli.training.split_masters import SplitMasters


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
    """Updates `values` in place, bucket by bucket where something passes through the device for it: moments that wait
    in host memory, masters that lie in `split_masters`. The same numbers as all at once."""

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
        self.moments_on_host = moments_on_host
        self.split_masters = split_masters or SplitMasters()
        self.away = on_host({name: value.numel() for name, value in values.items()}, moments_on_host)
        self.optimized = {name: nn.Parameter(value) for name, value in values.items() if value.numel()}
        self._offloaded: dict[str, CpuOffload] = {}
        self._overlapped_offload: OverlappedOffload | None = None
        self.adamw = torch.optim.AdamW(
            _groups(self.optimized, table), lr=table.learning_rate, betas=table.betas, eps=table.eps, fused=True
        )

    def step(self, gradients: Mapping[str, Tensor], rate: float) -> None:
        """One update of what has a gradient."""
        for group in self.adamw.param_groups:
            group["lr"] = rate
        stay = buckets({name: self._brings(name) for name in gradients if name not in self.away})
        pass_by = buckets({name: self._brings(name) for name in gradients if name in self.away})
        sets = [[self._offloaded[name] for name in bucket if name in self._offloaded] for bucket in pass_by]

        def resident() -> None:
            for bucket in stay:
                self.step_bucket(bucket, gradients)

        def visitors(index: int) -> list[CpuOffload]:
            self.step_bucket(pass_by[index], gradients)
            return [self._offload(name) for name in pass_by[index]]

        if self._overlapped_offload is None:
            self._overlapped_offload = OverlappedOffload(next(iter(self.values.values())).device)
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
            self._offloaded[name] = CpuOffload((state["exp_avg"], state["exp_avg_sq"]))
        return self._offloaded[name]

    def moments(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """First and second moments by parameter name, where they are; zeros before the first update."""
        return self._moments("exp_avg"), self._moments("exp_avg_sq")

    def _moments(self, key: str) -> dict[str, Tensor]:
        found = {}
        for name, value in self.values.items():
            state = self.adamw.state.get(self.optimized[name], {}) if name in self.optimized else {}
            offloaded = self._offloaded.get(name)
            moment = state[key] if state else self._no_moment(name, value)
            found[name] = offloaded.on_host(moment) if offloaded is not None else moment
        return found

    def no_moments(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Zeros, where moments wait between updates."""
        first, second = ({n: self._no_moment(n, v) for n, v in self.values.items()} for _ in range(2))
        return first, second

    def _no_moment(self, name: str, value: Tensor) -> Tensor:
        return torch.zeros_like(value, device="cpu" if name in self.away else None)

    def on_device(self) -> list[Tensor]:
        """Moments that lie beside their masters."""
        there = [self.adamw.state.get(m, {}) for name, m in self.optimized.items() if name not in self.away]
        return [state[key] for state in there if state for key in ("exp_avg", "exp_avg_sq")]

    @property
    def updates(self) -> int:
        """Updates made so far: what the bias correction counts."""
        for master in self.optimized.values():
            state = self.adamw.state.get(master)
            if state:
                return int(state["step"])
        return 0

    @torch.no_grad()
    def restore(self, first: Mapping[str, Tensor], second: Mapping[str, Tensor], updates: int) -> None:
        """Take over moments, which then belong to this, and the update count."""
        for name, master in self.optimized.items():
            self.adamw.state[master] = {
                "step": torch.tensor(float(updates), device=master.device),
                "exp_avg": first[name].to(master.device),
                "exp_avg_sq": second[name].to(master.device),
            }
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
