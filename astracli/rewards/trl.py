"""Reward functions written for TRL: what they are called with, a group at a time, and what they log beside the scores.

Source: https://huggingface.co/docs/trl/grpo_trainer, "Using a custom reward function".
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from astracli.rewards.types import GradeItem

IDS = ("completion_ids", "completions_ids")
"""Token ids of the completions: as TRL passes them, and as some of its pages call them."""
LISTS = ("prompts", "completions", *IDS)
LOGS = ("log_extra", "log_metric")
"""Functions that a reward calls to log."""
NAMES = (*LISTS, *LOGS)
ABSENT = {
    "trainer_state": (
        "the state of TRL's trainer, which there is none of here: answers are graded beside the training, and a group "
        "keeps its reward",
        "give it a default (`trainer_state=None`), and let the reward not depend on the step",
    ),
    "environments": (
        "TRL's environments, which are not made here",
        "give it a default (`environments=None`); an environment of your own is `rollout.env`, see docs/extending.md",
    ),
}
"""What TRL passes and is not here: what it is, and what to do."""
_NOT_COLUMNS = ("prompt", "completion", *IDS)
"""Columns that TRL does not pass on."""
CHAT = ("prompt", "messages")
"""Columns that may hold chat turns, besides the one that is asked."""


class Log:
    """What a reward logs of a group: `log_metric(name, value)` and `log_extra(column, values)`."""

    def __init__(self, count: int):
        """`count`: samples of the group."""
        self._count = count
        self._metrics: dict[str, list[float]] = {}
        self._columns: dict[str, list[Any]] = {}

    def metric(self, name: str, value: float) -> None:
        """A figure of the whole group; of several under one name, the mean."""
        try:
            figure = float(value)
        except (TypeError, ValueError):
            raise TypeError(f"log_metric takes a number, and `{name}` is a {type(value).__name__}") from None
        self._metrics.setdefault(str(name), []).append(figure)

    def extra(self, column: str, values: Sequence[Any]) -> None:
        """A value for each sample: a number is a figure of it, everything else becomes text."""
        if (count := len(values)) != self._count:
            raise ValueError(f"log_extra takes one value a completion: `{column}` has {count} for {self._count}")
        self._columns[str(column)] = list(values)

    def of(self, place: int) -> dict[str, Any]:
        """All that was logged of one sample."""
        metrics = {name: sum(values) / len(values) for name, values in self._metrics.items()}
        return metrics | {name: values[place] for name, values in self._columns.items()}


def is_chat(item: GradeItem, asked: Sequence[str] = ()) -> bool:
    """Whether the row holds turns, as a list or as its JSON text, in one of the columns `asked` or in `CHAT`."""
    return any(_are_turns(item.row.get(name)) for name in (*asked, *CHAT))


def _are_turns(value: Any) -> bool:
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            return False
    return (
        isinstance(value, list | tuple) and bool(value) and all(isinstance(t, Mapping) and "role" in t for t in value)
    )


def arguments(items: Sequence[GradeItem], log: Log, asked: Sequence[str] = ()) -> dict[str, Any]:
    """What TRL itself passes, columns aside."""
    chat = is_chat(items[0], asked)
    tokens = [list(item.tokens or ()) for item in items]
    return {
        "prompts": [item.turns if chat else item.problem for item in items],
        "completions": [[{"role": "assistant", "content": i.text}] if chat else i.text for i in items],
        **dict.fromkeys(IDS, tokens),
        "log_extra": log.extra,
        "log_metric": log.metric,
    }


def columns(items: Sequence[GradeItem]) -> dict[str, list[Any]]:
    """Columns of the rows, as lists."""
    return {name: [item.row.get(name) for item in items] for name in items[0].row if name not in _NOT_COLUMNS}
