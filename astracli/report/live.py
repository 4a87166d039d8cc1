"""What people see of a run while it goes on: a live view on a terminal, plain lines elsewhere. All on stderr."""

from __future__ import annotations

import sys
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from math import ceil
from typing import Protocol

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.segment import Segment
from rich.table import Table
from rich.text import Text

from astracli.hub.types import EvaluationStatus, HubState
from astracli.process.console import plain, say
from astracli.process.worker import Status
from astracli.report.words import duration, evaluated, judged
from astracli.runs.metrics import Record, without_absent
from astracli.runs.names import REWARD, words

STEP_PHASES = ("wait", "score", "forward", "backward", "optimizer", "publish")
"""Phases of a training step; the trainer's figures are their names with `_s`."""
PLAIN_EVERY_S = 2.0
"""Least time between two step lines when stderr is no terminal."""
SILENCE_S = 15.0
"""After so long without a line, a line says what everyone waits for."""
LIVE_EVERY_S = 0.25


@dataclass
class RunProgress:
    """What a view shows: fed with metrics records and the hub's state, it keeps the newest of everything."""

    name: str
    steps: int
    step: int = 0
    """Steps done."""
    phase: str = "starting"
    statuses: Mapping[str, Status] = field(default_factory=dict)
    hosts: Mapping[str, str] = field(default_factory=dict)
    """Process -> its host, of those on other hosts."""
    figures: dict[str, float] = field(default_factory=dict)
    """Newest value of each metric."""
    evals: list[EvaluationStatus] = field(default_factory=list)
    """Those that are done, in the order of their steps."""
    clock: Callable[[], float] = time.monotonic
    _done_at: deque[tuple[float, int]] = field(default_factory=lambda: deque(maxlen=21))
    began: float = field(default_factory=time.monotonic)

    def feed(self, records: Sequence[Record], state: HubState, statuses: Mapping[str, Status], phase: str) -> None:
        """Take what is new."""
        self.phase, self.statuses = phase, statuses
        for record in records:
            record = without_absent(record)
            for key, value in record.items():
                if isinstance(value, int | float) and key not in ("time", "step", "version", "due_step"):
                    self.figures[key] = float(value)
        self.evals = state.done_evals()
        done = state.counts.consumed_steps
        if done != self.step or not self._done_at:
            self.step = done
            self._done_at.append((self.clock(), done))

    def left_s(self) -> float | None:
        """Seconds until the last step at the pace of the last twenty; None while there is no pace yet."""
        (first_time, first_step), (last_time, last_step) = self._done_at[0], self._done_at[-1]
        if last_step <= first_step:
            return None
        pace = (last_time - first_time) / (last_step - first_step)
        return max(0.0, pace * (self.steps - last_step) - (self.clock() - last_time))

    def waits(self) -> list[str]:
        """`trainer: waiting for 3 of 16 groups`, for each process that waits or is not ready, and how far an evaluation
        is."""
        idle = [(name, s.words()) for name, s in self.statuses.items() if s.waiting or s.state == "starting"]
        if self.steps:  # an evaluation keeps its engine at one version: what others wait for may be that
            busy = [(n, s) for n, s in self.statuses.items() if s.progress.get("total") and n not in dict(idle)]
            idle += [(n, details(s)) for n, s in busy if s.progress.get("done") != s.progress["total"]]
        return [plain(f"{self.named(name)}: {said}") for name, said in idle]

    def named(self, process: str) -> str:
        """`engine0 on b`, of a process of another host."""
        return f"{process} on {self.hosts[process]}" if process in self.hosts else process

    def eval_words(self, evaluation: EvaluationStatus) -> str:
        """`avg@8 0.35` of the overall figure, or of the only benchmark."""
        results = evaluation.results
        figures = results.get("overall") or next(iter(results.values()))
        return f"avg@{figures['n']} {figures['avg_at_n']:.3f}"

    def parts(self) -> list[str]:
        """The figures of one line, those that are known."""
        formats = (
            (REWARD, f"{words(REWARD)} {{:.2f}}"),
            *([("loss", "loss {:.4f}")] if REWARD not in self.figures else []),
            ("tokens_per_s", "{:.0f} trained tok/s"),
            ("staleness_mean", f"{words('staleness_mean')} {{:.1f}}"),
        )
        shown = [text.format(self.figures[key]) for key, text in formats if key in self.figures]
        if self.evals:
            shown.insert(
                1 if REWARD in self.figures else 0, f"{self.eval_words(self.evals[-1])} (step {self.evals[-1].step})"
            )
        return shown


class View(Protocol):
    def update(self, progress: RunProgress) -> None: ...

    def close(self) -> None: ...


def open_view(console: Console | None = None) -> View:
    """The live view on a terminal, plain lines elsewhere."""
    console = console or stderr_console()
    return LiveView(console) if console.is_terminal else PlainView()


def stderr_console() -> Console:
    return Console(stderr=True) if sys.stderr.isatty() else Console(stderr=True, width=120, highlight=False)


class PlainView:
    """One line a step, at most one every two seconds; an evaluation and a change of phase always get theirs.

    Without any for a while, a line says who waits for what. What an earlier attempt did is not told again.
    """

    def __init__(self, write: Callable[[str], None] | None = None, clock: Callable[[], float] = time.monotonic):
        self._write = write or say
        self._clock = clock
        self._last = clock() - PLAIN_EVERY_S
        self._step = 0
        self._phase = ""
        self._evals: set[int] = set()
        self._looked = self._left_out = False

    def update(self, progress: RunProgress) -> None:
        now = self._clock()
        if not self._looked:
            self._looked = True
            self._step, self._evals = progress.step, {evaluation.due_step for evaluation in progress.evals}
        for evaluation in progress.evals:
            if evaluation.due_step not in self._evals:
                self._evals.add(evaluation.due_step)
                self._say(now, eval_line(evaluation))
        if not self._left_out and (too_long := most_left_out(progress)):
            self._left_out = True
            self._say(now, f"prompts that are too long are left out ({too_long} so far)")
        turned, ending = progress.phase != self._phase, progress.phase in ("finishing", "stopping")
        done = " ".join([done_words(progress), *progress.parts()])
        if progress.step > self._step and (ending if turned else now - self._last >= PLAIN_EVERY_S):
            self._step = progress.step
            self._say(now, done)
        if turned:
            self._phase = progress.phase
            self._say(now, phase_words(progress))
        elif now - self._last >= SILENCE_S:
            done = phase_words(progress) if progress.phase in ("starting", "resuming") else done
            self._say(now, "; ".join([done, *progress.waits()]))

    def _say(self, now: float, line: str) -> None:
        self._last = now
        self._write(line)

    def close(self) -> None:
        pass


def most_left_out(progress: RunProgress) -> int:
    """Prompts that rollout workers have found too long."""
    return sum(int(status.progress.get("too_long", 0)) for status in progress.statuses.values())


def done_words(progress: RunProgress) -> str:
    """`step 3/80`; of a job without steps what its workers count, `eval: done 120 total 1024`."""
    if progress.steps:
        return f"step {progress.step}/{progress.steps}"
    busy = [f"{name}: {details(status)}" for name, status in progress.statuses.items() if status.progress]
    return "; ".join(busy) or phase_words(progress)


def details(status: Status) -> str:
    """The figures that a process reports of itself: `done 120 total 1024`."""
    said = ((key, f"{value:.3g}" if isinstance(value, float) else value) for key, value in status.progress.items())
    return " ".join(f"{key} {value}" for key, value in said)


def phase_words(progress: RunProgress) -> str:
    said = {
        "starting": "starting",
        "running": "all processes are ready",
        "resuming": "going on from the checkpoint",
        "finishing": "training is done, the last evaluations run",
        "stopping": "stopping",
    }
    return said.get(progress.phase, progress.phase)


def eval_line(evaluation: EvaluationStatus) -> str:
    """`eval step 25: arithmetic-heldout (number) avg@8 0.520 ± 0.021 pass@4 0.710`, see `evaluated`"""
    cells = [
        f"{judged(name, f)} avg@{f['n']} {f['avg_at_n']:.3f} ± {f['stderr']:.3f} pass@{f['k']} {f['pass_at_k']:.3f}"
        + (f" greedy {f['greedy_avg']:.3f}" if "greedy_avg" in f else "")
        + (f" no answer {f['no_answer_fraction']:.1%}" if f.get("no_answer_fraction") else "")
        for name, f in evaluation.results.items()
        if not (name == "overall" and len(evaluation.results) == 2)
    ]
    return f"eval {evaluated(evaluation.step, evaluation.due_step)}: " + ", ".join(cells)


class LiveView:
    """A few lines that stay in place: step bar, figures, phases of a step, each process with what it waits for."""

    def __init__(self, console: Console):
        self._console = console
        self._live = Live(console=console, auto_refresh=False, transient=True)
        self._live.start()
        self._drawn = 0.0
        self._width = console.width
        self._lines: list[int] = []
        """Columns that each line of the picture fills."""

    def update(self, progress: RunProgress) -> None:
        if time.monotonic() - self._drawn >= LIVE_EVERY_S:
            self._drawn = time.monotonic()
            self._after_resize()
            picture = draw(progress)
            rendered = self._console.render_lines(picture, pad=False)[: self._console.height]
            self._lines = [Segment.get_line_length(line) for line in rendered]
            self._live.update(picture, refresh=True)

    def _after_resize(self) -> None:
        """A terminal that became narrower has broken the picture's lines into more rows than it is known to have: erase
        them all, and stand where its last line would be."""
        before, self._width = self._width, self._console.width
        if self._lines and self._width < before:
            rows = sum(max(1, ceil(columns / self._width)) for columns in self._lines)
            up, down = rows - 1, len(self._lines) - 1
            codes = "\r" + (f"\x1b[{up}A" if up else "") + "\x1b[J" + "\n" * down
            self._console.file.write(codes)

    def close(self) -> None:
        self._after_resize()
        self._live.stop()


def draw(progress: RunProgress) -> RenderableType:
    """The live view's picture."""
    left = progress.left_s()
    head = Table.grid(padding=(0, 2))
    bar: list[RenderableType] = [
        ProgressBar(total=progress.steps, completed=progress.step, width=30),
        f"step {progress.step}/{progress.steps}",
    ]
    head.add_row(
        Text(progress.name, style="bold"),
        *(bar if progress.steps else []),
        f"{duration(progress.clock() - progress.began)} gone",
        f"{duration(left)} left" if left is not None and progress.steps else phase_words(progress),
    )
    trend = ", ".join(f"{progress.eval_words(e)} (step {e.step})" for e in progress.evals[-4:])
    known = [part for part in progress.parts() if not part.startswith("avg@")]
    figures = Text("   ".join(known) or ("no step yet" if progress.steps else ""))
    rows = Table.grid(padding=(0, 2))
    for name, status in progress.statuses.items():
        restarts = f"restarted {status.restarts}x" if status.restarts else ""
        rows.add_row(
            Text(progress.named(name), style="bold"),
            status.words(),
            Text(details(status), style="dim"),
            Text(restarts, style="yellow"),
        )
    lines: list[RenderableType] = [head, figures]
    if trend:
        lines.append(Text(trend))
    return Group(*lines, phase_bars(progress.figures), rows)


def phase_bars(figures: Mapping[str, float]) -> RenderableType:
    """Where the trainer's last step went: a bar a phase, as shares of `step_s`. Nothing before the first step."""
    table = Table.grid(padding=(0, 2))
    step_s = figures.get("step_s", 0.0)
    for name in STEP_PHASES if step_s else ():
        seconds = figures.get(f"{name}_s", 0.0)
        bar = ProgressBar(total=step_s, completed=min(seconds, step_s), width=30)
        table.add_row(Text(name, style="dim"), bar, f"{seconds:.2f} s", f"{seconds / step_s:.0%}")
    return table
