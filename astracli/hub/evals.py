"""Versions, engines and evaluations: which version an engine should hold, and which evaluation may run.

A version is announced once it is stable on disk; the evaluation that it calls for is written in the same transaction,
with the engine that will serve it. That engine's target stays at the evaluated version until the evaluation is done;
the others follow the latest. What engines report lives in memory: after a restart they report again.
"""

from __future__ import annotations

import json
from typing import Any

from astracli.errors import RunFailed
from astracli.hub.schema import Database


class EvalBoard:
    """Part of the store; every method is safe from any thread."""

    def __init__(self, database: Database, *, steps: int, eval_every: int, engines: list[str]):
        self._db = database
        self._steps = steps
        self._every = eval_every
        self._names = list(engines)
        self.engines: dict[str, dict[str, Any]] = {}
        """Last report of each engine: {"version", "state", ...}."""

    @property
    def latest(self) -> int | None:
        """Newest announced version; None before the first."""
        row = self._db.one("SELECT MAX(version) FROM versions")
        return None if row is None or row[0] is None else int(row[0])

    @property
    def latest_step(self) -> int:
        """Step of the newest announced version; -1 before the first."""
        return self._db.scalar("SELECT COALESCE(MAX(step), -1) FROM versions")

    def pending(self) -> list[tuple[int, int, str]]:
        """[(step, version, engine)] of evaluations that are not done, oldest version first."""
        rows = self._db.rows("SELECT step, version, engine FROM evals WHERE results IS NULL ORDER BY version")
        return [(int(step), int(version), str(engine)) for step, version, engine in rows]

    def _is_due(self, step: int) -> bool:
        return self._every > 0 and (step % self._every == 0 or step == self._steps)

    def announce(self, version: int, step: int) -> dict[str, Any]:
        """A version is stable on disk. Telling it twice changes nothing.

        -> {"eval": whether an evaluation of this step is pending, "pinned": versions that must stay on disk}.
        """
        with self._db.transaction() as sql:
            sql.execute("INSERT OR IGNORE INTO versions (version, step) VALUES (?, ?)", (version, step))
            if self._is_due(step) and self._names:
                turn = self._db.scalar("SELECT COUNT(*) FROM evals WHERE step < ?", step)
                engine = self._names[turn % len(self._names)]
                sql.execute(
                    "INSERT OR IGNORE INTO evals (step, version, engine) VALUES (?, ?, ?)", (step, version, engine)
                )
        pending = self.pending()
        return {"eval": any(item[0] == step for item in pending), "pinned": [item[1] for item in pending]}

    def target(self, engine: str) -> tuple[int | None, bool]:
        """(version that the engine should hold or None, whether an evaluation pins it there)."""
        latest = self.latest
        pinned = [version for _, version, name in self.pending() if name == engine]
        return (pinned[0], True) if pinned and latest is not None else (latest, False)

    def report(self, engine: str, document: dict[str, Any]) -> None:
        """What an engine holds: {"version", "state": ready|updating|down, ...}."""
        with self._db.lock:
            self.engines[engine] = document

    def down(self, engine: str) -> bool:
        """Whether it was lost, and has not been reported ready since."""
        return self.engines.get(engine, {}).get("state") == "down"

    def next(self) -> tuple[dict[str, Any] | None, str]:
        """(the evaluation that can run now or None, what is waited for as a noun phrase).

        An evaluation can run when its engine has reported that it is ready at that version.
        """
        pending = self.pending()
        for step, version, engine in pending:
            report = self.engines.get(engine, {})
            if report.get("state") == "ready" and report.get("version") == version:
                return {"step": step, "version": version, "engine": engine}, ""
        if not pending:
            return None, f"the next version to evaluate; the latest is {self.latest}"
        step, version, engine = pending[0]
        report = self.engines.get(engine, {"version": None, "state": "starting"})
        at = "" if report["version"] is None else f" at {report['version']}"
        return None, f"{engine} to hold version {version}; it is {report['state']}{at}"

    def version_of(self, engine: str | None) -> tuple[int, str | None]:
        """(version at which a new group would start, None or what it waits for).

        Without an engine: the oldest version of any ready one, else the latest announced.
        """
        if engine is None:
            ready = [int(r["version"]) for r in self.engines.values() if r["state"] == "ready"]
            return min(ready, default=self.latest or 0), None
        report = self.engines.get(engine)
        if report is None or report["state"] != "ready":
            return 0, f"{engine}, which is {report['state'] if report else 'starting'}"
        return int(report["version"]), None

    def done(self, step: int, version: int, results: Any) -> None:
        """Store the results and let go of the engine. Raises RunFailed when there is no such evaluation."""
        with self._db.transaction() as sql:
            change = sql.execute(
                "UPDATE evals SET results = ? WHERE step = ? AND version = ?", (json.dumps(results), step, version)
            )
            if change.rowcount != 1:
                raise RunFailed(f"there is no evaluation of version {version} at step {step}")

    def rewind(self, version: int) -> None:
        """Inside a transaction of the caller: training goes on from `version`, and makes every later one again.

        No version is announced until the trainer has published: an engine must not fetch files that are being written
        anew. Finished evaluations of later versions are forgotten too: they would speak of other weights.
        """
        self._db.rows("DELETE FROM versions")
        self._db.rows("DELETE FROM evals WHERE version > ?", version)
        self.engines.clear()

    def document(self) -> list[dict[str, Any]]:
        """Every evaluation for the terminal."""
        rows = self._db.rows("SELECT step, version, engine, results FROM evals ORDER BY step")
        return [
            {
                "step": step,
                "version": version,
                "engine": engine,
                "state": "pending" if results is None else "done",
                "results": None if results is None else json.loads(results),
            }
            for step, version, engine, results in rows
        ]
