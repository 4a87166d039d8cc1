"""One training step: a batch of groups in, an updated policy and the step's figures out.

1. One pass without gradients over the batch of all ranks (`scoring`): log-ratios to the behaviour policy, and from them
   the algorithm's limits (they hold for all minibatches), agreement with the engine, mean ratio, entropy, KL. The first
   minibatch trains from the same weights, so what this pass computes of it and that one would compute again is done
   once.
2. For each minibatch: forward and backward of its micro-batches, one clipped AdamW update.

When the engine disagrees, the run stops before an update is made from what it drew, at any step.

The loss of a minibatch runs over all ranks and micro-batches (`objective`). Shape letter: N loss tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import KW_ONLY, dataclass, replace

import numpy as np
import torch
from torch import Tensor

from astracli.config.recipe import Recipe
from astracli.kernels import varlen
from astracli.models.adapter import ModelAdapter
from astracli.rl import losses
from astracli.rl.batch import Batch, Division, MicroBatch, build_batch, micro_batches
from astracli.rl.rows import Row
from astracli.rl.types import Group
from astracli.training import objective, packing, parity, scoring, shared_prompts
from astracli.training.adam import learning_rate
from astracli.training.agreement import CEILING, TIMES_NOISE
from astracli.training.cpu_offload import CpuOffload
from astracli.training.fsdp import Ranks, before_backward, free_gathered
from astracli.training.logprob import PolicyModel
from astracli.training.optimizer import Masters
from astracli.training.parity import RowCheck
from astracli.training.scoring import Work
from astracli.training.sums import Timer, figures


@dataclass
class StepResult:
    metrics: dict[str, float]
    batch: Batch


@dataclass(frozen=True)
class Teacher:
    """A frozen model whose log-probabilities the algorithm needs; of any family."""

    policy: PolicyModel
    adapter: ModelAdapter


@dataclass(eq=False)
class Trainer:
    """The policy, its optimizer and an optional reference; `train` advances them by one step."""

    policy: PolicyModel
    masters: Masters
    adapter: ModelAdapter
    recipe: Recipe
    ranks: Ranks
    _: KW_ONLY
    reference: PolicyModel | None = None
    reference_offload: CpuOffload | None = None
    adapters_off: Callable[[], AbstractContextManager[None]] | None = None
    """Makes the policy its own reference for a while: then there is no second model."""
    teacher: Teacher | None = None
    pad_token: int = 0
    packed: bool = False
    share_above: float | None = None
    """A batch shares its prompts where that leaves out more than this part of its tokens; None: never."""
    bf16_engine: bool = False
    """Whether the engine computes in bf16, whatever this trainer computes in."""

    def __post_init__(self) -> None:
        self.algorithm = losses.get(self.recipe.algorithm.name)
        if self.ranks.divides_optimizer:
            self.masters.reduction.watch(self.adapter.blocks(self.policy.model), self.masters.parameters)
        self.row_check = RowCheck(self.policy, self.adapter, self.masters, self.packed, self.pad_token)
        self.ablation = self.packed and self.recipe.train.row_boundaries == "ignored"
        """Rows leak because the recipe says so: the checks measure and do not stop."""
        self._noise_allows = 0.0
        self.first_step = True
        self._teacher_offload: CpuOffload | None = None

    def train(self, groups: Sequence[Group], step: int, version: int) -> StepResult:
        """Train on the step's batch; the policy holds weight `version` before and `version + 1` after.

        Raises RunFailed when rows leak, the engine disagrees or the gradient is not finite, ValueError on a batch
        without tokens.
        """
        assert not self.masters.away
        timer = Timer(self.ranks.device)
        batch = self.divide(groups, step)
        self.switch(packed=self.shares(batch))
        timer.lap("batch_s")
        metrics, first = self.check_rows(batch, step)
        timer.lap("check_s")
        stale_mean, stale_max = batch.staleness(version)
        work = Work(batch, version, timer)
        scoring.score(self, work, first=first)
        timer.lap("score_s")
        if not work.first_measured:
            self.require_agreement(work)
        norms = [self.minibatch(work, index, step) for index in range(len(batch.minibatches))]
        metrics |= figures(self.recipe, self.ranks, batch, work.sums, len(norms), referenced=bool(work.references))
        metrics |= {
            "grad_norm": float(np.mean(norms)),
            "grad_norm_max": float(np.max(norms)),
            "lr": learning_rate(self.masters.table, step),
            "m2_limit": work.limits.cap,
            "staleness_mean": stale_mean,
            "staleness_max": float(stale_max),
        }
        metrics |= packing.filled(work.micros)
        seconds = timer.seconds()
        return StepResult(metrics | seconds | {"train_s": sum(seconds.values())}, batch)

    def to_host(self) -> None:
        """Leave the device to others between two steps: nothing of this trainer stays on it but the CUDA context."""
        free_gathered(self.policy)
        self.masters.to_host()
        if self.reference is not None:
            if self.reference_offload is None:
                self.reference_offload = CpuOffload(self.reference.parameters(), constant=True)
            self.reference_offload.to_host()
        if self.teacher is not None:
            if self._teacher_offload is None:
                self._teacher_offload = CpuOffload(self.teacher.policy.parameters(), constant=True)
            self._teacher_offload.to_host()
        if self.ranks.device.type == "cuda":
            torch.cuda.empty_cache()

    def to_device(self) -> None:
        """Take the device again after `to_host`."""
        self.masters.to_device()
        if self._teacher_offload is not None:
            self._teacher_offload.to_device()

    def divide(self, groups: Sequence[Group], step: int, rows: Sequence[Row] | None = None) -> Batch:
        """This rank's minibatches and micro-batches of a step's groups. `rows`: where they are made already."""
        return build_batch(
            groups,
            self.recipe,
            step=step,
            rows=rows,
            pad_token=self.pad_token,
            rank=self.ranks.rank,
            world_size=self.ranks.world_size,
            divide_rows=packing.micro_batches if self.packed else micro_batches,
            instead=self._shared if self.share_above is not None else None,
        )

    def _shared(self, rows: Sequence[Row]) -> Division | None:
        assert self.share_above is not None
        return shared_prompts.division(rows, self.share_above)

    def shares(self, batch: Batch) -> bool:
        """Whether samples share prompts in this batch."""
        return self.share_above is not None and self._shared(batch.rows) is not None

    def switch(self, *, packed: bool) -> None:
        """Where not every batch is packed: every model computes this kind of rows from here on."""
        if self.share_above is not None and not self.packed:
            policies = [self.policy, *([self.reference] if self.reference is not None else [])]
            policies += [self.teacher.policy] if self.teacher is not None else []
            for policy in policies:
                varlen.switch(policy.model, packed=packed)

    def forward(
        self, policy: PolicyModel, micro: MicroBatch, target_N: np.ndarray | None = None
    ) -> tuple[Tensor, Tensor]:
        """Log-probabilities and entropies [N] of a micro-batch by the policy or the reference. `target_N`: of these
        tokens in the place of its own."""
        return parity.logprobs(policy, self.adapter, micro, self.ranks.device, target_N)

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """The backward pass of a minibatch's micro-batch, or of its `last`, in which gradients of all ranks may already
        be summed."""
        before_backward(self.policy, self.ranks, last=last)
        self.masters.reduction.before_backward(last=last)
        (loss * self.ranks.loss_factor).backward()

    # checks

    def check_rows(self, batch: Batch, step: int) -> tuple[dict[str, float], bool]:
        """(figures of the check of rows, {} where none is due; whether this is the first step of the process). Raises
        RunFailed when rows leak."""
        first, self.first_step = self.first_step, False
        due = first or step % self.recipe.train.rows_check_every == 0
        return self._check_rows(batch, first=first) if due else {}, first

    def _check_rows(self, batch: Batch, *, first: bool) -> dict[str, float]:
        """How far rows joined and rows alone differ. Raises RunFailed when they do, unless the recipe wants that."""
        chosen = parity.spread(batch.rows, self.recipe.train.tokens_per_microbatch)
        checked = self.row_check
        if self.shares(batch):
            chosen = shared_prompts.some(batch.rows, chosen, self.recipe.train.tokens_per_microbatch)
            checked = replace(checked, shared=True)
        in_bf16 = self.ranks.device.type != "cpu"
        found = checked.logprob_figures(chosen, in_bf16=in_bf16)
        if not self.ablation:
            checked.require(found)
        found |= checked.gradient_figures(chosen, in_bf16=in_bf16)
        if first and not self.ablation:  # later they are small: the policy draws its tokens itself
            checked.require(found)
        return found

    def require_agreement(self, work: Work) -> None:
        """Raise RunFailed when the engine that drew this version's tokens holds other weights. A collective.

        An engine in bf16 may differ by what rounding does to this model, where that is more than the adapter's
        tolerance. A tolerance of the recipe is final; the noise is then only reported.
        """
        own = work.sums.own = work.sums.own.over(self.ranks)
        if self.ablation:
            return
        asked, known = self.recipe.train.parity_tolerance, self.adapter.parity_tolerance
        tolerance = known["cuda" if self.bf16_engine else "cpu"]
        if self.bf16_engine and not own.within(max(tolerance, self._noise_allows)):
            rows = parity.spread(work.batch.rows, self.recipe.train.tokens_per_microbatch)
            if self.ranks.wraps:
                work.kept.clear()  # under FSDP no other pass may come between a forward pass and its backward pass
            (work.sums.noise,) = self.ranks.max([self.row_check.logprob_noise(rows)])
            self._noise_allows = min(CEILING, TIMES_NOISE * work.sums.noise)
        own.require(asked or max(tolerance, self._noise_allows), work.version)

    def minibatch(self, work: Work, index: int, step: int) -> float:
        """Forward, backward and update of one minibatch; returns the gradient norm before clipping.

        What was not scored is measured and judged here, before the update.
        """
        measure = index == 0 and work.first_measured
        normaliser, table, sums = self.algorithm.normaliser, self.recipe.algorithm, work.sums
        divisor = objective.denominator(normaliser, work.batch, index, self.recipe)
        micros = work.batch.minibatches[index]
        for micro in micros:
            kept = work.kept.pop(id(micro), None)
            logprob_N, entropy_N = kept or self.forward(self.policy, micro)
            proximal_N, reference_N = work.proximals.get(id(micro)), work.references.get(id(micro))
            if measure:
                scoring.measure(self, work, micro, logprob_N.detach(), entropy_N)
            result, mismatched_N = objective.token_losses(
                self.algorithm,
                micro,
                logprob_N,
                proximal_N,
                work.limits,
                teacher_N=work.teachers.get(id(micro)),
                version=work.version,
                cap=table.mismatch_cap,
            )
            loss_N = result.loss_N
            if reference_N is not None:
                loss_N = loss_N + table.kl_coef * self.algorithm.kl(logprob_N, reference_N)
            loss = objective.normalised(normaliser, loss_N, micro, divisor)
            sums.add("loss", loss)
            sums.add("clipped", result.clipped_N)
            for name, over_N in (("capped", result.capped_N), ("mismatched", mismatched_N)):
                if over_N is not None:
                    sums.add(name, over_N)
            work.timer.lap("forward_s")
            self.backward(loss, last=micro is micros[-1])
            work.timer.lap("backward_s")
        if measure:
            self.require_agreement(work)
        free_gathered(self.policy)  # a check may have gathered weights that the update changes
        norm = self.masters.update(step)
        work.timer.lap("optimizer_s")
        return norm
