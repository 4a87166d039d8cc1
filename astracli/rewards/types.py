"""What is graded and what comes of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from astracli.rl.types import Verdict


class NoScoreError(ValueError):
    """A reward returned what is no score, or cannot be called for a row. Its text says all."""


@dataclass(frozen=True)
class GradeItem:
    """A completion to grade. The items of one call of `GradePool.agrade` are the samples of one prompt."""

    problem: str
    answer: str
    """The gold answer."""
    text: str
    """The completion, decoded."""
    tokens: Sequence[int] | None = None
    """Token ids of the completion."""
    messages: Sequence[Mapping[str, Any]] = ()
    """The turns that the model was asked with; empty: the problem is one user turn."""
    row: Mapping[str, Any] = field(default_factory=dict)
    """Every column of the row that the problem comes from."""

    @property
    def turns(self) -> list[dict[str, Any]]:
        """`messages`, or the problem as a user turn."""
        return [dict(turn) for turn in self.messages] or [{"role": "user", "content": self.problem}]


@dataclass(frozen=True)
class Grade:
    reward: float
    """What is trained on: the weighted sum, when there are several rewards."""
    verdict: Verdict
    """`right`: the reward is at least `data.right_at`. `timeout` and `error`: a reward gave nothing, and counts 0."""
    detail: str = ""
    """What went wrong, with `error`: the traceback."""
    parts: Mapping[str, float] = field(default_factory=dict)
    """Named rewards, when there are several, and whatever other numbers a reward returned to be logged."""
    notes: Mapping[str, str] = field(default_factory=dict)
    """Texts that a reward returned to be logged."""
