"""One step of supervised training: examples in, an updated policy and the step's figures out.

As a step of reinforcement learning (`step`), with the same rows, check of rows and optimizer; but without scoring, and
with cross entropy as the loss: the mean of -log p over the trained tokens of a minibatch, over all ranks
and micro-batches. Shape letter: N loss tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from astracli.rl.batch import MicroBatch
from astracli.rl.rows import Row
from astracli.rl.types import Group
from astracli.training import packing
from astracli.training.adam import learning_rate
from astracli.training.fsdp import free_gathered
from astracli.training.step import StepResult, Trainer
from astracli.training.sums import Sums, Timer


@dataclass(frozen=True)
class Targets:
    """Smoothed labels: a share of the targets is a token drawn uniformly from `among`. The draws follow from seed, step
    and the row's place in the batch, so they are the same for any number of ranks and any packing."""

    share: float
    among: Sequence[int]
    seed: int

    def of(self, micro: MicroBatch, step: int) -> np.ndarray:
        """int64 [N]: what each loss token of a micro-batch is trained towards."""
        target_N = micro.target_N
        if not micro.rows:
            return target_N
        among = np.asarray(self.among, np.int64)
        drawn, hit = [], []
        for row in micro.rows:
            draw = np.random.default_rng((self.seed, step, row.index))
            hit.append(draw.random(row.loss_tokens) < self.share)
            drawn.append(draw.choice(among, row.loss_tokens))
        return np.where(np.concatenate(hit), np.concatenate(drawn), target_N)


def train_on_examples(trainer: Trainer, groups: Sequence[Group], step: int, targets: Targets | None) -> StepResult:
    """Train on the step's examples. Raises RunFailed when rows leak or the gradient is not finite."""
    assert not trainer.masters.away
    timer, sums = Timer(trainer.ranks.device), Sums()
    rows = [Row(index, group, group.samples[0], 0.0) for index, group in enumerate(groups)]
    batch = trainer.divide(groups, step, rows)
    timer.lap("batch_s")
    metrics, _ = trainer.check_rows(batch, step)
    timer.lap("check_s")
    norms = []
    for micros, tokens in zip(batch.minibatches, batch.minibatch_tokens, strict=True):
        for micro in micros:
            towards = targets.of(micro, step) if targets is not None else None
            logprob_N, entropy_N = trainer.forward(trainer.policy, micro, towards)
            loss = -logprob_N.sum() / tokens
            sums.add("loss", loss)
            sums.add("entropy", entropy_N)
            timer.lap("forward_s")
            trainer.backward(loss, last=micro is micros[-1])
            timer.lap("backward_s")
        free_gathered(trainer.policy)
        norms.append(trainer.masters.update(step))
        timer.lap("optimizer_s")
    read = dict(zip(Sums.NAMES, trainer.ranks.sum(sums.read()), strict=True))
    metrics |= {
        "loss": read["loss"] / len(norms),
        "entropy": read["entropy"] / batch.loss_tokens,
        "tokens": float(batch.loss_tokens),
        "samples": float(len(rows)),
        "updates": float(len(norms)),
        "grad_norm": float(np.mean(norms)),
        "grad_norm_max": float(np.max(norms)),
        "lr": learning_rate(trainer.masters.table, step),
    }
    metrics |= packing.filled([micro for micros in batch.minibatches for micro in micros])
    seconds = timer.seconds()
    return StepResult(metrics | seconds | {"train_s": sum(seconds.values())}, batch)
