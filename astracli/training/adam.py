"""AdamW over fp32 masters: the learning rate of a step, and moments that may wait in host memory between updates."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from astracli.plan_trainer import BUCKET_BYTES
from astracli.recipe import TrainTable
from astracli.training.parking import Parking


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
    """Updates `values` in place. With `moments_on_host` the moments wait in host memory, and pass through the device
    bucket by bucket in an update: the same numbers as all at once."""

    def __init__(self, values: Mapping[str, Tensor], table: TrainTable, *, moments_on_host: bool):
        self.values = values
        self.moments_on_host = moments_on_host
        self._optimized = {name: nn.Parameter(value) for name, value in values.items() if value.numel()}
        self._parked: dict[str, Parking] = {}
        self.adamw = torch.optim.AdamW(
            list(self._optimized.values()),
            lr=table.learning_rate,
            betas=table.betas,
            eps=table.eps,
            weight_decay=table.weight_decay,
            fused=True,
        )

    def step(self, gradients: Mapping[str, Tensor], rate: float) -> None:
        """One update of what has a gradient."""
        for group in self.adamw.param_groups:
            group["lr"] = rate
        for bucket in self._buckets(gradients):
            self._step_bucket(bucket, gradients)

    def _buckets(self, gradients: Mapping[str, Tensor]) -> list[list[str]]:
        """Names whose moments are on the device together; one tensor may be over the limit alone."""
        if not self.moments_on_host:
            return [list(gradients)]
        buckets: list[list[str]] = []
        size = 0
        for name in gradients:
            its = 2 * self.values[name].nbytes
            if not buckets or size + its > BUCKET_BYTES:
                buckets.append([])
                size = 0
            buckets[-1].append(name)
            size += its
        return buckets

    def _step_bucket(self, names: list[str], gradients: Mapping[str, Tensor]) -> None:
        for name in names:
            if name in self._parked:
                self._parked[name].to_device()
            self._optimized[name].grad = gradients[name]
        self.adamw.step()
        for name in names:
            self._optimized[name].grad = None
            if self.moments_on_host:
                self._park(name)

    def _park(self, name: str) -> None:
        """The moments of one parameter to the host."""
        if name not in self._parked:
            state = self.adamw.state[self._optimized[name]]
            self._parked[name] = Parking((state["exp_avg"], state["exp_avg_sq"]))
        self._parked[name].to_host()

    def moments(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """First and second moments by parameter name, where they are; zeros before the first update."""
        return self._moments("exp_avg"), self._moments("exp_avg_sq")

    def _moments(self, key: str) -> dict[str, Tensor]:
        found = {}
        for name, value in self.values.items():
            state = self.adamw.state.get(self._optimized[name], {}) if name in self._optimized else {}
            parked = self._parked.get(name)
            moment = state[key] if state else self._no_moment(value)
            found[name] = parked.on_host(moment) if parked is not None else moment
        return found

    def no_moments(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Zeros, where moments wait between updates."""
        first, second = ({n: self._no_moment(v) for n, v in self.values.items()} for _ in range(2))
        return first, second

    def _no_moment(self, value: Tensor) -> Tensor:
        return torch.zeros_like(value, device="cpu" if self.moments_on_host else None)

    def on_device(self) -> list[Tensor]:
        """Moments that lie beside their masters."""
        if self.moments_on_host:
            return []
        return [state[key] for state in self.adamw.state.values() for key in ("exp_avg", "exp_avg_sq")]

    @property
    def updates(self) -> int:
        """Updates made so far: what the bias correction counts."""
        for master in self._optimized.values():
            state = self.adamw.state.get(master)
            if state:
                return int(state["step"])
        return 0

    @torch.no_grad()
    def restore(self, first: Mapping[str, Tensor], second: Mapping[str, Tensor], updates: int) -> None:
        """Take over moments, which then belong to this, and the update count."""
        for name, master in self._optimized.items():
            self.adamw.state[master] = {
                "step": torch.tensor(float(updates), device=master.device),
                "exp_avg": first[name].to(master.device),
                "exp_avg_sq": second[name].to(master.device),
            }
            if self.moments_on_host:
                self._parked.pop(name, None)
                self._park(name)
