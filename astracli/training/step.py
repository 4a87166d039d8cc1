"""One training step: a batch of groups in, an updated policy and the step's figures out.

1. One pass without gradients over the batch of all ranks: log-ratios to the behaviour policy, and from them the
   algorithm's limits (they hold for all minibatches), agreement with the engine, mean ratio, entropy, KL. The first
   minibatch trains from the same weights, so what this pass computes of it and that one would compute again is done
   once (`_plan_scoring`).
2. For each minibatch: forward and backward of its micro-batches, one clipped AdamW update.

When the engine disagrees, the run stops before an update is made from what it drew, at any step.

The loss of a minibatch runs over all ranks and micro-batches (`objective`). Shape letter: N loss tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import KW_ONLY, dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from astracli.config.recipe import Recipe
from astracli.kernels import varlen
from astracli.kernels.upload import upload
from astracli.models.adapter import ModelAdapter
from astracli.rl import losses
from astracli.rl.batch import Batch, Division, MicroBatch, build_batch, micro_batches
from astracli.rl.losses import ClipLimits
from astracli.rl.rows import Row
from astracli.rl.types import Group
from astracli.training import objective, packing, parity, shared_prompts
from astracli.training.adam import learning_rate
from astracli.training.agreement import CEILING, TIMES_NOISE
from astracli.training.cpu_offload import CpuOffload
from astracli.training.fsdp import Ranks, before_backward, free_gathered
from astracli.training.logprob import PolicyModel
from astracli.training.optimizer import Masters
from astracli.training.parity import RowCheck
from astracli.training.sums import Sums, Timer, figures


@dataclass
class StepResult:
    metrics: dict[str, float]
    batch: Batch


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
    limits: ClipLimits = field(init=False)
    first_measured: bool = False
    """The first minibatch is measured while it trains: it has not been scored."""

    @property
    def micros(self) -> list[MicroBatch]:
        return [micro for minibatch in self.batch.minibatches for micro in minibatch]


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
        self._kept: dict[int, tuple[Tensor, Tensor]] = {}
        """id of micro-batch -> what its forward pass gave, with its graph."""

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
        self._score_reference(work)
        self._score_teacher(work)
        self._score(work, self._plan_scoring(work, first=first))
        timer.lap("score_s")
        if not work.first_measured:
            self.require_agreement(work)
        norms = [self._minibatch(work, index, step) for index in range(len(batch.minibatches))]
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
                self._kept = {}  # under FSDP no other pass may come between a forward pass and its backward pass
            (work.sums.noise,) = self.ranks.max([self.row_check.logprob_noise(rows)])
            self._noise_allows = min(CEILING, TIMES_NOISE * work.sums.noise)
        own.require(asked or max(tolerance, self._noise_allows), work.version)

    # pass 1

    @torch.no_grad()
    def _score_reference(self, work: Work) -> None:
        reference = self.reference
        moved_in: Callable[[], AbstractContextManager[None]] = nullcontext
        if self.adapters_off is not None:
            reference, moved_in = self.policy, self.adapters_off
        elif self.reference_offload is not None:
            moved_in = self.reference_offload.moved_in
        if reference is None:
            return
        with moved_in():
            work.references = {id(micro): self.forward(reference, micro)[0] for micro in work.micros}
        free_gathered(reference)

    @torch.no_grad()
    def _score_teacher(self, work: Work) -> None:
        if (teacher := self.teacher) is None:
            return
        device = self.ranks.device
        work.teachers = {
            id(micro): parity.logprobs(teacher.policy, teacher.adapter, micro, device)[0] for micro in work.micros
        }
        free_gathered(teacher.policy)

    def _plan_scoring(self, work: Work, *, first: bool) -> tuple[list[MicroBatch], set[int]]:
        """(the micro-batches to score, in their order; ids of those whose graph is kept for the first update)

        Where limits do not come from log-ratios, the first minibatch is measured in its own forward passes, except in
        the first step of a process. Else its first micro-batch is scored last, with a graph that its backward pass
        uses: no other pass comes between, so this needs no more memory. In deterministic mode every batch is scored
        whole and in its order, and a resumed process does what one does that went on.
        """
        head, *others = work.batch.minibatches
        if self.recipe.launch.deterministic:
            alone = not self.ranks.wraps and self.ranks.device.type == "cpu"
            return work.micros, {id(head[0])} if alone and len(head) == 1 else set()
        later = [micro for minibatch in others for micro in minibatch]
        if not self.algorithm.limits_from_ratios and not first:
            work.first_measured = True
            return later, set()
        return [*later, *head[1:], head[0]], {id(head[0])}

    @torch.no_grad()
    def _score(self, work: Work, chosen: tuple[list[MicroBatch], set[int]]) -> None:
        """Measure these micro-batches, and take the algorithm's limits from them and from all other ranks' share."""
        ratios, cap, (micros, kept) = (
            [torch.zeros(0, device=self.ranks.device)],
            self.recipe.algorithm.mismatch_cap,
            chosen,
        )
        self._kept = {}
        for micro in micros:
            with torch.set_grad_enabled(id(micro) in kept):
                logprob_N, entropy_N = self.forward(self.policy, micro)
            if id(micro) in kept:
                self._kept[id(micro)] = logprob_N, entropy_N
            work.proximals[id(micro)] = logprob_N.detach()
            ratios.append(objective.moved(self._measure(work, micro, logprob_N, entropy_N), micro, work.version, cap))
        if work.first_measured:  # the limits are the same for any batch
            work.limits = self.algorithm.prepare(torch.zeros(0), torch.zeros(0), self.recipe.algorithm.own)
            return
        log_ratio_N = self.ranks.gather(torch.cat(ratios))
        advantage_N = self.ranks.gather(torch.from_numpy(np.concatenate([micro.advantage_N for micro in micros])))
        work.limits = self.algorithm.prepare(log_ratio_N, advantage_N, self.recipe.algorithm.own)

    @torch.no_grad()
    def _measure(self, work: Work, micro: MicroBatch, logprob_N: Tensor, entropy_N: Tensor) -> Tensor:
        """Add a micro-batch to the sums; returns its log-ratios [N]."""
        sums, reference_N = work.sums, work.references.get(id(micro))
        log_ratio_N = logprob_N - upload(micro.logprob_N, self.ranks.device)
        if not len(log_ratio_N):
            return log_ratio_N
        sums.add("ratio", log_ratio_N.exp())
        sums.add("entropy", entropy_N)
        if reference_N is not None:
            sums.add("kl", self.algorithm.kl(logprob_N, reference_N))
        if (teacher_N := work.teachers.get(id(micro))) is not None:
            sums.add("teacher", logprob_N - teacher_N)
        own_M = np.flatnonzero(micro.version_N == work.version)  # counted here: a device would have to be waited for
        every = len(own_M) == len(log_ratio_N)
        sums.own.add(log_ratio_N if every else log_ratio_N.index_select(0, upload(own_M, self.ranks.device)))
        return log_ratio_N

    # pass 2

    def _minibatch(self, work: Work, index: int, step: int) -> float:
        """Forward, backward and update of one minibatch; returns the gradient norm before clipping.

        What was not scored is measured and judged here, before the update.
        """
        measure = index == 0 and work.first_measured
        normaliser, table, sums = self.algorithm.normaliser, self.recipe.algorithm, work.sums
        divisor = objective.denominator(normaliser, work.batch, index, self.recipe)
        micros = work.batch.minibatches[index]
        for micro in micros:
            kept = self._kept.pop(id(micro)) if id(micro) in self._kept else None
            logprob_N, entropy_N = kept or self.forward(self.policy, micro)
            proximal_N, reference_N = work.proximals.get(id(micro)), work.references.get(id(micro))
            if measure:
                self._measure(work, micro, logprob_N.detach(), entropy_N)
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
