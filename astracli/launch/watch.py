"""Updates the live view, the sinks and status.json while a run goes on. Neither a sink that fails nor a terminal that
is gone ends the run."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from astracli.launch.place import Place
from astracli.launch.supervise import Supervisor
from astracli.process.console import say
from astracli.report.alerts import Alerts
from astracli.report.live import PlainView, RunProgress, View, open_view
from astracli.runs.metrics import Record, Sink, Tail, read
from astracli.runs.run_dir import RunDir

if TYPE_CHECKING:
    from astracli.hub.store import HubStore
    from astracli.hub.types import EvaluationStatus

WATCH_EVERY_S = 0.5
STATUS_EVERY_S = 1.0


@contextlib.contextmanager
def unharmed(what: str) -> Iterator[None]:
    """Turn an error inside into a warning that begins with `what`."""
    try:
        yield
    except Exception as error:
        say(f"warning: {what}: {type(error).__name__}: {error}")


class Watch:
    """Called between the supervisor's looks: feeds the view, the sinks and status.json."""

    def __init__(
        self,
        run_dir: RunDir,
        steps: int | None,
        store: HubStore,
        sinks: Sequence[Sink],
        place: Place,
        alerts: Alerts,
    ):
        """`steps`: of a training run; None for a job without a trainer."""
        self._place = place
        self.evaluations_s: dict[str, float] = {}
        """Step of an evaluation -> seconds from when it became due to its result."""
        self._run_dir = run_dir
        self._training = steps is not None
        self._store = store
        self._sinks = list(sinks)
        self._broken: list[Sink] = []
        self._tail = Tail(run_dir.metrics_jsonl, from_end=True)
        self._view: View = open_view()
        self._progress = RunProgress(run_dir.name, steps or 0)
        self._alerts = alerts
        for record in read(run_dir.metrics_jsonl):  # of earlier attempts: what has been said is not said again
            self._alerts.feed(record)
        self._looked = self._told = 0.0
        self._due: dict[int, float] = {}
        self._last_told: dict[str, Any] = {}

    @property
    def step(self) -> int:
        """Steps that are done, as of the last look."""
        return self._progress.step

    def __call__(self, supervisor: Supervisor) -> None:
        now = time.monotonic()
        if now - self._looked < WATCH_EVERY_S:
            return
        self._looked = now
        if (fault := self._place.fault()) is not None:
            raise fault
        records: list[Record] = self._tail.new()
        state = self._store.state()
        if records:
            self._pass_on(records)
        for line in (line for record in records for line in self._alerts.feed(record)):
            supervisor.warn(line)
        self._time_evaluations(state.evals, now)
        self._progress.feed(records, state, supervisor.status, supervisor.phase)
        self._progress.hosts = {name: host for name in supervisor.status if (host := supervisor.host_of(name))}
        self._show()
        self._tell(supervisor, now)

    def _tell(self, supervisor: Supervisor, now: float) -> None:
        """status.json: the step, the phase and what each process waits for, when they have changed."""
        found: dict[str, Any] = {"step": self._progress.step} if self._training else {}
        found |= {
            "phase": supervisor.phase,
            "waits": {name: status.words() for name, status in supervisor.status.items()},
        }
        if hosts := supervisor.hosts():
            found["hosts"] = dict(hosts)
        if found != self._last_told and now - self._told >= STATUS_EVERY_S:
            self._told, self._last_told = now, found
            self._run_dir.update(**found)

    def _show(self) -> None:
        try:
            self._view.update(self._progress)
        except OSError:  # its terminal is gone
            with contextlib.suppress(OSError):
                self._view.close()
            self._view = PlainView()  # falls silent by itself

    def _pass_on(self, records: Sequence[Record]) -> None:
        """To every sink. One that fails causes one warning and gets no more records."""
        for sink in self._sinks:
            if sink in self._broken:
                continue
            try:
                sink.write(records)
            except Exception as error:
                self._broken.append(sink)
                name = type(sink).__name__
                say(f"warning: `{name}` gets no more figures, metrics.jsonl has all: {type(error).__name__}: {error}")

    def _time_evaluations(self, evals: Sequence[EvaluationStatus], now: float) -> None:
        for evaluation in evals:
            if evaluation.state != "done":
                self._due.setdefault(evaluation.due_step, now)
            elif evaluation.due_step in self._due:
                self.evaluations_s[str(evaluation.step)] = round(now - self._due.pop(evaluation.due_step), 2)

    def close(self, supervisor: Supervisor) -> None:
        """One last look at everything, then give the terminal back. Raises nothing: the run has ended, well or not."""
        self._looked = 0.0
        with unharmed("the last figures were not shown"):
            self(supervisor)
            if self._training:
                self._run_dir.update(step=self._progress.step)
        self.give_terminal_back()

    def give_terminal_back(self) -> None:
        """Close the view and the sinks. Raises nothing."""
        with unharmed("the live view did not close"):
            self._view.close()
        for sink in self._sinks:
            with unharmed(f"`{type(sink).__name__}` did not close"):
                sink.close()
