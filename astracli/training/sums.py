"""What a step adds up while it runs, how long its phases took, and its metrics: read once, when the device is done.

Reading a figure after every micro-batch would make the host wait for the device, and then the device for the host's
next kernels. Here nothing is read before the end of a pass.
"""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import torch
from torch import Tensor

from astracli.config.recipe import Recipe
from astracli.rl.batch import Batch
from astracli.training.agreement import Agreement
from astracli.training.fsdp import Ranks


class Sums:
    """Sums of one rank over its tokens, by name; on its device until they are read."""

    NAMES = ("ratio", "entropy", "kl", "loss", "clipped", "capped", "mismatched", "teacher")

    def __init__(self) -> None:
        self.own = Agreement()
        """Covers the tokens of the trainer's own version."""
        self.noise: float | None = None
        """How much rounding alone changes the log-probability of such a token, where that was measured."""
        self._totals: dict[str, Tensor] = {}

    def add(self, name: str, values: Tensor) -> None:
        """Add the sum of `values`, in float64."""
        total = values.detach().sum(dtype=torch.float64)
        self._totals[name] = self._totals[name] + total if name in self._totals else total

    def has(self, name: str) -> bool:
        """Whether anything was added, zeros included."""
        return name in self._totals

    def read(self) -> list[float]:
        """In the order of `NAMES`, 0 for what was never added. Waits for the device."""
        found = dict.fromkeys(self.NAMES, 0.0)
        if self._totals:
            found.update(zip(self._totals, torch.stack(list(self._totals.values())).tolist(), strict=True))
        return list(found.values())


class Timer:
    """Seconds per phase, by the device's own clock: a GPU ends a phase later than the host has launched it."""

    def __init__(self, device: torch.device):
        self._on_gpu = device.type == "cuda"
        self.laps: list[tuple[str, Any]] = [("", self._now())]

    def lap(self, phase: str) -> None:
        """The time since the last lap belongs to `phase`."""
        self.laps.append((phase, self._now()))

    def seconds(self) -> dict[str, float]:
        """By phase. Waits for the end of the last."""
        if self._on_gpu:
            self.laps[-1][1].synchronize()
        found: dict[str, float] = {}
        for (_, since), (phase, until) in zip(self.laps, self.laps[1:], strict=False):
            took = since.elapsed_time(until) / 1000 if self._on_gpu else until - since
            found[phase] = found.get(phase, 0.0) + took
        return found

    def _now(self) -> Any:
        if not self._on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


def figures(
    recipe: Recipe, ranks: Ranks, batch: Batch, sums: Sums, updates: int, *, referenced: bool
) -> dict[str, float]:
    """A step's metrics over all ranks. `referenced`: KL to a reference was measured. A collective."""
    ratio, entropy, kl, loss, clipped, capped, mismatched, teacher = ranks.sum(sums.read())
    tokens = batch.loss_tokens
    rewards = np.concatenate([g.rewards for g in batch.groups])
    per_row = np.array([row.advantage for row in batch.rows])
    found = {
        "loss": loss / updates,
        "reward_mean": float(rewards.mean()),
        "advantage_mean": float(per_row.mean()),
        "advantage_std": float(per_row.std()),
        "clip_fraction": clipped / tokens,
        "ratio_mean": ratio / tokens,
        "entropy": entropy / tokens,
        "tokens": float(tokens),
        "samples": float(len(batch.rows)),
        "groups": float(len(batch.groups)),
        "completion_tokens_mean": tokens / len(batch.rows),
        "length_stop_fraction": float(np.mean([r.sample.finish_reason == "length" for r in batch.rows])),
        "updates": float(updates),
    }
    parts: dict[str, list[float]] = {}
    for name, value in ((n, v) for group in batch.groups for s in group.samples for n, v in s.parts.items()):
        parts.setdefault(name, []).append(value)
    found |= {f"parts/{name}": float(np.mean(values)) for name, values in sorted(parts.items())}
    if sums.has("capped"):
        found["weight_capped_fraction"] = capped / tokens
    if sums.has("mismatched"):
        found["mismatch_capped_fraction"] = mismatched / tokens
    if recipe.algorithm.overlong_fraction:
        found |= batch.overlong()
    if referenced:
        found["kl"] = kl / tokens
    if sums.has("teacher"):
        found["teacher_kl"] = teacher / tokens
    if sums.noise is not None:
        found["parity_noise"] = sums.noise
    return found | sums.own.figures
