"""`GradePool`: the rewards of a run, computed in processes that may be killed and put together to a grade a sample."""

from __future__ import annotations

import asyncio
import math
import threading
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from astracli.errors import RunFailed, UserError
from astracli.rewards.builtin import BUILTIN, probe_grades
from astracli.rewards.grade_process import Process, RewardSetting
from astracli.rewards.graders import Graders
from astracli.rewards.scores import Scored
from astracli.rewards.types import Grade, GradeItem

if TYPE_CHECKING:
    from astracli.config.recipe_data import DataTable
    from astracli.rl.types import Verdict

_NEARLY = 1e-9
"""For a sum of weighted rewards that should be `right_at`."""


@dataclass(frozen=True)
class Rewards:
    """The rewards of a run."""

    each: Sequence[RewardSetting]
    workers: int = 1
    right_at: float | None = None
    """The reward from which on a sample is right. None: the largest reward there can be (`GradePool.right_at`)."""
    max_errors: int = 0
    """Samples in a row whose grading may fail; 0: no limit."""
    on_error: Callable[[str], None] = field(default=lambda words: None)
    """Gets the first error of a pool, with its traceback. Called once, from any thread."""
    on_excess: Callable[[str], None] = field(default=lambda words: None)
    """Told when a reward is larger than it can be: `right` then begins too low. Called once, from any thread."""

    @classmethod
    def of(cls, data: DataTable, **settings: Any) -> Rewards:
        """Those of a recipe's data table."""
        common = RewardSetting(
            data.reward,
            timeout_s=data.reward_timeout_s,
            start_s=data.reward_start_s,
            concurrency=data.reward_concurrency,
            memory_bytes=None if data.reward_memory_gib is None else int(data.reward_memory_gib * (1 << 30)),
            grading=data.grading.model_dump(),
            code=data.code.model_dump(),
            asked=data.question_field,
        )
        each = [
            replace(
                common,
                spec=entry.reward,
                name=entry.label,
                weight=entry.weight,
                timeout_s=entry.timeout_s or common.timeout_s,
                concurrency=entry.concurrency or common.concurrency,
                maximum=entry.maximum,
            )
            for entry in data.rewards
        ] or [common]
        return cls(each, data.reward_workers, data.right_at, **settings)


class GradePool:
    """Grades completions by one reward or several; each has `workers` processes, started when they are needed.

    A pathological answer costs its own time limit and nothing else: its verdict is `timeout`, and what stood behind it
    is graded by a fresh process. Thread-safe. A context manager; `close` kills the processes.
    Raises UserError at the first grading when a reward is none (`validate_rewards` finds out before a run starts), and
    RunFailed once `rewards.max_errors` samples in a row have failed.
    """

    def __init__(
        self,
        spec: str = "math",
        workers: int = 1,
        timeout_s: float = 5.0,
        grading: Mapping[str, Any] | None = None,
        *,
        rewards: Rewards | None = None,
    ):
        """`spec` and what follows is short for one reward without any other setting."""
        self._rewards = rewards or Rewards(
            [RewardSetting(spec, "", 1.0, timeout_s, grading=dict(grading or {}))], workers
        )
        self._graders = [Graders(each, self._rewards.workers) for each in self._rewards.each]
        self._closed = threading.Event()
        self._lock = threading.Lock()
        self._failed_in_a_row = 0
        self._over_said = False
        self.first_error = ""
        """The first error with its traceback; "" before there is one."""
        self.counts: Counter[str] = Counter()
        """Gradings by verdict since the pool was made."""

    def __enter__(self) -> GradePool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Kill the processes; what is being graded fails with RunFailed."""
        self._closed.set()
        for graders in self._graders:
            graders.close()

    @property
    def right_at(self) -> float:
        """`data.right_at`; without it the largest sum of weighted rewards."""
        if self._rewards.right_at is not None:
            return self._rewards.right_at
        return sum(each.setting.weight * each.maximum for each in self._graders if each.setting.weight > 0)

    def grade(self, items: Sequence[GradeItem]) -> list[Grade]:
        """One grade per item, in order. The items are the samples of one prompt."""
        parts = [[scored for future in futures for scored in future.result()] for futures in self._submit(items)]
        return self._put_together(items, parts)

    async def agrade(self, items: Sequence[GradeItem]) -> list[Grade]:
        """`grade` for asyncio: the loop goes on meanwhile."""
        parts = []
        for futures in self._submit(items):
            found = await asyncio.gather(*(asyncio.wrap_future(future) for future in futures))
            parts.append([scored for some in found for scored in some])
        return self._put_together(items, parts)

    def _submit(self, items: Sequence[GradeItem]) -> list[list[Future[list[Scored]]]]:
        """For each reward, futures of its scores."""
        if self._closed.is_set():
            raise RunFailed("the grading processes are closed")
        found = []
        for graders in self._graders:
            if graders.setting.spec == "probe":
                done: Future[list[Scored]] = Future()
                done.set_result([Scored(grade.reward, grade.verdict) for grade in probe_grades(items)])
                found.append([done])
            else:
                found.append(graders.submit(items))
        return found

    def _put_together(self, items: Sequence[GradeItem], parts: Sequence[Sequence[Scored]]) -> list[Grade]:
        grades = [self._grade([scores[place] for scores in parts]) for place in range(len(items))]
        with self._lock:
            self.counts.update(grade.verdict for grade in grades)
        for grade in grades:
            self._notice(grade)
        return grades

    def _grade(self, scores: Sequence[Scored]) -> Grade:
        """The grade of one sample from what each reward says of it."""
        named = list(zip(self._graders, scores, strict=True))
        total = 0.0
        parts: dict[str, float] = {}
        notes: dict[str, str] = {}
        for graders, scored in named:
            prefix = f"{graders.setting.name}/" if graders.setting.name else ""
            if scored.state != "absent":
                total += graders.setting.weight * scored.reward
                parts |= {graders.setting.name: scored.reward} if graders.setting.name else {}
            parts |= {f"{prefix}{name}": value for name, value in scored.logged.items()}
            notes |= {f"{prefix}{name}": value for name, value in scored.notes.items()}
        states = {scored.state for scored in scores}
        detail = next(
            (_named(g, s) for g, s in named if s.state == "error" or (s.detail and "error" not in states)), ""
        )
        if not math.isfinite(total):
            return Grade(0.0, "error", f"the weighted sum of the rewards is {total}", parts, notes)
        if states == {"absent"}:
            return Grade(0.0, "error", "no reward applies to this row: each returned None", parts, notes)
        return Grade(total, self._verdict(states, total), detail, parts, notes)

    def _verdict(self, states: set[str], total: float) -> Verdict:
        if "error" in states:
            return "error"
        if "timeout" in states:
            return "timeout"
        if total >= self.right_at - _NEARLY:
            return "right"
        return "no_answer" if "no_answer" in states else "wrong"

    def _notice(self, grade: Grade) -> None:
        """Tell of the first error, and end when too many samples in a row have failed."""
        with self._lock:
            failed = grade.verdict in ("error", "timeout")
            self._failed_in_a_row = self._failed_in_a_row + 1 if failed else 0
            first = grade.verdict == "error" and not self.first_error
            if first:
                self.first_error = grade.detail
            count, most = self._failed_in_a_row, self._rewards.max_errors
            over = self._rewards.right_at is None and not self._over_said and grade.reward > self.right_at + _NEARLY
            self._over_said |= over
        if over:
            self._rewards.on_excess(self._excess(grade.reward))
        if first:
            self._rewards.on_error(grade.detail)
        if most and count >= most:
            raise RunFailed(*self._too_many(count, grade))

    def _excess(self, reward: float) -> str:
        names = ", ".join(f"`{each.setting.spec}`" for each in self._graders)
        return (
            f"reward {names} gave {reward:g}, and its maximum is {self.right_at:g}, from which on a sample counts as "
            "right: declare `maximum` (docs/rewards.md), or set data.right_at in a new run"
        )

    def _too_many(self, count: int, last: Grade) -> tuple[str, str]:
        names = ", ".join(f"`{each.setting.spec}`" for each in self._graders)
        said = last.detail or self.first_error if last.verdict == "error" else ""
        if not said:
            limits = sorted({each.setting.timeout_s for each in self._graders})
            return (
                f"grading failed for {count} samples in a row: reward {names} took longer than "
                f"{' or '.join(f'{limit:g}' for limit in limits)} s",
                "raise data.reward_timeout_s, or see what the reward waits for; data.max_reward_errors is the limit",
            )
        return (
            f"reward {names} failed for {count} samples in a row:\n{said}",
            "mend the reward; data.max_reward_errors says how many samples in a row may fail",
        )


def open_pools(stack: ExitStack, wanted: Mapping[str, Rewards]) -> dict[str, GradePool]:
    """A pool for each name, closed with `stack`; names with the same rewards and threshold share one."""
    made: list[tuple[Rewards, GradePool]] = []
    pools = {}
    for name, rewards in wanted.items():
        same = (pool for known, pool in made if (known.each, known.right_at) == (rewards.each, rewards.right_at))
        pool = next(same, None)
        if pool is None:
            pool = stack.enter_context(GradePool(rewards=rewards))
            made.append((rewards, pool))
        pools[name] = pool
    return pools


def _named(graders: Graders, scored: Scored) -> str:
    return f"{graders.setting.name}: {scored.detail}" if graders.setting.name else scored.detail


def validate_rewards(rewards: Rewards, columns: Sequence[str] | None = None, where: str = "the data") -> None:
    """Raises UserError when a recipe's reward is none, or wants a column that is not there.

    A module of the user's is imported in a process. `columns`: of the rows of `where`, None when they are not known.
    """
    for setting in rewards.each:
        if setting.spec in BUILTIN:
            continue
        process = Process(setting, columns, where)
        try:
            process.start()
        except RunFailed as error:
            raise UserError(error.message, "see what its module does while it is imported") from None
        finally:
            process.close()


def validate_reward(spec: str, columns: Sequence[str] | None = None) -> None:
    """`validate_rewards` of one."""
    validate_rewards(Rewards([RewardSetting(spec)]), columns)
