"""Where M2PO's limits come from: the ways that `stale_data.py limits` compares, all of M2PO as a clip.

- `floor`: the limit is never over max(largest |log r|, sqrt(tau)), also where nothing has to be bounded; one scoring
  pass over the batch (the rule of this package until November 2026).
- `batch`: the published rule, one scoring pass over the batch (the product).
- `minibatch`: the published rule on each minibatch's own log-ratios, taken just before its update.
- `microbatch`: the published rule on each micro-batch's own forward pass, with four micro-batches a minibatch.
- `grpo`: clip 0.2, for comparison.

Tokens cut are counted three ways in every run, on the same forward passes: by the way itself, by the published rule on
what the update computes on, and by PPO's range of 0.2.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch
from torch import Tensor

from astracli.rl import losses
from astracli.rl.losses import ClipLimits, TokenLoss, Tokens, m2po
from astracli.rl.losses.clipping import ClipRange
from astracli.training.scoring import Work
from astracli.training.step import Trainer

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from learning.staleness import Run

MICRO_BATCHES = 4
"""A minibatch of `microbatch`."""


@dataclass(frozen=True)
class Way:
    source: str
    threshold: float = 0.003

    @property
    def settings(self) -> dict[str, Any]:
        if self.source == "grpo":
            return {"name": "grpo"}
        return {"name": "m2po", "m2po.variant": "clip", "m2po.m2_threshold": self.threshold}


FIRST = ("floor", "batch", "minibatch", "microbatch")
TIERS = {
    1: [Way("grpo"), *(Way(source) for source in FIRST)],
    2: [Way(source, 0.01) for source in FIRST],
    3: [Way(source, 0.04) for source in ("batch", "minibatch")],
}
WAYS = {
    (way.source if way.source == "grpo" else f"{way.source} {way.threshold:g}"): way
    for tier in TIERS.values()
    for way in tier
}


def floor(log_ratio_N: Tensor, advantage_N: Tensor, settings: m2po.Settings) -> ClipLimits:
    """The former rule: a `prepare`."""
    tau = settings.m2_threshold
    moment_C = log_ratio_N[m2po.candidates(log_ratio_N, advantage_N)].double() ** 2
    if m2po.bounded(moment_C, tau):
        return m2po.prepare(log_ratio_N, advantage_N, settings)
    t = max(math.sqrt(float(moment_C.max())) if len(moment_C) else 0.0, math.sqrt(tau))
    low, high = (min(w, m) for w, m in zip(m2po.widths(t), m2po.CLIP_WIDEST, strict=True))
    return ClipRange(1.0 - low, 1.0 + high)


def limits_per_minibatch(trainer: Trainer) -> None:
    """Each minibatch is scored by the policy that is about to be updated."""
    update: Callable[..., float] = trainer.minibatch

    def minibatch(work: Work, index: int, step: int) -> float:
        with torch.no_grad():
            ratios = [
                trainer.forward(trainer.policy, micro)[0] - torch.from_numpy(micro.logprob_N)
                for micro in work.batch.minibatches[index]
            ]
        advantages = np.concatenate([micro.advantage_N for micro in work.batch.minibatches[index]])
        work.limits = m2po.prepare(torch.cat(ratios), torch.from_numpy(advantages), trainer.recipe.algorithm.own)
        return update(work, index, step)

    trainer.minibatch = minibatch  # type: ignore[assignment]


class LimitsRun(Run):
    """A run that takes its limits a certain way, and counts the tokens that each rule cuts."""

    def __init__(self, label: str, staleness: int, seed: int, args: argparse.Namespace):
        way = WAYS[label]
        super().__init__(label, staleness, seed, args, way.settings)
        self.way, self.cut = way, {"itself": 0, "published": 0, "ppo": 0, "tokens": 0}
        trainer = self.trainer
        if way.source == "microbatch":
            tokens = trainer.recipe.train.batch_groups * trainer.recipe.rollout.group_size * args.row_tokens
            share = tokens // trainer.recipe.train.minibatches // MICRO_BATCHES
            table = trainer.recipe.train.model_copy(update={"tokens_per_microbatch": share})
            trainer.recipe = trainer.recipe.model_copy(update={"train": table})
        if way.source == "floor":
            trainer.algorithm = replace(trainer.algorithm, prepare=floor)
        if way.source == "minibatch":
            limits_per_minibatch(trainer)
        trainer.algorithm = replace(trainer.algorithm, token_loss=self._counted(trainer.algorithm.token_loss))

    def _counted(self, token_loss: Callable[[Tokens, Any], TokenLoss]) -> Callable[[Tokens, Any], TokenLoss]:
        rule = m2po.Settings(variant="clip", m2_threshold=self.way.threshold)
        ppo = losses.get("grpo")

        def counted(tokens: Tokens, limits: Any) -> TokenLoss:
            with torch.no_grad():
                own = m2po.prepare(tokens.log_ratio_N, tokens.advantage_N, rule)
                published = int(m2po.token_loss(tokens, own).clipped_N.sum())
                fixed = ppo.prepare(tokens.log_ratio_N, tokens.advantage_N, ppo.settings())
                ranged = int(ppo.token_loss(tokens, fixed).clipped_N.sum())
            result = token_loss(tokens, own if self.way.source == "microbatch" else limits)
            found = (int(result.clipped_N.sum()), published, ranged, len(tokens.advantage_N))
            self.cut = {name: self.cut[name] + more for name, more in zip(self.cut, found, strict=True)}
            return result

        return counted

    def run(self) -> dict[str, Any]:
        found = super().run()
        tokens = self.cut.pop("tokens")
        return found | {f"cut_{name}": count / tokens for name, count in self.cut.items()} | {"area": area(found)}


def area(run: dict[str, Any]) -> float:
    """Under the curve, over its length: the mean height."""
    steps, values = zip(*run["curve"], strict=True)
    if steps[-1] == steps[0]:
        return float(values[0])
    return float(np.trapezoid(values, steps) / (steps[-1] - steps[0]))
