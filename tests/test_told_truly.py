"""What a run says of itself stays true: after a step of the clock, on a full disk, beside runs of other users, with
damaged checkpoints, without its directory, and with a supervisor that stands still."""

from __future__ import annotations

import errno
import json
import os
import socket
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from hub_tools import open_store

from astracli.cli.main import run as astra
from astracli.errors import RunFailed, UserError, disk_full
from astracli.hub import client as hub_client
from astracli.hub.api import build_app
from astracli.hub.client import HubClient
from astracli.launch import recipe_changes
from astracli.launch.place import Place
from astracli.process import identity, patience, ports
from astracli.process.atomic import write_atomic
from astracli.process.server import ServerThread
from astracli.report import summary_table  # noqa: F401  before `somebody`, who may not read the packages
from astracli.runs import clean, find, run_dir
from astracli.runs.run_dir import RunDir
from astracli.runs.status import STATUS_BYTES, RunStatus
from astracli.training import checkpoint


def a_run(path: Path, state: str = "done", ended: float = 2.0) -> RunDir:
    path.mkdir(parents=True)
    run = RunDir(path)
    run.recipe_json.write_text("{}")
    status = RunStatus(state, 1, 1.0, "x", 1.0, ended=ended)  # type: ignore[arg-type]
    run.status_json.write_text(json.dumps(vars(status)))
    return run


# ---- the clock


def test_a_step_of_the_clock_does_not_make_a_live_run_dead(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """psutil computes a process's start from the clock; the kernel's own count of ticks does not change."""
    run = a_run(tmp_path / "a")
    run.start(recipe="r")
    began = psutil.Process().create_time()
    monkeypatch.setattr(psutil.Process, "create_time", lambda self: began + 3600)
    assert run.going() and run.shown_state() == "running"
    run.update(ticks=1)  # the id was given to another process since
    assert not run.going()
    run.update(ticks=identity.of(os.getpid()).ticks, boot="another")
    assert not run.going(), "of an earlier boot"


def test_a_zombie_and_nobody_do_not_live() -> None:
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    found = identity.of(child.pid)
    assert found.lives() and found.ticks is not None and found.boot is not None
    child.kill()
    while psutil.Process(child.pid).status() != psutil.STATUS_ZOMBIE:
        time.sleep(0.01)
    assert not found.lives()
    child.wait()
    assert not found.lives()


# ---- a full disk


def test_on_a_full_disk_the_status_says_how_the_run_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = a_run(tmp_path / "a")
    run.start(recipe="r", steps=9)
    assert run.status_json.stat().st_size == STATUS_BYTES
    blocks = run.status_json.stat().st_ino

    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(run_dir, "write_atomic", full)
    run.end("failed", exit_code=1, cause="x" * 300)
    status = RunDir(run.path).status()
    assert status is not None and (status.state, status.exit_code, status.cause) == ("failed", 1, "x" * 300)
    assert run.status_json.stat().st_ino == blocks and run.status_json.stat().st_size == STATUS_BYTES


def test_a_write_that_fails_leaves_no_half_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.replace", full)
    with pytest.raises(OSError, match="No space"):
        write_atomic(tmp_path / "a", "text")
    assert not list(tmp_path.iterdir())


def test_a_limit_on_file_sizes_is_named_where_sqlite_does_not() -> None:
    found = disk_full(sqlite3.OperationalError("disk I/O error"))
    assert found is not None and found.exit_code == 1 and "limit on file sizes" in found.message
    assert disk_full(sqlite3.OperationalError("no such table: x")) is None


# ---- other users


@pytest.fixture
def somebody() -> Iterator[None]:
    """This process as a user who owns nothing here, for the length of a test. Its real user may come back."""
    if os.geteuid() != 0:
        pytest.skip("needs root, to be another user")
    os.setegid(65534)
    os.seteuid(65534)
    yield
    os.seteuid(0)
    os.setegid(0)


@pytest.fixture
def shared(tmp_path: Path) -> Path:
    """runs/ with a run of root, one whose directory is closed, and one of nobody's."""
    root = tmp_path / "runs"
    for name in ("closed", "mine", "theirs"):
        run = a_run(root / name)
        (run.path / ".lock").touch(0o600)
        (run.weights).mkdir()
        (run.weights / "x").write_bytes(b"0" * 1000)
    (root / "closed").chmod(0o700)
    if os.geteuid() == 0:
        for path in (root / "mine", *(root / "mine").rglob("*")):
            os.chown(path, 65534, 65534)
    for parent in (tmp_path, *tmp_path.parents[:3]):
        parent.chmod(parent.stat().st_mode | 0o055)
    return root


def test_runs_of_other_users_are_left_alone(shared: Path, somebody: None, capsys: pytest.CaptureFixture[str]) -> None:
    assert [run.name for run in find.list_runs(shared)] == ["theirs", "mine"]
    assert astra(["runs", "clean", "--root", str(shared), "--older-than", "0"]) == 0
    said = capsys.readouterr()
    assert said.err.count("\n") == 2 and "closed" in said.err and "another user's: theirs" in said.err
    assert not (shared / "mine" / "weights").exists() and (shared / "theirs" / "weights" / "x").exists()
    assert clean.dead(shared) == [] and RunDir(shared / "theirs").in_use()
    with pytest.raises(UserError, match="belongs to another user"):
        find.resume(shared / "theirs")
    with pytest.raises(UserError, match="cannot be read by this user"):
        find.existing(shared / "closed")


# ---- checkpoints


def checkpoints(directory: Path, *steps: int) -> None:
    for step in steps:
        place = checkpoint.place(directory, step)
        place.mkdir(parents=True)
        (place / "rank_0.bin").write_bytes(b"masters")
        (place / checkpoint.META).write_text(json.dumps({"format": checkpoint.FORMAT, "step": step}))
        files = {f.name: (f.stat().st_size, checkpoint.digest_of(f)) for f in place.iterdir()}
        (place / checkpoint.COMPLETE).write_text(json.dumps({"files": files}))


def test_a_damaged_checkpoint_is_said_with_what_it_costs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = a_run(tmp_path / "a")
    checkpoints(run.checkpoints, 2, 4, 6)
    assert recipe_changes.checkpoint_step(run) == 6 and capsys.readouterr().err == ""
    (checkpoint.place(run.checkpoints, 6) / "rank_0.bin").write_bytes(b"mAsters")
    assert recipe_changes.checkpoint_step(run) == 4
    said = capsys.readouterr().err
    assert "1 checkpoint is damaged" in said and "step_000006" in said
    assert "goes on from the one of step 4, 2 steps are trained again" in said
    for step in (2, 4):
        (checkpoint.place(run.checkpoints, step) / checkpoint.META).unlink()
    assert recipe_changes.checkpoint_step(run) == 0
    said = capsys.readouterr().err
    assert "3 checkpoints are damaged" in said and "goes on from the beginning, 6 steps are trained again" in said


# ---- the place of a run


def test_a_directory_that_was_moved_or_replaced_is_the_cause(tmp_path: Path) -> None:
    run = a_run(tmp_path / "a")
    run.hub_sqlite.touch()
    place = Place(run)
    assert place.fault() is None
    run.hub_sqlite.unlink()
    fault = place.fault()
    assert fault is not None and "hub.sqlite" in fault.message and "was moved or removed" in fault.message
    run.hub_sqlite.touch()
    os.link(run.hub_sqlite, run.path / "kept")
    (run.path / "new").touch()
    os.replace(run.path / "new", run.hub_sqlite)
    fault = place.fault()
    assert fault is not None and "was replaced by another" in fault.message
    run.path.rename(tmp_path / "b")
    fault = place.fault()
    assert fault is not None and f"run directory `{run.path}` was moved or removed" in fault.message


def test_the_end_of_a_run_without_its_directory_is_no_assertion(tmp_path: Path) -> None:
    run = a_run(tmp_path / "a")
    run.start(recipe="r")
    run.path.rename(tmp_path / "b")
    with pytest.raises(FileNotFoundError):
        run.end("failed", exit_code=1, cause="moved")
    assert not run.path.exists(), "nothing is left where it was"


def test_a_resume_without_the_books_is_refused(tmp_path: Path) -> None:
    from test_launch import tiny

    run = a_run(tmp_path / "a", state="failed")
    checkpoints(run.checkpoints, 2)
    with pytest.raises(UserError, match=r"hub\.sqlite` is gone"):
        recipe_changes.resume_step(run, tiny())


# ---- a supervisor that stands still


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_patience_is_short_with_nobody_and_long_with_a_process_that_stands_still() -> None:
    clock = Clock()
    gone, silent = httpx.ConnectError("refused"), httpx.ReadTimeout("no answer")
    asking = patience.Patience(10, 600, clock)
    assert asking.exhausted(gone) is None
    clock.now = 9.0
    assert asking.exhausted(gone) is None and asking.exhausted(gone, ahead_s=2.0) == 10
    clock.now = 11.0
    assert asking.exhausted(gone) == 10
    asking = patience.Patience(10, 600, clock)
    for clock.now in (100.0, 130.0, 600.0):
        assert asking.exhausted(silent) is None
    clock.now = 650.0
    assert asking.exhausted(gone) is None, "it stood still, and has only now gone"
    clock.now = 661.0
    assert asking.exhausted(gone) == 10
    asking = patience.Patience(10, 600, clock)
    asking.exhausted(silent)
    clock.now += 601
    assert asking.exhausted(silent) == 600


def test_a_worker_outlives_a_hub_that_stands_still(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The socket takes connections and nobody answers, as of a process under SIGSTOP; then it goes on."""
    monkeypatch.setattr(hub_client, "RETRY_S", 0.2)
    monkeypatch.setattr(hub_client, "READ_TIMEOUT_S", 0.2)
    sock = ports.bind()
    sock.listen(64)
    url = ports.url(*sock.getsockname()[:2])
    started: list[ServerThread] = []
    app = build_app(open_store(tmp_path), "t")
    later = threading.Timer(1.0, lambda: started.append(ServerThread(app, sock).start()))
    later.start()
    try:
        with HubClient(url, "t") as hub:
            assert hub.state().steps == 10
    finally:
        later.join()
        started[0].stop()
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        with HubClient(ports.url(*nobody.getsockname()), "t") as hub, pytest.raises(RunFailed, match=r"for 0\.2 s"):
            hub.state()
