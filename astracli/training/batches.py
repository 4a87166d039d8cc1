"""Where a trainer's batches come from: rollouts, by the hub, or examples of a data set; and how each is trained on.

A *source* is all that tells reinforcement learning and supervised training apart in the loop of a rank (`loop`).
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Protocol

import numpy as np

from astracli.data.examples import Example, ExampleTokens
from astracli.data.prompts import Problem, PromptSource
from astracli.errors import RunFailed, UserError
from astracli.hub.client import HubClient
from astracli.hub.types import Batch, HubState, NextBatch
from astracli.hub.wire import MSGPACK, pack_answer, unpack_answer
from astracli.models.adapter import load_tokenizer
from astracli.process.config import TrainerConfig
from astracli.process.worker import Reporter
from astracli.rl.sample_log import write_samples
from astracli.rl.types import Group, Sample, Segment, unpack_group
from astracli.training import step_figures
from astracli.training.fsdp import Ranks
from astracli.training.step import StepResult, Trainer
from astracli.training.supervised import Targets, train_on_examples

BATCH_WAIT_S = 5.0
"""One long poll for a batch; between two, a stop is noticed."""
LOOK_S = 0.2
_GO, _STOP, _SAVE = b"1", b"0", b"2"


class Source(Protocol):
    saves: bool
    """The last `receive` ended because a checkpoint was asked for, on every rank."""

    def receive(self, step: int, check: Callable[[], None]) -> tuple[list[Group], dict[str, float]] | None:
        """The groups of a step, on every rank, and figures of what arrived for it; None on a stop. A collective.
        `check` raises what went wrong beside the loop while it waits."""
        ...

    def train(self, trainer: Trainer, groups: list[Group], step: int) -> StepResult:
        """One step."""
        ...

    def publishes(self, version: int, *, first: bool = False) -> bool:
        """Whether engines get this version. `first`: it is the one that this process begins with."""
        ...

    def before_publishing(self) -> None:
        """Wait for what must come before the next version is announced."""
        ...


def of(config: TrainerConfig, reporter: Reporter, ranks: Ranks, hub: HubClient | None) -> Source:
    """The source of a run's recipe."""
    kind = Rollouts if config.recipe.sft is None else Examples
    return kind(config, reporter, ranks, hub)


class Rollouts:
    """Groups that the rollout workers have handed in. Rank 0 asks the hub."""

    saves = False

    def __init__(self, config: TrainerConfig, reporter: Reporter, ranks: Ranks, hub: HubClient | None):
        self._config, self._recipe, self._reporter, self._ranks, self._hub = (
            config, config.recipe, reporter, ranks, hub,
        )  # fmt: skip

    def receive(self, step: int, check: Callable[[], None]) -> tuple[list[Group], dict[str, float]] | None:
        if self._hub is None:
            self._reporter.waiting("waiting for the first rank's batch")
        message = None
        if self._hub is not None:
            batch = self._poll(self._hub, step, check)
            message = pack_answer(NextBatch(batch, save=batch is None and self._reporter.save_requested.is_set()))[0]
        reply: NextBatch = unpack_answer(NextBatch, self._ranks.broadcast(message), MSGPACK, "the first rank")
        self._reporter.waiting(None)
        self.saves = reply.save
        if reply.batch is None:
            return None
        stats = step_figures.arrived(reply.batch, replays=bool(self._recipe.train.replay_ratio))
        try:
            return [unpack_group(blob) for blob in reply.batch.groups], stats
        except ValueError as error:
            raise RunFailed(
                f"a group of step {step} is damaged in hub.sqlite: {error}",
                "start a new run from its weights: `astra train --from RUN_DIR`",
            ) from None

    def _poll(self, hub: HubClient, step: int, check: Callable[[], None]) -> Batch | None:
        """This step's batch; None on a stop."""
        while not (self._reporter.stop_requested.is_set() or self._reporter.save_requested.is_set()):
            reply: NextBatch = hub.batch(step, wait_s=BATCH_WAIT_S)
            if reply.batch is not None:
                return reply.batch
            check()
            self._reporter.waiting(reply.wait)
        return None

    def train(self, trainer: Trainer, groups: list[Group], step: int) -> StepResult:
        result = trainer.train(groups, step, step)
        if self._hub is not None:
            count = self._recipe.metrics.samples_per_step
            write_samples(self._config.run_dir / "samples", result.batch, step, self._recipe.seed, count)
        return result

    def publishes(self, version: int, *, first: bool = False) -> bool:
        return True

    def before_publishing(self) -> None:
        return


class Examples:
    """Examples of a data set in their seeded order, a new one each epoch. The step alone says which they are, so every
    rank reads them itself, and a resumed run goes on with the same ones."""

    saves = False

    def __init__(self, config: TrainerConfig, reporter: Reporter, ranks: Ranks, hub: HubClient | None):
        recipe = config.recipe
        assert recipe.sft is not None
        self._recipe, self._reporter, self._ranks, self._hub = recipe, reporter, ranks, hub
        self._serves = bool(config.engines)
        self._source = PromptSource(recipe.training_data, recipe.seed, config.data_paths)
        self._tokens = ExampleTokens(recipe, load_tokenizer(config.model_path))
        smoothing = recipe.sft.label_smoothing
        self._targets = Targets(smoothing, self._tokens.writable, recipe.seed) if smoothing else None
        self._longest = recipe.rollout.context_length

    def receive(self, step: int, check: Callable[[], None]) -> tuple[list[Group], dict[str, float]] | None:
        check()
        said = None if not self._ranks.first else self._asked()
        if self._ranks.world_size > 1:
            said = self._ranks.broadcast(said)
        self.saves = said == _SAVE
        if said != _GO:
            return None
        size = self._recipe.train.batch_groups
        places = range(step * size, (step + 1) * size)
        try:
            problems = [(place, self._source.problem(place)) for place in places]
            found = [(place, problem, self._tokens(problem)) for place, problem in problems]
        except UserError as error:
            raise RunFailed(error.message, error.hint) from None
        fit = [group_of(place, problem, one) for place, problem, one in found if len(one) <= self._longest]
        if not fit:
            raise RunFailed(
                f"none of the {size} examples of step {step} fits into {self._longest} tokens",
                "raise rollout.context_length, or train on shorter examples",
            )
        return fit, {"epoch": (step + 1) * size / len(self._source), "too_long": float(size - len(fit))}

    def _asked(self) -> bytes:
        if self._reporter.stop_requested.is_set():
            return _STOP
        return _SAVE if self._reporter.save_requested.is_set() else _GO

    def train(self, trainer: Trainer, groups: list[Group], step: int) -> StepResult:
        return train_on_examples(trainer, groups, step, self._targets)

    def publishes(self, version: int, *, first: bool = False) -> bool:
        return self._serves and (first or self._recipe.evaluation_due(version))

    def before_publishing(self) -> None:
        """In a deterministic run every evaluation gets the version at which it is due: nothing else would hold the
        trainer until the one before has ended."""
        if not self._recipe.launch.deterministic:
            return
        while self._hub is not None and not self._reporter.stop_requested.is_set():
            state: HubState = self._hub.state()
            if all(one.state == "done" for one in state.evals):
                break
            self._reporter.waiting("the evaluation before to end")
            time.sleep(LOOK_S)
        self._reporter.waiting(None)
        self._ranks.barrier()


def group_of(place: int, problem: Problem, example: Example) -> Group:
    """An example as a group of one sample: what is trained as if the policy had drawn it."""
    segments = [
        Segment(0 if trained else None, np.array(ids, np.int32), np.zeros(len(ids) if trained else 0, np.float32))
        for ids, trained in example.parts
    ]
    sample = Sample(0, segments, "stop")
    return Group(place, problem.id, np.array(example.prompt, np.int32), [sample], problem.question)
