"""The run directory: where everything of a run lies, who holds it, and what state the run is in."""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import time
from collections.abc import Sequence
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import psutil

from astracli.config import reading
from astracli.errors import FULL, UserError
from astracli.process import identity
from astracli.process.atomic import write_atomic
from astracli.process.console import TYPED
from astracli.runs.status import RunStatus, State, status_text

ORIGIN = "astra_export.json"
"""Beside the weights of an export: the steps that they were trained, and the layout, the source's or text only."""
JOB_LOG = "job.log"
"""In `logs`: what the job of a queue writes, of all attempts."""
ORPHANS_S = 20.0
"""Children look for their supervisor each second, and give an unreachable hub ten."""


class RunDir:
    """Paths of one run. `runs.create` and `runs.resume` also hold its lock, so that two supervisors never share it."""

    def __init__(self, path: Path):
        self.path = path = Path(path)
        self.recipe_json = path / "recipe.json"
        self.plan_json = path / "plan.json"
        self.status_json = path / "status.json"
        self.metrics_jsonl = path / "metrics.jsonl"
        self.summary_json = path / "summary.json"
        """The summary figures; written when an attempt ends."""
        self.job_json = path / "job.json"
        """The job of a queue that starts the run; absent where none does."""
        self.changes_jsonl = path / "changes.jsonl"
        """What resumes changed in the recipe (`runs.changes`)."""
        self.hub_sqlite = path / "hub.sqlite"
        self.weights = path / "weights"
        self.checkpoints = path / "checkpoints"
        self.eval = path / "eval"
        self.eval_csv = self.eval / "eval.csv"
        self.samples = path / "samples"
        self.export = path / "export"
        self.config = path / "config"
        self.stage = path / "stage"
        """Weight payloads on their way into an engine, one folder per engine."""
        self.logs = path / "logs"
        self._status: RunStatus | None = None
        """What this process wrote last; it alone writes while the run goes on."""
        self.lock_fd: int | None = None
        """The file descriptor that holds the lock, inherited by every child; None when it is not held."""

    @property
    def name(self) -> str:
        return self.path.resolve().name

    def attempt_logs(self, attempt: int) -> Path:
        """`logs/attempt_N`: one file per process and attempt, N from 1."""
        return self.logs / f"attempt_{attempt}"

    def attempts(self) -> list[int]:
        """Numbers of the attempts that left logs, oldest first."""
        numbers = (p.name.removeprefix("attempt_") for p in self.logs.glob("attempt_*"))
        return sorted(int(n) for n in numbers if n.isdigit())

    def next_attempt(self) -> int:
        """The number of a new attempt; makes its log folder."""
        number = max(self.attempts(), default=0) + 1
        self.attempt_logs(number).mkdir(parents=True)
        return number

    # -- who holds it --------------------------------------------------------------------------------------------------

    def lock(self, orphans_s: float = ORPHANS_S) -> None:
        """Take the run for this process until `unlock` or its end. Raises UserError when another one holds it.

        Children inherit `lock_fd`: a supervisor that was killed leaves the run held until the last of them has seen it
        and ended. They would write checkpoints and weights under a resume; it waits `orphans_s` for them.
        """
        try:
            fd = os.open(self.path / ".lock", os.O_RDWR | os.O_CREAT, 0o600)
        except PermissionError:
            raise UserError(
                f"run directory `{self.path}` belongs to another user, or cannot be written",
                "only the user who started a run can go on with it; copy the directory to have it as your own",
            ) from None
        deadline = time.monotonic() + orphans_s
        while not self._locked(fd):
            holder = os.pread(fd, 32, 0).decode(errors="replace").strip()
            orphans = holder.isdigit() and not _lives(int(holder))
            if orphans and time.monotonic() < deadline:
                time.sleep(0.05)
                continue
            os.close(fd)
            raise UserError(
                f"run directory `{self.path}` is in use by "
                + (f"what process {holder} left running" if orphans else f"process {holder or 'unknown'}"),
                f"wait for it, stop it with `astra runs stop {self.path}`, or give another --run-dir",
            )
        os.ftruncate(fd, 0)
        os.pwrite(fd, str(os.getpid()).encode(), 0)
        self.lock_fd = fd

    def _locked(self, fd: int) -> bool:
        try:
            return _flock(fd)
        except OSError as error:
            os.close(fd)
            raise UserError(
                f"run directory `{self.path}` lies on a file system that takes no locks: "
                f"{(error.strerror or str(error)).lower()}",
                "two runs in one directory could not be told apart there: give a --run-dir on a local disk, or mount "
                "it with locks (NFS needs its lock daemon)",
            ) from None

    def unlock(self) -> None:
        """Let go of the run; does nothing when it is not held."""
        if self.lock_fd is not None:
            os.close(self.lock_fd)
            self.lock_fd = None

    @property
    def held(self) -> bool:
        """Whether this object holds the lock."""
        return self.lock_fd is not None

    def own(self) -> bool:
        """Whether this user may change the run: write into its directory, and take its lock."""
        lock = self.path / ".lock"
        return _may(self.path, os.R_OK | os.W_OK | os.X_OK) and (not lock.exists() or _may(lock, os.R_OK | os.W_OK))

    def readable(self) -> bool:
        """Whether this user may look at it."""
        files = [file for file in (self.recipe_json, self.status_json) if reading.is_file(file)]
        return _may(self.path, os.R_OK | os.X_OK) and all(_may(file, os.R_OK) for file in files)

    def in_use(self) -> bool:
        """True when a process holds the lock, or when that cannot be known: it is another user's run."""
        if self.held:
            return True
        try:
            fd = os.open(self.path / ".lock", os.O_RDWR)
        except FileNotFoundError:
            return False
        except PermissionError:
            return True
        try:
            return not _flock(fd)
        except OSError:  # a file system without locks: no run began there
            return False
        finally:
            os.close(fd)

    # -- what state it is in -------------------------------------------------------------------------------------------

    def status(self) -> RunStatus | None:
        """What `status.json` says; None when the run never started. Raises UserError when it cannot be read."""
        try:
            document = reading.document(self.status_json)
            known = {each.name for each in fields(RunStatus)}
            return RunStatus(**{key: value for key, value in document.items() if key in known})
        except FileNotFoundError:
            return None
        except OSError as error:
            words = (error.strerror or str(error)).lower()
            raise UserError(f"cannot read `{self.status_json}`: {words}") from None
        except (ValueError, TypeError, AttributeError) as error:
            raise UserError(
                f"`{self.status_json}` is damaged: {error}", "remove it: a resume does without it, and writes a new one"
            ) from None

    def readable_status(self) -> RunStatus | None:
        """`status`, and None for a damaged file: to look through many runs, of which `runs list` names the damaged."""
        try:
            return self.status()
        except UserError:
            return None

    def going(self) -> bool:
        """True while its supervisor lives (on another host: while it says so)."""
        status = self.status()
        return status is not None and status.state == "running" and status.alive()

    def shown_state(self) -> str:
        """The run's state in words; `not started` without a `status.json`, `submitted` where a job is to start it."""
        status = self.status()
        if status is not None:
            return status.shown()
        return "submitted" if reading.is_file(self.job_json) else "not started"

    def start(
        self, *, recipe: str, command: str = "train", attempt: int = 1, steps: int | None = None, step: int = 0
    ) -> None:
        """Record that this process runs the run now."""
        me = identity.of(os.getpid())
        self._write(
            RunStatus(
                "running", me.pid, me.create_time, socket.gethostname(), time.time(),
                attempt=attempt, step=step, steps=steps, command=command, recipe=recipe, typed=TYPED.get(),
                boot=me.boot, ticks=me.ticks,
            )
        )  # fmt: skip

    def update(self, **changes: Any) -> None:
        """Change fields of `status.json`, for example `step=12`. The run must have been started."""
        status = self._status or self.status()
        assert status is not None, "update() before start()"
        self._write(RunStatus(**(asdict(status) | changes)))

    def end(
        self,
        state: State,
        *,
        exit_code: int,
        cause: str | None = None,
        last_lines: Sequence[str] = (),
        hint: str | None = None,
    ) -> None:
        """Record how the run ended."""
        said = {"cause": cause, "last_lines": list(last_lines), "hint": hint}
        self.update(state=state, exit_code=exit_code, ended=time.time(), phase="", waits={}, **said)

    def _write(self, status: RunStatus) -> None:
        """On a full disk it is written into the blocks that the file has: what it says must stay true."""
        if not self.path.is_dir():
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(self.path))
        self._status = status
        try:
            write_atomic(self.status_json, status_text(status))
        except OSError as error:
            if error.errno not in FULL or not self.status_json.is_file():
                raise
            short = status_text(replace(status, last_lines=[], hint=None))
            with self.status_json.open("r+", encoding="utf-8") as file:
                file.write(short)
                file.truncate()


def _may(path: Path, mode: int) -> bool:
    return os.access(path, mode, effective_ids=os.access in os.supports_effective_ids)


def _lives(pid: int) -> bool:
    """Whether a process runs."""
    try:
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def _flock(fd: int) -> bool:
    """Take the lock of an open file; False when another holds it."""
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def paths(run_dir: Path) -> dict[str, str]:
    """What lies where, of what is there."""
    run = RunDir(run_dir)
    places = {
        "run": run.path,
        "export": run.export,
        "evaluations": run.eval_csv,
        "metrics": run.metrics_jsonl,
        "samples": run.samples,
        "checkpoints": run.checkpoints,
        "logs": run.logs,
        "report": run.path / "report.html",
    }
    return {name: str(place) for name, place in places.items() if place.exists()}
