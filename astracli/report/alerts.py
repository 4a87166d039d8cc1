"""What goes wrong while a run goes on, one line when it begins. Pure: fed with the trainer's records, step by step."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from astracli.runs.metrics import OVERALL
from astracli.runs.names import REWARD

COLLAPSED = 0.05
"""Entropy under this part of what it was at first, and under LITTLE_ENTROPY, has collapsed."""
LITTLE_ENTROPY = 0.05
"""Nats a token."""
LOW_START = 0.02
"""An evaluation before training that is no better than this: the model does not answer what it is asked."""
FLAT_STEPS = 20
FLAT = 0.01
"""A reward that stays within so much, relative to its size where that is over 1, is flat."""
FIRST_STEPS = 3
"""Of a run, whose mean is what its entropy was at first."""
QUIET_STEPS = 20
"""So many steps without it, and it may be said again."""


@dataclass
class Alerts:
    """Feed every record of metrics.jsonl in order; what an earlier attempt wrote too, to know where the run began."""

    by_rewards: bool = True
    """The run learns from rewards: it has to begin with some right answers."""
    _entropy: list[float] = field(default_factory=list)
    _rewards: deque[float] = field(default_factory=lambda: deque(maxlen=FLAT_STEPS))
    _seen: dict[str, int] = field(default_factory=dict)
    """Name of an alert -> the last step at which it held."""

    def feed(self, record: Mapping[str, Any]) -> list[str]:
        """The lines of what begins with this record; [] of any process but the trainer and the evaluation."""
        if record.get("process") == "eval":
            return self._start(record) if self.by_rewards else []
        if record.get("process") != "trainer" or "entropy" not in record or "step" not in record:
            return []
        if "epoch" in record:  # supervised training: its entropy is meant to fall, and it has no reward
            return []
        step = int(record["step"])
        found = []
        checks: tuple[Callable[[Mapping[str, Any]], str | None], ...] = (self._collapse, self._truncated, self._flat)
        for check in checks:
            line = check(record)
            if line is None:
                continue
            before = self._seen.get(check.__name__)
            if before is None or step - before > QUIET_STEPS:
                found.append(f"step {step}: {line}")
            self._seen[check.__name__] = step
        return found

    def _start(self, record: Mapping[str, Any]) -> list[str]:
        benchmark, score = record.get("benchmark"), record.get("eval_avg_at_n")
        if record.get("step") != 0 or benchmark in (None, OVERALL) or score is None or score > LOW_START:
            return []
        return [
            f"before training {score:.1%} of the answers to `{benchmark}` are right: look at the prompt (`--dry-run` "
            "of the same command shows the first one) and at the answers (`astra runs samples`), or take easier "
            "questions"
        ]

    def _collapse(self, record: Mapping[str, Any]) -> str | None:
        now = float(record["entropy"])
        if len(self._entropy) < FIRST_STEPS:
            self._entropy.append(now)
        first = max(self._entropy)
        if now >= min(LITTLE_ENTROPY, COLLAPSED * first):
            return None
        return (
            f"entropy collapsed, {now:.2g} nats a token, {first:.2g} at first: the samples of a group are hardly "
            "different any more; a lower train.learning_rate keeps them so for longer, or in a new run a KL term "
            "(algorithm.kl_coef)"
        )

    def _truncated(self, record: Mapping[str, Any]) -> str | None:
        if record.get("length_stop_fraction", 0.0) < 1.0:
            return None
        return "every sample is cut off at rollout.max_new_tokens: none of them ends by itself"

    def _flat(self, record: Mapping[str, Any]) -> str | None:
        if isinstance(reward := record.get(REWARD), int | float) and record.get("arrived_groups", 1):
            self._rewards.append(float(reward))
        if len(self._rewards) < FLAT_STEPS:
            return None
        low, high = min(self._rewards), max(self._rewards)
        if high - low > FLAT * max(1.0, abs(high), abs(low)):
            return None
        return (
            f"the reward is flat, {low:.3g} to {high:.3g} in the last {FLAT_STEPS} steps: look at what is generated "
            "(`astra runs samples`) and at the learning rate"
        )
