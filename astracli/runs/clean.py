"""Free the disk of ended runs, and end what a run left behind whose supervisor was killed."""

from __future__ import annotations

import contextlib
import os
import shutil
import sqlite3
import time
from pathlib import Path

import psutil

from astracli.process.console import say
from astracli.runs.find import list_runs
from astracli.runs.run_dir import RunDir


def clean(run: RunDir, *, dry_run: bool) -> int:
    """Remove what only a running run needs: published weights, child configurations, staged payloads. Returns bytes.

    Recipe, metrics, samples, evaluation, logs, checkpoints and export stay; the weights too while an evaluation of an
    earlier version is still owed, which a resumed run would do first. The caller has made sure that it ended.
    """
    freed = 0
    for folder in (*(() if _owes_evaluation(run) else (run.weights,)), run.config, run.stage):
        if folder.is_dir():
            freed += sum(file.lstat().st_size for file in folder.rglob("*") if file.is_file())
            if not dry_run:
                shutil.rmtree(folder)
    return freed


def dead(root: Path) -> list[RunDir]:
    """Runs under `root` that say `running` although their supervisor on this host is gone, newest first."""
    found = []
    for run in list_runs(root):
        status = run.readable_status()
        if status is not None and status.state == "running" and not status.alive() and not run.in_use():
            found.append(run)
    return found


def leftovers(run: RunDir) -> list[tuple[int, str]]:
    """(process id, module) of processes of this user that work on a configuration inside the run's directory."""
    home, found = run.path.resolve(), []
    for process in psutil.process_iter(["pid", "cmdline", "uids"]):
        words, uids = process.info["cmdline"] or [], process.info["uids"]
        if uids is None or uids.real != os.getuid():
            continue
        words = [word for word in words if word != "-P"]
        if len(words) < 4:
            continue
        # the supervisor hands every child the absolute path of its configuration, which lies in the run directory
        ours = words[1] == "-m" and words[2].startswith("astracli.") and Path(words[3]).is_absolute()
        if ours and Path(words[3]).resolve().is_relative_to(home):
            found.append((process.info["pid"], words[2]))
    return found


def end_leftovers(run: RunDir, wait_s: float = 10.0) -> list[int]:
    """End the processes that a dead run left, each by its id: TERM, then KILL. Returns the ids.

    The caller has made sure that the run's supervisor is gone.
    """
    processes = []
    for pid, _ in leftovers(run):
        with contextlib.suppress(psutil.NoSuchProcess):
            processes.append(psutil.Process(pid))
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.terminate()
    _, stubborn = psutil.wait_procs(processes, timeout=wait_s)
    for process in stubborn:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(stubborn, timeout=wait_s)
    return [process.pid for process in processes]


def _owes_evaluation(run: RunDir) -> bool:
    """An evaluation was announced and not done: its version is on disk and nowhere else."""
    if not run.hub_sqlite.is_file():
        return False
    with contextlib.closing(sqlite3.connect(run.hub_sqlite)) as hub:
        try:
            return hub.execute("SELECT 1 FROM evals WHERE results IS NULL").fetchone() is not None
        except sqlite3.DatabaseError:
            return True  # not to be known


def cleanable(root: Path, *, older_than_s: float, resumable: bool) -> list[RunDir]:
    """Ended runs under `root`: those that are done, with `resumable` also failed, interrupted and dead ones."""
    now, found, foreign = time.time(), [], list[str]()
    for run in list_runs(root):
        status = run.readable_status()
        if status is None or not run.own() or run.in_use() or run.going():
            if status is not None and not run.own():
                foreign.append(run.name)
            continue
        ended = status.ended or run.status_json.stat().st_mtime
        if (status.state == "done" or resumable) and now - ended >= older_than_s:
            found.append(run)
    if foreign:
        more = f" and {len(foreign) - 3} more" if len(foreign) > 3 else ""
        say(f"note: left alone under `{root}`, another user's: {', '.join(foreign[:3])}{more}")
    return found
