"""One process that computes a reward, as its owner sees it: what it may use, how it starts, what goes to and fro."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from astracli.errors import RunFailed, UserError
from astracli.process.sandbox import Limits, Sandbox
from astracli.rewards.builtin import MATH
from astracli.rewards.channel import GarbledError, OwnerEnd
from astracli.rewards.scores import DETAIL_CHARACTERS, MOST_PARTS, NOTE_CHARACTERS, Scored, printable
from astracli.rewards.types import GradeItem

MATH_MEMORY_BYTES = 4 << 30
"""Bound for mathematics, where a short answer such as 9^9^9^9 can ask for any amount of memory."""
_STATES = frozenset({"scored", "right", "wrong", "no_answer", "timeout", "error", "absent"})


@dataclass(frozen=True)
class RewardSetting:
    """One reward of a run and what it may use."""

    spec: str
    name: str = ""
    weight: float = 1.0
    timeout_s: float = 5.0
    start_s: float = 60.0
    concurrency: int = 16
    maximum: float | None = None
    """None: what the reward declares."""
    asked: str = "problem"
    """`data.question_field`: TRL's functions get chat turns where it holds them."""
    memory_bytes: int | None = None
    grading: Mapping[str, Any] = field(default_factory=dict)
    """The table `data.grading`, for mathematics."""
    code: Mapping[str, Any] = field(default_factory=lambda: CODE_LIMITS)
    """The table `data.code`."""

    @property
    def limits(self) -> Limits:
        memory = MATH_MEMORY_BYTES if self.spec in MATH else self.memory_bytes
        return Limits(memory_bytes=memory)


CODE_LIMITS: dict[str, Any] = {"tests": "tests", "memory_gib": 1.0, "file_mb": 16.0, "processes": 16}


class Process:
    """One grading process, as its owner sees it. `kill` may be called from any thread."""

    def __init__(self, setting: RewardSetting, columns: Sequence[str] | None = None, where: str = "the data"):
        """Raises UserError when the process refuses the reward, RunFailed when it does not start."""
        self._setting = setting
        ours, theirs = socket.socketpair()
        self.channel = OwnerEnd(ours)
        command = [sys.executable, "-P", "-m", "astracli.rewards.grade_worker", str(theirs.fileno())]
        with theirs:
            self.sandbox = Sandbox(
                command,
                limits=setting.limits,
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=2,  # a reward may print
                env={**os.environ, "OMP_NUM_THREADS": "1"},
            )
        self.ready: Mapping[str, Any] = {}
        self._columns, self._where = columns, where

    def start(self) -> None:
        setting = self._setting
        hello = {
            "spec": setting.spec,
            "timeout_s": setting.timeout_s,
            "concurrency": setting.concurrency,
            "grading": dict(setting.grading),
            "code": dict(setting.code),
            "columns": None if self._columns is None else list(self._columns),
            "where": self._where,
            "asked": [setting.asked],
        }
        try:
            self.channel.send(hello, setting.start_s)
            frame = self.channel.receive(setting.start_s)
        except TimeoutError:
            ending = f"did not start in {setting.start_s:g} s"
        except (EOFError, OSError):
            ending = f"died while it started: {self.death()}"
        except GarbledError as error:
            ending = f"wrote something else than it should while it started: {error}"
        else:
            if isinstance(frame, list) and len(frame) == 3 and frame[0] == "refused":
                raise UserError(str(frame[1]), None if frame[2] is None else str(frame[2]))
            if isinstance(frame, list) and len(frame) == 2 and frame[0] == "ready" and isinstance(frame[1], dict):
                self.ready = frame[1]
                return
            ending = "wrote something else than it should while it started"
        raise RunFailed(f"a grading process for reward `{setting.spec}` {ending}")

    def death(self) -> str:
        """How it ended, after its socket closed."""
        ending = self.sandbox.wait(2.0)
        return "it closed its socket" if ending is None else str(ending)

    def kill(self) -> None:
        self.sandbox.kill()

    def close(self) -> None:
        self.kill()
        self.channel.close()


def item_fields(item: GradeItem, needs: Sequence[str]) -> tuple[Any, ...]:
    """An item as it travels: the three texts, and what the reward needs besides."""
    if not needs:
        return (item.problem, item.answer, item.text)
    return (
        item.problem,
        item.answer,
        item.text,
        list(map(int, item.tokens or ())) if "tokens" in needs else None,
        tuple(item.messages) if "messages" in needs else (),
        dict(item.row) if "row" in needs else {},
    )


def score_of(frame: object) -> tuple[int, int, Scored] | None:
    """(job, place, score) of a frame; None when it is no such thing."""
    if not isinstance(frame, list) or len(frame) != 7:
        return None
    number, place, reward, state, detail, logged, notes = frame
    if type(number) is not int or type(place) is not int or type(reward) not in (float, int) or state not in _STATES:
        return None
    if type(detail) is not str or not isinstance(logged, dict) or len(logged) > MOST_PARTS:
        return None
    if not all(type(key) is str and type(value) is float for key, value in logged.items()):
        return None
    if not isinstance(notes, dict) or len(notes) > MOST_PARTS:
        return None
    if not all(type(key) is str and type(value) is str for key, value in notes.items()):
        return None
    told = {printable(key): printable(value[:NOTE_CHARACTERS]) for key, value in notes.items()}
    return number, place, Scored(float(reward), state, printable(detail[: 2 * DETAIL_CHARACTERS]), logged, told)
