"""Versions, engines and evaluations: which version an engine should hold, and which evaluation runs.

A version is announced once it is stable on disk. An evaluation that becomes due then is written in the same
transaction. One runs at a time, and all engines serve it: the target of each stays at the evaluated version until its
share is served (`release`); then it follows the latest version. With the last share the evaluation is *served*: its
results may still be on their way (`done`), but the next may run. One that becomes due meanwhile waits, and takes the
version that is the latest when the running one is served; it stands for every step at which one became due until then.
What engines report lives in memory: after a restart they report again.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Collection
from typing import Any

from astracli.errors import RunFailed
from astracli.hub.schema import Database
from astracli.hub.types import EngineReport, Evaluation, EvaluationStatus, HubSettings


class EvalBoard:
    """Part of the store, which holds the database's lock around every call that changes something."""

    def __init__(self, database: Database, settings: HubSettings):
        self._db = database
        self._settings = settings
        self._names = settings.engines
        self._released: set[str] = set()
        """Engines whose share of the running evaluation is served."""
        self.engines: dict[str, EngineReport] = {}
        """Last report of each engine."""

    @property
    def latest(self) -> int | None:
        """Newest announced version; None before the first."""
        row = self._db.one("SELECT MAX(version) FROM versions")
        return None if row is None or row[0] is None else int(row[0])

    @property
    def latest_step(self) -> int:
        """Step of the newest announced version; -1 before the first."""
        return self._db.scalar("SELECT COALESCE(MAX(step), -1) FROM versions")

    @property
    def running(self) -> Evaluation | None:
        """The evaluation that engines serve now."""
        return next((one for one in self._begun() if not one.served), None)

    def _begun(self) -> list[Evaluation]:
        """Those that have a version and no results, oldest first."""
        rows = self._db.rows(
            "SELECT step, version, due_step, served FROM evals "
            "WHERE results IS NULL AND version IS NOT NULL ORDER BY due_step"
        )
        return [Evaluation(int(step), int(version), int(due), bool(served)) for step, version, due, served in rows]

    @property
    def open(self) -> int:
        """Evaluations that became due and are not done."""
        return self._db.scalar("SELECT COUNT(*) FROM evals WHERE results IS NULL")

    def announce(self, version: int, step: int) -> list[int]:
        """A version is stable on disk. Telling it twice changes nothing. -> the versions that are pinned then."""
        every = self._settings.eval_every
        due = every > 0 and bool(self._names) and (step % every == 0 or step == self._settings.steps)
        with self._db.transaction() as sql:
            sql.execute("INSERT OR IGNORE INTO versions (version, step) VALUES (?, ?)", (version, step))
            sql.execute("DELETE FROM versions WHERE version < (SELECT MAX(version) FROM versions)")
            covered = sql.execute(
                "SELECT 1 FROM evals WHERE due_step <= ? AND (step IS NULL OR step >= ?)", (step, step)
            ).fetchone()
            if due and covered is None:
                sql.execute("INSERT INTO evals (due_step) VALUES (?)", (step,))
            self._start(sql)
        return self.pinned()

    def _start(self, sql: sqlite3.Connection) -> None:
        """Inside a transaction: an evaluation that waits takes the latest version, unless another runs, or that version
        has no checkpoint and the best one is to be kept: then it waits for the next."""
        newest = sql.execute("SELECT step, version FROM versions ORDER BY version DESC LIMIT 1").fetchone()
        if newest is not None and self.running is None and self._with_checkpoint(newest[0]):
            sql.execute("UPDATE evals SET step = ?, version = ? WHERE version IS NULL", newest)

    def _with_checkpoint(self, step: int) -> bool:
        """Whether the version of `step` may be evaluated: always, unless only checkpoints are."""
        every, evaluations = self._settings.checkpoint_every, self._settings.eval_every
        return not every or step == self._settings.steps or not step % every or not step % max(1, evaluations)

    def pinned(self) -> list[int]:
        """Versions of evaluations that are not done; with one that waits also the latest, which that may take."""
        waits, latest = self._db.scalar("SELECT COUNT(*) FROM evals WHERE version IS NULL"), self.latest
        return sorted({one.version for one in self._begun()} | ({latest} if waits and latest is not None else set()))

    def target(self, engine: str) -> tuple[int | None, bool]:
        """(version that the engine should hold or None, whether an evaluation pins it there).

        An engine that is past the evaluated version never goes back; one that joined later serves no evaluation.
        """
        latest, running = self.latest, self.running
        if latest is None or running is None or engine in self._released or engine not in self._names:
            return latest, False
        report = self.engines.get(engine)
        if report is not None and report.version is not None and report.version > running.version:
            return latest, False
        return running.version, True

    def report(self, engine: str, report: EngineReport) -> None:
        self.engines[engine] = report

    def down(self, engine: str) -> bool:
        """Whether it was lost, and has not been reported ready since."""
        return engine in self.engines and self.engines[engine].state == "down"

    def holders(self, version: int) -> list[str]:
        """Engines that can be asked now: ready at the evaluated version and kept there, in the plan's order."""
        running = self.running
        if running is None or running.version != version:
            return []
        there = EngineReport(version, "ready")
        return [name for name in self._names if self.engines.get(name) == there and name not in self._released]

    def next(self, finishing: Collection[int] = ()) -> tuple[Evaluation | None, str]:
        """(the evaluation that can be worked on now or None, what is waited for as a noun phrase).

        One that is served and not done, or one for which an engine has reported that it is ready at its version. A
        worker that begins anew gets the same one again. `finishing`: versions whose results the worker is writing.
        """
        begun = [one for one in self._begun() if one.version not in finishing]
        if not begun:
            return None, f"the next version to evaluate; the latest is {self.latest}"
        first = begun[0]
        if first.served or self.holders(first.version):
            return first, ""
        states = []
        for name in self._names:
            report = self.engines.get(name)
            at = "" if report is None or report.version is None else f" at {report.version}"
            states.append(f"{name} is {report.state if report else 'starting'}{at}")
        return None, f"an engine to hold version {first.version}: {', '.join(states)}"

    def release(self, step: int, version: int, engine: str) -> None:
        """The engine has served its share of this evaluation, and every sample of that is on disk.

        Of an evaluation that does not run (any more) nothing happens. With the last engine it is served. In a
        deterministic run all engines stay until it is done: which step is evaluated next then depends on no clock.
        """
        with self._db.transaction() as sql:
            running = self.running
            if running is None or (running.step, running.version) != (step, version) or self._settings.deterministic:
                return
            self._released.add(engine)
            if self._released.issuperset(self._names):
                sql.execute("UPDATE evals SET served = 1 WHERE due_step = ?", (running.due_step,))
                self._released.clear()
                self._start(sql)

    def version_of(self, engine: str | None) -> tuple[int, str | None]:
        """(version at which a new group would start, None or what it waits for).

        Without an engine: the oldest version of any ready one, else the latest announced.
        """
        if engine is None:
            ready = [r.version for r in self.engines.values() if r.state == "ready" and r.version is not None]
            return min(ready, default=self.latest or 0), None
        report = self.engines.get(engine)
        if report is None or report.state != "ready" or report.version is None:
            return 0, f"{engine}, which is {report.state if report else 'starting'}"
        return report.version, None

    def done(self, step: int, version: int, results: Any) -> None:
        """Store the results and let go of every engine; one that waits starts. Telling it twice changes nothing else.

        Raises RunFailed when there is no such evaluation.
        """
        with self._db.transaction() as sql:
            ends = self.running
            change = sql.execute(
                "UPDATE evals SET results = ? WHERE step = ? AND version = ?", (json.dumps(results), step, version)
            )
            if change.rowcount != 1:
                raise RunFailed(f"there is no evaluation of version {version} at step {step}")
            if ends is not None and ends.version == version:
                self._released.clear()
                self._start(sql)

    def rewind(self, version: int) -> None:
        """Inside a transaction of the caller: training goes on from `version`, and makes every later one again.

        No version is announced until the trainer has published: an engine must not fetch files that are being written
        anew. Evaluations of later versions are forgotten, finished or not: they would speak of other weights. What
        became due before is due still, and takes the version that is announced first.
        """
        self._db.rows("DELETE FROM versions")
        self._db.rows("DELETE FROM evals WHERE due_step > ?", version)
        self._db.rows("UPDATE evals SET step = NULL, version = NULL, results = NULL WHERE version > ?", version)
        if not self._settings.eval_every:  # switched off since: nobody would do what is due still
            self._db.rows("DELETE FROM evals WHERE results IS NULL")
        self._db.rows("UPDATE evals SET served = 0 WHERE results IS NULL")  # the engines are new: none is past it
        self._released.clear()
        self.engines.clear()

    def document(self) -> list[EvaluationStatus]:
        """Every evaluation, for the terminal."""
        return [
            EvaluationStatus(
                due_step=due_step,
                step=step,
                version=version,
                state="done" if results is not None else "waiting" if version is None else "running",
                results=None if results is None else json.loads(results),
            )
            for due_step, step, version, results in self._db.rows(
                "SELECT due_step, step, version, results FROM evals ORDER BY due_step"
            )
        ]
