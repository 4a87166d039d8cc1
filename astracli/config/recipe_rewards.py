"""The keys of `[data]` that say how a completion is rewarded, and their tables."""

from __future__ import annotations

import re
from typing import Literal, Self

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt, field_validator
from pydantic_core import PydanticCustomError

from astracli.config.recipe_run import SomeProcesses, Table


class GradingTable(Table):
    """What the rewards `math` and `math_boxed` accept as the same answer, where graders differ (docs/grading.md)."""

    relative_tolerance: float = Field(default=0.0, ge=0.0, le=0.1)
    """Two numbers are equal if they differ by at most this, relative to the reference answer. For reference answers
    that are measured or rounded, for example 0.01."""
    ordered_lists: bool = False
    """Whether the order matters in a list without brackets, such as `1, 2`. With brackets it always matters."""
    units: Literal["optional", "required"] = "optional"
    """`required`: if the reference answer has a unit, a number without the unit is wrong."""


class CodeTable(Table):
    """Limits for the programs that the rewards `code` and `code_share` run. Their time limit is
    `data.reward_timeout_s`."""

    tests: str = "tests"
    """Column with the unit tests. If a row has none, its answer is used."""
    memory_gib: float = Field(default=1.0, ge=0.05, le=1024.0)
    """Address space of each process."""
    file_mb: float = Field(default=16.0, gt=0.0, le=1e6)
    """Largest file that a program may write, in megabytes. Its directory is deleted afterwards."""
    processes: int = Field(default=16, ge=2, le=10_000)
    """How many processes a program may have at once."""


class RewardTable(Table):
    """One of several rewards; their weighted sum is the reward. `data.reward` is then not used."""

    reward: str = Field(min_length=1)
    """As `data.reward`."""
    name: str | None = None
    """Its name in metrics and samples. None: the last part of `reward`."""
    weight: float = 1.0
    """0: the reward is logged but not trained on."""
    timeout_s: PositiveFloat | None = None
    """None: `data.reward_timeout_s`."""
    concurrency: PositiveInt | None = None
    """None: `data.reward_concurrency`."""
    maximum: float | None = None
    """Its largest value. None: the reward's attribute `maximum` if it has one, else 1."""

    @property
    def label(self) -> str:
        return self.name or re.split(r"[:.]", self.reward)[-1]


class RewardKeys(Table):
    """Part of `[data]`."""

    reward: str = "math"
    """The reward function. Built in: `math`; `math_boxed`, which accepts only an answer in a box; `number`, which
    compares the last number as it is written; `code`, 1 if all unit tests pass; `code_share`, the share of unit tests
    that pass; `probe`, for trying a setup with any weights: 1 if the share of even token ids is at or above the median
    of its group, else 0. Your own: a name from the entry-point group `astra.rewards`, or `pkg.module:function`."""
    rewards: list[RewardTable] = Field(default=[])
    """Several rewards instead of one: a `[[data.rewards]]` table each."""
    right_at: float | None = None
    """A sample counts as right if its reward is at least this. None: the largest possible reward, which is the sum of
    weight times maximum over all rewards with a positive weight. Built-in rewards have the maximum 1; your own may
    declare another."""
    reward_timeout_s: PositiveFloat = 5.0
    """Time limit for grading one sample. After it the grading process is killed, the reward is 0 and a timeout is
    counted. A function that grades a whole group at once gets this time once for each sample."""
    reward_start_s: PositiveFloat = 60.0
    """Time limit for importing a reward and, if it is a class, for creating the object."""
    reward_workers: SomeProcesses = 1
    """Number of grading processes for each reward."""
    reward_concurrency: PositiveInt = 16
    """How many samples an `async def` reward grades at once in each of its processes."""
    reward_memory_gib: PositiveFloat | None = None
    """Limit on the address space of a process that runs a reward of your own. None: no limit. CUDA needs a large
    address space."""
    max_reward_errors: NonNegativeInt | None = None
    """The run ends with the reward's error after this many failed samples in a row. None: as many as a step has
    (`train.batch_groups` x `rollout.group_size`). 0: never."""
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
