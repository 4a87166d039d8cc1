"""One training step: a batch of groups in, an updated policy and the step's figures out.

1. One pass without gradients over the batch of all ranks: log-ratios to the behaviour policy, from them the
   algorithm's limits (they hold for all minibatches), agreement with the engine, mean ratio, entropy, KL. Left out when
   it could say nothing new: one minibatch, nothing stale, not the first batch of the process, and an algorithm whose
   limits do not come from log-ratios.
2. Per minibatch: forward and backward of its micro-batches, one clipped AdamW update.

An engine that disagrees stops the run at any step before an update is made from what it drew.

The loss of a minibatch runs over all ranks and micro-batches (`objective`). Shape letter: N loss tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from astracli.config.recipe import Recipe
from astracli.kernels.upload import upload
from astracli.models.adapter import ModelAdapter
from astracli.rl import losses
from astracli.rl.batch import Batch, MicroBatch, build_batch
from astracli.rl.losses import ClipLimits
from astracli.rl.losses.kl import k3
from astracli.rl.types import Group
from astracli.training import objective, packing, parity
from astracli.training.adam import learning_rate
from astracli.training.agreement import CEILING, TIMES_NOISE
from astracli.training.cpu_offload import CpuOffload
from astracli.training.fsdp import Ranks, gather_no_more
from astracli.training.logprob import PolicyModel
from astracli.training.optimizer import Masters
from astracli.training.sums import Sums, Timer, figures


@dataclass
class StepResult:
    metrics: dict[str, float]
    batch: Batch


class Trainer:
    """The policy, its optimizer and an optional reference; `train` advances them by one step."""

    def __init__(
        self,
        policy: PolicyModel,
        masters: Masters,
        adapter: ModelAdapter,
        recipe: Recipe,
        ranks: Ranks,
        *,
        reference: PolicyModel | None = None,
        reference_offload: CpuOffload | None = None,
        pad_token: int = 0,
        packed: bool = False,
        bf16_engine: bool = False,
    ):
        """`bf16_engine`: what draws the tokens computes in bf16, whatever this trainer computes in."""
        self.policy = policy
        self.masters = masters
        self.adapter = adapter
        self.recipe = recipe
        self.ranks = ranks
        self.reference = reference
        self.reference_offload = reference_offload
        self.pad_token = pad_token
        self.packed = packed
        self.algorithm = losses.get(recipe.algorithm.name)
        self.ablation = packed and recipe.train.row_boundaries == "ignored"
        """Rows leak because the recipe says so: the checks measure and do not stop."""
        self.bf16_engine = bf16_engine
        self._noise_allows = 0.0
        self._first = True
        self._rows_checked = False
        self._kept: tuple[Tensor, Tensor] | None = None

    def train(self, groups: Sequence[Group], step: int, version: int) -> StepResult:
        """Train on the step's batch; the policy holds weight `version` before and `version + 1` after.

        Raises RunFailed when rows leak, the engine disagrees or the gradient is not finite, ValueError on a batch
        without tokens.
        """
        assert not self.masters.away
        timer = Timer(self.ranks.device)
        batch = self._divide(groups, step)
        timer.lap("batch_s")
        metrics = self._check_rows(batch, step)
        timer.lap("check_s")
        stale_mean, stale_max = batch.staleness(version)
        single_fresh = len(batch.minibatches) == 1 and stale_max == 0 and np.all(batch.versions == version)
        sums = Sums()
        references = self._reference_logprobs(batch)
        # What is done only in a process's first step must not change what a resumed run computes.
        always = self.recipe.launch.deterministic or self.algorithm.limits_from_ratios
        score = always or not single_fresh or self._first
        self._first = False
        proximals: dict[int, Tensor] = {}
        limits = self._score(batch, version, references, proximals, sums) if score else self._fixed_limits()
        timer.lap("score_s")
        if score:
            self._require_agreement(batch, sums, version)
        norms = [
            self._minibatch(batch, index, step, version, limits, references, proximals, sums, timer, measure=not score)
            for index in range(len(batch.minibatches))
        ]
        metrics |= figures(self.recipe, self.ranks, batch, sums, len(norms), referenced=self.reference is not None)
        metrics |= {
            "grad_norm": float(np.mean(norms)),
            "grad_norm_max": float(np.max(norms)),
            "lr": learning_rate(self.masters.table, step),
            "m2_limit": limits.cap,
            "staleness_mean": stale_mean,
            "staleness_max": float(stale_max),
        }
        seconds = timer.seconds()
        metrics |= seconds
        metrics["train_s"] = sum(seconds.values())
        return StepResult(metrics, batch)

    def to_host(self) -> None:
        """Leave the device to others between two steps: nothing of this trainer stays on it but the CUDA context."""
        gather_no_more(self.policy)
        self.masters.to_host()
        if self.reference is not None:
            if self.reference_offload is None:
                self.reference_offload = CpuOffload(self.reference.parameters(), constant=True)
            self.reference_offload.to_host()
        if self.ranks.device.type == "cuda":
            torch.cuda.empty_cache()

    def to_device(self) -> None:
        """Take the device again after `to_host`."""
        self.masters.to_device()

    def _divide(self, groups: Sequence[Group], step: int) -> Batch:
        table = self.recipe.train
        return build_batch(
            groups,
            step=step,
            seed=self.recipe.seed,
            algorithm=self.recipe.algorithm,
            minibatches=table.minibatches,
            tokens_per_microbatch=table.tokens_per_microbatch,
            rollout=self.recipe.rollout,
            pad_token=self.pad_token,
            rank=self.ranks.rank,
            world_size=self.ranks.world_size,
            divide_rows=packing.dividers(self.packed)[0],
        )

    def _forward(self, policy: PolicyModel, micro: MicroBatch) -> tuple[Tensor, Tensor]:
        return parity.logprobs(policy, self.adapter, micro, self.ranks.device)

    def _on_device(self, array: np.ndarray) -> Tensor:
        return upload(array, self.ranks.device)

    # checks

    def _check_rows(self, batch: Batch, step: int) -> dict[str, float]:
        """Measured figures; raises RunFailed where they are wrong, unless the recipe wants them wrong."""
        if self._rows_checked and step % self.recipe.train.rows_check_every:
            return {}
        chosen = parity.spread(batch.rows, self.recipe.train.tokens_per_microbatch)
        _, join = packing.dividers(self.packed)
        device = self.ranks.device
        difference = parity.rows_against_separate(
            self.policy, self.adapter, chosen, device, join=join, pad_token=self.pad_token
        )
        if not self.ablation:
            parity.require_rows(difference, device, self.adapter, self.packed)
        found = {"rows_max_abs": difference} | parity.gradient_figures(
            self.policy,
            self.adapter,
            chosen,
            self.masters,
            join=join,
            pad_token=self.pad_token,
            in_bf16=device.type != "cpu",
        )
        if not self.ablation and not self._rows_checked:  # later it is small: tokens that the policy drew itself
            parity.require_gradients(found, device, self.adapter, self.packed)
        self._rows_checked = True
        return found

    def _require_agreement(self, batch: Batch, sums: Sums, version: int) -> None:
        """Raise RunFailed when the engine that drew this version's tokens holds other weights. A collective.

        An engine in bf16 may be away by what rounding does to this model, where that is more than the adapter's
        tolerance; a tolerance of the recipe is final, and the noise is told beside the difference.
        """
        sums.own = sums.own.over(self.ranks)
        if self.ablation:
            return
        asked, known = self.recipe.train.parity_tolerance, self.adapter.parity_tolerance
        tolerance = known["cuda" if self.bf16_engine else "cpu"]
        if self.bf16_engine and not sums.own.within(max(tolerance, self._noise_allows)):
            rows = parity.spread(batch.rows, self.recipe.train.tokens_per_microbatch)
            noise = parity.logprob_noise(self.policy, self.adapter, rows, self.ranks.device, pad_token=self.pad_token)
            (sums.noise,) = self.ranks.max([noise])
            self._noise_allows = min(CEILING, TIMES_NOISE * sums.noise)
        sums.own.require(asked or max(tolerance, self._noise_allows), version)

    # pass 1

    @torch.no_grad()
    def _reference_logprobs(self, batch: Batch) -> dict[int, Tensor]:
        """id of micro-batch -> the reference's log-probabilities [N]; empty without a reference."""
        if self.reference is None:
            return {}
        micros = [micro for minibatch in batch.minibatches for micro in minibatch]
        with self.reference_offload.moved_in() if self.reference_offload is not None else nullcontext():
            found = {id(micro): self._forward(self.reference, micro)[0] for micro in micros}
        gather_no_more(self.reference)
        return found

    @torch.no_grad()
    def _score(
        self, batch: Batch, version: int, references: dict[int, Tensor], proximals: dict[int, Tensor], sums: Sums
    ) -> ClipLimits:
        """Measure the whole batch, and take the algorithm's limits from it and from all other ranks' share.

        `proximals` is filled: id of micro-batch -> log-probabilities [N] of the policy at the start of the step.
        """
        ratios = []
        self._kept, reused = None, self._reused(batch)
        for minibatch in batch.minibatches:
            for micro in minibatch:
                with torch.set_grad_enabled(micro is reused):
                    logprob_N, entropy_N = self._forward(self.policy, micro)
                if micro is reused:
                    self._kept = logprob_N, entropy_N
                proximals[id(micro)] = logprob_N.detach()
                log_ratio_N = self._measure(micro, version, logprob_N, entropy_N, references.get(id(micro)), sums)
                ratios.append(objective.moved(log_ratio_N, micro, version, self.recipe.algorithm))
        log_ratio_N = self.ranks.gather(torch.cat(ratios))
        advantages = [micro.advantage_N for minibatch in batch.minibatches for micro in minibatch]
        advantage_N = self.ranks.gather(torch.from_numpy(np.concatenate(advantages)))
        return self.algorithm.prepare(log_ratio_N, advantage_N, self.recipe.algorithm)

    def _reused(self, batch: Batch) -> MicroBatch | None:
        """The micro-batch whose scoring serves the first update too: the weights are the same, so one forward less.

        Its graph lives while the rest is scored, so it must be all of the first minibatch, and memory plentiful: not on
        a GPU, and not sharded, where a forward of another micro-batch may not come between forward and backward.
        """
        first = batch.minibatches[0]
        alone = self.ranks.mesh is None and self.ranks.device.type == "cpu"
        return first[0] if alone and len(first) == 1 else None

    def _fixed_limits(self) -> ClipLimits:
        """Of an algorithm that does not look at the batch for them."""
        assert not self.algorithm.limits_from_ratios
        return self.algorithm.prepare(torch.zeros(0), torch.zeros(0), self.recipe.algorithm)

    @torch.no_grad()
    def _measure(
        self,
        micro: MicroBatch,
        version: int,
        logprob_N: Tensor,
        entropy_N: Tensor,
        reference_N: Tensor | None,
        sums: Sums,
    ) -> Tensor:
        """Add a micro-batch to the sums; returns its log-ratios [N]."""
        log_ratio_N = logprob_N - self._on_device(micro.logprob_N)
        if not len(log_ratio_N):
            return log_ratio_N
        sums.add("ratio", log_ratio_N.exp())
        sums.add("entropy", entropy_N)
        if reference_N is not None:
            sums.add("kl", k3(logprob_N, reference_N))
        own_M = np.flatnonzero(micro.version_N == version)  # counted here: a device would have to be waited for
        every = len(own_M) == len(log_ratio_N)
        sums.own.add(log_ratio_N if every else log_ratio_N.index_select(0, self._on_device(own_M)))
        return log_ratio_N

    # pass 2

    def _minibatch(
        self,
        batch: Batch,
        index: int,
        step: int,
        version: int,
        limits: ClipLimits,
        references: dict[int, Tensor],
        proximals: dict[int, Tensor],
        sums: Sums,
        timer: Timer,
        *,
        measure: bool,
    ) -> float:
        """Forward, backward and update of one minibatch; returns the gradient norm before clipping.

        `measure`: there was no pass without gradients, so this forward is what is measured and judged.
        """
        normaliser = self.algorithm.normaliser
        divisor = objective.denominator(normaliser, batch, index, self.recipe)
        for micro in batch.minibatches[index]:
            kept, self._kept = self._kept, None
            logprob_N, entropy_N = kept or self._forward(self.policy, micro)
            reference_N = references.get(id(micro))
            if measure:
                self._measure(micro, version, logprob_N.detach(), entropy_N, reference_N, sums)
            result, mismatched_N = objective.step_losses(
                self.algorithm, self.recipe.algorithm, micro, logprob_N, proximals.get(id(micro)), limits, version
            )
            loss_N = result.loss_N
            if reference_N is not None:
                loss_N = loss_N + self.recipe.algorithm.kl_coef * k3(logprob_N, reference_N)
            loss = objective.normalised(normaliser, loss_N, micro, divisor)
            sums.add("loss", loss)
            sums.add("clipped", result.clipped_N)
            for name, over_N in (("capped", result.capped_N), ("mismatched", mismatched_N)):
                if over_N is not None:
                    sums.add(name, over_N)
            timer.lap("forward_s")
            # sharding averages gradients over ranks, the divisor already counts all of them
            (loss * self.ranks.world_size).backward()
            timer.lap("backward_s")
        if measure:
            self._require_agreement(batch, sums, version)
        norm = self.masters.update(step)
        timer.lap("optimizer_s")
        return norm
