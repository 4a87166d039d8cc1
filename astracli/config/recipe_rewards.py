"""The keys of `[data]` that say how a completion is rewarded, and their tables."""

from __future__ import annotations

import re
from typing import Literal, Self

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt, field_validator
from pydantic_core import PydanticCustomError

from astracli.config.recipe_run import SomeProcesses, Table


class GradingTable(Table):
    """Where graders differ: what rewards `math` and `math_boxed` take for the same answer (docs/grading.md)."""

    relative_tolerance: float = Field(default=0.0, ge=0.0, le=0.1)
    """Numbers this far apart, relative to the gold, are equal; for golds that are measured or rounded (0.01)."""
    ordered_lists: bool = False
    """Whether `1, 2` without brackets has an order. With brackets it always has."""
    units: Literal["optional", "required"] = "optional"
    """`required`: a gold with a unit is not matched by the bare number."""


class CodeTable(Table):
    """Rewards `code` and `code_share`: what a completion's program may use. Its time is `data.reward_timeout_s`."""

    tests: str = "tests"
    """Column that holds the unit tests; where a row has none, its answer does."""
    memory_gib: float = Field(default=1.0, ge=0.05, le=1024.0)
    """Address space of each of its processes."""
    file_mb: float = Field(default=16.0, gt=0.0, le=1e6)
    """Largest file that it may write, megabytes; its directory is removed afterwards."""
    processes: int = Field(default=16, ge=2, le=10_000)
    """Processes at once."""


class RewardTable(Table):
    """One of several rewards, added up by weight. With any, `data.reward` is not used."""

    reward: str = Field(min_length=1)
    """As `data.reward`."""
    name: str | None = None
    """Its name in metrics and samples; None is the last part of `reward`."""
    weight: float = 1.0
    """0 logs it and trains on the others."""
    timeout_s: PositiveFloat | None = None
    """None is `data.reward_timeout_s`."""
    concurrency: PositiveInt | None = None
    """None is `data.reward_concurrency`."""
    maximum: float | None = None
    """Its largest value; None is what it declares as its attribute `maximum`, else 1."""

    @property
    def label(self) -> str:
        return self.name or re.split(r"[:.]", self.reward)[-1]


class RewardKeys(Table):
    """Part of `[data]`."""

    reward: str = "math"
    """`math`, `math_boxed` (only a box counts), `number` (the last number as written, nothing worked out), `code` and
    `code_share` (unit tests: all of them, the share of them), `probe`, a name from the entry-point group
    `astra.rewards`, or `pkg.module:function`. `probe` tries the machinery out on any weights, random ones too: 1 where
    the share of even token ids is at or over its group's median, else 0."""
    rewards: list[RewardTable] = Field(default=[])
    """Several rewards instead of one: a `[[data.rewards]]` table each."""
    right_at: float | None = None
    """A sample is `right` when its reward is at least this. None: the largest that there can be, the sum of weight
    times maximum over rewards with a positive weight (built-in ones have the maximum 1, others may declare theirs)."""
    reward_timeout_s: PositiveFloat = 5.0
    """One grading may take this long; then its worker is killed, the reward is 0 and a timeout is counted. A function
    that grades a whole group at once has it once for each sample."""
    reward_start_s: PositiveFloat = 60.0
    """A reward may take this long to be imported, and a class to be made."""
    reward_workers: SomeProcesses = 1
    """Grading processes of each reward."""
    reward_concurrency: PositiveInt = 16
    """Samples that an `async def` grades at once in each of its processes."""
    reward_memory_gib: PositiveFloat | None = None
    """Address space of a process that runs a reward of your own; None: no limit. CUDA needs a lot of it."""
    max_reward_errors: NonNegativeInt | None = None
    """The run ends, in the words of the error, when grading has failed for so many samples in a row. None: one step's
    worth (`train.batch_groups` x `rollout.group_size`); 0: never."""
    grading: GradingTable = GradingTable()
    code: CodeTable = CodeTable()

    @field_validator("rewards")
    @classmethod
    def _told_apart(cls, rewards: list[RewardTable]) -> list[RewardTable]:
        names = [entry.label for entry in rewards]
        for name in names:
            if names.count(name) > 1:
                raise _refused(f"has two entries called `{name}`", "give each a `name`")
            if not re.fullmatch(r"[\w.-]+", name):
                raise _refused(f"has an entry called `{name}`", "a name holds letters, digits, `_`, `-` and `.`")
        if rewards and not any(entry.weight for entry in rewards):
            raise _refused("has no weight but 0", "nothing would be trained on: give one a weight")
        return rewards

    def by(self, reward: str) -> Self:
        """The same with one other reward."""
        return self.model_copy(update={"reward": reward, "rewards": [], "right_at": None})

    @property
    def grader(self) -> str:
        """The rewards in one word each, as they stand beside a score: `math`, or `correct + 0.2 format`."""
        if not self.rewards:
            return self.reward
        weights = [("" if entry.weight == 1 else f"{entry.weight:g} ") + entry.label for entry in self.rewards]
        return " + ".join(weights).replace("+ -", "- ")


def _refused(what: str, hint: str) -> PydanticCustomError:
    return PydanticCustomError("refused", "{what}", {"what": what, "hint": hint})
