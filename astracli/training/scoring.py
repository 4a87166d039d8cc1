"""What a step learns of its batch before it trains on it: the passes without gradients, and the algorithm's limits.

Shape letter: N loss tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from astracli.kernels.upload import upload
from astracli.rl.batch import Batch, MicroBatch
from astracli.rl.losses import ClipLimits
from astracli.training import objective, parity
from astracli.training.fsdp import free_gathered
from astracli.training.sums import Sums, Timer

if TYPE_CHECKING:
    from astracli.training.step import Trainer


@dataclass
class Work:
    """A step's batch, and what is known of it before the first update."""

    batch: Batch
    version: int
    """Of the weights at the start of the step."""
    timer: Timer
    sums: Sums = field(default_factory=Sums)
    references: dict[int, Tensor] = field(default_factory=dict)
    """id of micro-batch -> the reference's log-probabilities [N]; empty without a reference."""
    teachers: dict[int, Tensor] = field(default_factory=dict)
    """id of micro-batch -> the teacher's log-probabilities [N]; empty without a teacher."""
    proximals: dict[int, Tensor] = field(default_factory=dict)
    """id of micro-batch -> log-probabilities [N] of the policy at the start of the step; empty without scoring."""
    kept: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    """id of micro-batch -> what its forward pass gave, with its graph."""
    limits: ClipLimits = field(init=False)
    first_measured: bool = False
    """The first minibatch is measured while it trains: it has not been scored."""

    @property
    def micros(self) -> list[MicroBatch]:
        return [micro for minibatch in self.batch.minibatches for micro in minibatch]


def score(trainer: Trainer, work: Work, *, first: bool) -> None:
    """All passes without gradients of a step; `first`: of this process."""
    _score_reference(trainer, work)
    _score_teacher(trainer, work)
    score_policy(trainer, work, *_plan(trainer, work, first=first))


@torch.no_grad()
def _score_reference(trainer: Trainer, work: Work) -> None:
    reference = trainer.reference
    moved_in: Callable[[], AbstractContextManager[None]] = nullcontext
    if trainer.adapters_off is not None:
        reference, moved_in = trainer.policy, trainer.adapters_off
    elif trainer.reference_offload is not None:
        moved_in = trainer.reference_offload.moved_in
    if reference is None:
        return
    with moved_in():
        work.references = {id(micro): trainer.forward(reference, micro)[0] for micro in work.micros}
    free_gathered(reference)


@torch.no_grad()
def _score_teacher(trainer: Trainer, work: Work) -> None:
    if (teacher := trainer.teacher) is None:
        return
    device = trainer.ranks.device
    work.teachers = {
        id(micro): parity.logprobs(teacher.policy, teacher.adapter, micro, device)[0] for micro in work.micros
    }
    free_gathered(teacher.policy)


def _plan(trainer: Trainer, work: Work, *, first: bool) -> tuple[list[MicroBatch], set[int]]:
    """(the micro-batches to score, in their order; ids of those whose graph is kept for the first update)

    Where limits do not come from log-ratios, the first minibatch is measured in its own forward passes, except in
    the first step of a process. Else its first micro-batch is scored last, with a graph that its backward pass
    uses: no other pass comes between, so this needs no more memory. In deterministic mode every batch is scored
    whole and in its order, and a resumed process does what one does that went on.
    """
    head, *others = work.batch.minibatches
    if trainer.recipe.launch.deterministic:
        alone = not trainer.ranks.wraps and trainer.ranks.device.type == "cpu"
        return work.micros, {id(head[0])} if alone and len(head) == 1 else set()
    later = [micro for minibatch in others for micro in minibatch]
    if not trainer.algorithm.limits_from_ratios and not first:
        work.first_measured = True
        return later, set()
    return [*later, *head[1:], head[0]], {id(head[0])}


@torch.no_grad()
def score_policy(trainer: Trainer, work: Work, micros: list[MicroBatch], kept: set[int]) -> None:
    """Measure these micro-batches, and take the algorithm's limits from them and from all other ranks' share."""
    ratios, cap = [torch.zeros(0, device=trainer.ranks.device)], trainer.recipe.algorithm.mismatch_cap
    for micro in micros:
        with torch.set_grad_enabled(id(micro) in kept):
            logprob_N, entropy_N = trainer.forward(trainer.policy, micro)
        if id(micro) in kept:
            work.kept[id(micro)] = logprob_N, entropy_N
        work.proximals[id(micro)] = logprob_N.detach()
        ratios.append(objective.moved(measure(trainer, work, micro, logprob_N, entropy_N), micro, work.version, cap))
    if work.first_measured:  # the limits are the same for any batch
        work.limits = trainer.algorithm.prepare(torch.zeros(0), torch.zeros(0), trainer.recipe.algorithm.own)
        return
    log_ratio_N = trainer.ranks.gather(torch.cat(ratios))
    advantage_N = trainer.ranks.gather(torch.from_numpy(np.concatenate([micro.advantage_N for micro in micros])))
    work.limits = trainer.algorithm.prepare(log_ratio_N, advantage_N, trainer.recipe.algorithm.own)


@torch.no_grad()
def measure(trainer: Trainer, work: Work, micro: MicroBatch, logprob_N: Tensor, entropy_N: Tensor) -> Tensor:
    """Add a micro-batch to the sums; returns its log-ratios [N]."""
    sums, reference_N = work.sums, work.references.get(id(micro))
    log_ratio_N = logprob_N - upload(micro.logprob_N, trainer.ranks.device)
    if not len(log_ratio_N):
        return log_ratio_N
    sums.add("ratio", log_ratio_N.exp())
    sums.add("entropy", entropy_N)
    if reference_N is not None:
        sums.add("kl", trainer.algorithm.kl(logprob_N, reference_N))
    if (teacher_N := work.teachers.get(id(micro))) is not None:
        sums.add("teacher", logprob_N - teacher_N)
    own_M = np.flatnonzero(micro.version_N == work.version)  # counted here: a device would have to be waited for
    every = len(own_M) == len(log_ratio_N)
    sums.own.add(log_ratio_N if every else log_ratio_N.index_select(0, upload(own_M, trainer.ranks.device)))
    return log_ratio_N
