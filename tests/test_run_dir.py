"""The run directory: names, refusals, the lock between real processes, and the state of a dead run."""

from __future__ import annotations

import contextlib
import json
import os
import re
import subprocess
import sys
import threading
from pathlib import Path

import psutil
import pytest

from astracli.errors import UserError
from astracli.process.atomic import write_atomic
from astracli.report import run_files
from astracli.runs import find as runs
from astracli.runs.run_dir import RunDir

HOLDER = (
    "import sys, pathlib; from astracli.runs import find as runs; "
    "r = runs.{call}; print('held', flush=True); sys.stdin.read()"
)


def recipe_in(path: Path) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    (path / "recipe.json").write_text("{}")
    return path


def holder(call: str) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER.format(call=call)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None and process.stdout.readline() == "held\n"
    return process


def test_default_name_and_two_in_one_second(tmp_path: Path) -> None:
    three = [runs.create("my recipe", root=tmp_path) for _ in range(3)]
    assert len({run.path for run in three}) == 3
    assert all(re.fullmatch(r"my-recipe-\d{8}-\d{6}(-\d)?", run.name) for run in three)


def test_paths(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    assert run.recipe_json == tmp_path / "recipe.json"
    assert run.attempt_logs(2) == tmp_path / "logs" / "attempt_2"
    assert run.eval_csv == tmp_path / "eval" / "eval.csv"
    assert (run.next_attempt(), run.next_attempt(), run.attempts()) == (1, 2, [1, 2])


def test_an_empty_directory_is_taken_a_used_one_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    run = runs.create("r", tmp_path / "a")
    recipe_in(run.path)
    run.unlock()
    with pytest.raises(UserError) as caught:
        runs.create("r", tmp_path / "a")
    assert caught.value.message == f"run directory `{tmp_path / 'a'}` was used before (state: not started)"
    assert caught.value.hint == (
        f"continue it with `astra train --resume {tmp_path / 'a'}`, give another --run-dir, leave --run-dir out for a "
        f"new name under runs/, or remove it with `rm -r {tmp_path / 'a'}`"
    )


def test_a_directory_with_other_things_and_a_file_are_refused(tmp_path: Path) -> None:
    (tmp_path / "photo.jpg").write_text("x")
    with pytest.raises(UserError, match="is not empty and holds no run"):
        runs.create("r", tmp_path)
    with pytest.raises(UserError, match="is a file, not a run directory"):
        runs.create("r", tmp_path / "photo.jpg")


def test_two_processes_never_share_a_run(tmp_path: Path) -> None:
    recipe_in(tmp_path / "a")
    process = holder(f"resume(pathlib.Path({str(tmp_path / 'a')!r}))")
    try:
        assert RunDir(tmp_path / "a").in_use()
        with pytest.raises(UserError) as caught:
            runs.resume(tmp_path / "a")
        assert caught.value.message == f"run directory `{tmp_path / 'a'}` is in use by process {process.pid}"
    finally:
        process.communicate("")
    run = runs.resume(tmp_path / "a")
    assert run.held and not (run.unlock() or run.held)
    assert not RunDir(tmp_path / "a").in_use()


def test_a_killed_holder_frees_the_run(tmp_path: Path) -> None:
    process = holder(f"create('r', pathlib.Path({str(tmp_path / 'a')!r}))")
    process.kill()
    process.communicate()
    assert runs.create("r", tmp_path / "a").held


def test_resume_wants_a_run(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is no run: it does not exist"):
        runs.resume(tmp_path / "nope")
    with pytest.raises(UserError, match=r"is no run: it holds no recipe\.json"):
        runs.resume(tmp_path)


def test_state_from_start_to_end(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    assert run.shown_state() == "not started"
    run.start(recipe="r", steps=10, attempt=2)
    run.update(step=4)
    status = run.status()
    assert status is not None
    assert (status.state, status.pid, status.step, status.steps, status.attempt) == ("running", os.getpid(), 4, 10, 2)
    assert status.create_time == psutil.Process().create_time() and run.shown_state() == "running"
    run.end("failed", exit_code=1, cause="trainer: signal 9 (SIGKILL)")
    ended = run.status()
    assert ended is not None and ended.ended is not None and ended.ended >= status.started
    assert (ended.state, ended.exit_code, ended.cause, ended.step) == ("failed", 1, "trainer: signal 9 (SIGKILL)", 4)
    assert [p.name for p in tmp_path.iterdir()] == ["status.json"]


def test_a_run_without_its_process_is_dead(tmp_path: Path) -> None:
    run = RunDir(recipe_in(tmp_path))
    child = subprocess.Popen([sys.executable, "-c", "pass"])
    child.wait()
    run.start(recipe="r")
    run.update(pid=child.pid)
    assert run.shown_state() == "dead (resumable)"
    run.update(pid=os.getpid(), create_time=1.0, boot=None)  # the pid was given to another process since
    assert run.shown_state() == "dead (resumable)"
    run.update(host="elsewhere")
    assert run.shown_state() == "running on elsewhere"


def test_a_damaged_status_is_said(tmp_path: Path) -> None:
    run = RunDir(recipe_in(tmp_path / "a"))
    run.status_json.write_text("{")
    with pytest.raises(UserError, match="is damaged"):
        run.status()
    assert run_files.row(run)["state"].startswith("unknown: ")
    assert [r.name for r in runs.list_runs(tmp_path)] == ["a"]


def test_newest_is_the_one_that_started_last(tmp_path: Path) -> None:
    assert runs.newest(tmp_path) is None
    for name, started in (("a", 30.0), ("b", 10.0), ("c", 20.0)):
        run = RunDir(recipe_in(tmp_path / name))
        run.start(recipe="r")
        run.update(started=started)
    (tmp_path / "stray").mkdir()
    found = runs.newest(tmp_path)
    assert found is not None and found.name == "a"
    assert [run.name for run in runs.list_runs(tmp_path)] == ["a", "c", "b"]


def test_write_atomic_keeps_the_mode_and_leaves_nothing(tmp_path: Path) -> None:
    write_atomic(tmp_path / "x.json", json.dumps({"a": 1}), mode=0o600)
    assert (tmp_path / "x.json").stat().st_mode & 0o777 == 0o600
    assert [p.name for p in tmp_path.iterdir()] == ["x.json"]


def test_a_killed_supervisor_holds_the_run_until_its_children_are_gone(tmp_path: Path) -> None:
    recipe_in(tmp_path)
    code = (
        "import subprocess, sys, pathlib; from astracli.runs import find as runs; "
        f"r = runs.resume(pathlib.Path({str(tmp_path)!r})); "
        "c = subprocess.Popen(['sleep', '60'], pass_fds=(r.lock_fd,)); print(c.pid, flush=True); sys.stdin.read()"
    )
    supervisor = subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert supervisor.stdout is not None
    child = psutil.Process(int(supervisor.stdout.readline()))
    try:
        supervisor.kill()
        supervisor.wait()
        run = RunDir(tmp_path)
        with pytest.raises(UserError, match=f"in use by what process {supervisor.pid} left running"):
            run.lock(orphans_s=0.1)
        assert run.in_use()
        threading.Timer(0.3, child.kill).start()
        run.lock(orphans_s=20.0)
        assert run.held and (not child.is_running() or child.status() == psutil.STATUS_ZOMBIE)
    finally:
        with contextlib.suppress(psutil.NoSuchProcess):
            child.kill()
