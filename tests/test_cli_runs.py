"""`astra runs`: what it prints of a run directory, what it stops, and what it removes."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import Ran
from run_cases import TINY, make_run

from astracli.process.console import TYPED
from astracli.report import run_files
from astracli.runs.run_dir import RunDir

Astra = Callable[..., Ran]


def test_runs_list(astra: Astra, runs: Path) -> None:
    make_run(runs / "old", started=10)
    make_run(runs / "new", started=20, state="failed")
    rows = json.loads(astra("runs", "list", "--json").out)
    assert [(r["run"], r["state"], r["step"], r["wall_s"]) for r in rows] == [
        ("new", "failed", 40, 60.0),
        ("old", "done", 40, 60.0),
    ]
    assert "40/100" in astra("runs", "list").out


def test_runs_status_joins_the_newest_figures_of_each_process(astra: Astra, runs: Path) -> None:
    run = make_run(runs / "a")
    records = [
        {"time": 1, "step": 1, "process": "trainer", "grad_norm": 0.5, "lr": 1e-4},
        {"time": 2, "step": 2, "process": "trainer", "grad_norm": 0.25},
        {"time": 2, "step": 2, "process": "rollout", "reward_mean": 0.75},
    ]
    run.metrics_jsonl.write_text("".join(json.dumps(r) + "\n" for r in records) + '{"torn')
    found = json.loads(astra("runs", "status", "a", "--json").out)
    assert found["figures"] == {
        "trainer": {"step": 2, "grad_norm": 0.25, "lr": 1e-4},
        "rollout": {"step": 2, "reward_mean": 0.75},
    }
    assert found["status"]["state"] == "done"


def test_runs_status_is_a_page(astra: Astra, runs: Path) -> None:
    run = make_run(runs / "a", state="failed")
    run.update(
        cause="`trainer` ended with exit code 1", last_lines=["  error: boom", "  hint: mend it"], hint="mend it"
    )
    records = [
        {"step": s, "process": "trainer", "arrived_reward_mean": 0.1 * s, "reward_mean": 0.9, "step_s": 2.0, "lr": 1e-4}
        for s in range(1, 4)
    ]
    records.append({"step": 4, "process": "trainer", "arrived_groups": 0, "arrived_reward_mean": 0.0})
    run.metrics_jsonl.write_text("".join(json.dumps(r) + "\n" for r in records))
    run.eval.mkdir()
    run.eval_csv.write_text(
        "step,version,benchmark,items,n,avg_at_n,stderr,k,pass_at_k\n"
        "0,0,arithmetic-heldout,256,8,0.375,0.02,4,0.6\n100,100,arithmetic-heldout,256,8,0.875,0.01,4,0.9\n"
    )
    (run.attempt_logs(run.next_attempt()) / "supervisor.log").write_text(
        "2026-11-30 20:00:00 step 3: the reward is flat\n"
    )
    ran = astra("runs", "status", "a")
    page = dict(line.split(None, 1) for line in ran.out.splitlines()[:8])
    assert (
        page["run"] == "a: failed"
        and page["what"] == f"train, recipe {TINY}"
        and page["began"].endswith(", 1 min 00 s")
    )
    assert page["step"].startswith("40 of 100 done, 2.00 s each (mean of the last ")
    assert page["reward"] == "0.3 of all that arrived for the newest step; 0.1 at first, mean of the last 3 steps 0.2"
    assert page["training"] == "learning rate 0.0001"
    assert page["evaluation"].startswith(
        "step 100: arithmetic-heldout avg@8 0.875 ± 0.010 pass@4 0.900; 0.375 at step 0"
    )
    assert "warning     step 3: the reward is flat" in ran.out
    assert ran.out.endswith("\n\n  error: boom\n  hint: mend it\n") and ran.err == "hint: mend it\n"
    found = json.loads(astra("runs", "status", "a", "--json").out)
    assert found["newest"]["arrived_reward_mean"] == {"words": "reward", "step": 3, "value": pytest.approx(0.3)}
    assert found["evaluation"][0]["last"] == 0.875 and found["status"]["last_lines"][0] == "  error: boom"


def test_runs_status_says_what_a_run_waits_for(astra: Astra, runs: Path) -> None:
    run = RunDir(runs / "a")
    run.path.mkdir(parents=True)
    run.recipe_json.write_text("{}")
    run.start(recipe=TINY, steps=80)
    run.update(step=3, phase="running", waits={"engine0": "ready", "trainer": "waiting for 3 of 16 groups"})
    shown = astra("runs", "status", "a").out
    assert "a: running" in shown and "since" in shown and "3 of 80 done" in shown
    assert "waits  trainer: waiting for 3 of 16 groups" in shown and "engine0" not in shown
    run.update(phase="finishing")
    assert "training is done, the last evaluations run" in astra("runs", "status", "a").out
    run.end("interrupted", exit_code=130)
    ran = astra("runs", "status", "a")
    assert "waits" not in ran.out and "go on with `astra train --resume" in ran.err


def test_a_bare_status_is_of_the_newest_training_run_and_says_what_was_typed(astra: Astra, runs: Path) -> None:
    for name, command in (("till", "train"), ("till-rollout", "rollout")):
        run = RunDir(runs / name)
        run.path.mkdir(parents=True)
        run.recipe_json.write_text("{}")
        token = TYPED.set(f"astra {command} './my till.toml'")
        run.start(recipe="till", command=command)
        TYPED.reset(token)
        run.end("done", exit_code=0)
    shown = astra("runs", "status").out
    assert shown.splitlines()[0].split() == ["run", "till:", "done"]
    assert "command  astra train './my till.toml'" in shown
    run = RunDir(runs / "till")
    groups = {"process": "trainer", "arrived_groups": 8}
    each = [groups | {"step": step, "arrived_dropped_groups": dropped} for step, dropped in enumerate((8, 4))]
    run.metrics_jsonl.write_text("".join(json.dumps(record) + "\n" for record in each))
    assert "dropped  75% of the groups so far, for equal rewards" in astra("runs", "status").out


def test_runs_logs(astra: Astra, runs: Path) -> None:
    run = make_run(runs / "a")
    for attempt, text in ((1, "old\n"), (2, "one\ntwo\nthree\n")):
        assert run.next_attempt() == attempt
        (run.attempt_logs(attempt) / "trainer.log").write_text(text)
    assert astra("runs", "logs", "a", "trainer", "-n", "2").out == "two\nthree\n"
    assert astra("runs", "logs", "-n", "2").out == "two\nthree\n", "of the newest run"
    lines = astra("runs", "logs", "a", "-n", "2", "--json").out.splitlines()
    assert [json.loads(line) for line in lines] == [{"process": "trainer", "line": word} for word in ("two", "three")]
    (run.attempt_logs(2) / "eval.log").touch()
    ran = astra("runs", "logs", "a", "-n", "1")
    assert (ran.out, ran.err) == ("three\n", "nothing in the log of eval\n")
    (run.attempt_logs(2) / "eval.log").unlink()
    ran = astra("runs", "logs", "a", "nope")
    assert ran.code == 2 and "hint: there are: trainer" in ran.err


def test_following_a_log_ends_with_the_run(tmp_path: Path) -> None:
    log = tmp_path / "trainer.log"
    log.write_text("before\n")
    turns = iter([True, True, False])

    def going() -> bool:
        with log.open("a") as file:
            file.write("half")
        return next(turns)

    assert [line for _, line in run_files.follow([log], going, interval_s=0)] == ["halfhalfhalf"]


def test_runs_stop_terms_the_recorded_supervisor_only(astra: Astra, runs: Path) -> None:
    import psutil

    run = make_run(runs / "a", state="running")
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    try:
        run.update(pid=child.pid, create_time=1.0, boot=None)  # not ours: another process has the pid now
        ran = astra("runs", "stop", "a")
        assert ran.code == 2 and "is not running (state: dead (resumable))" in ran.err
        assert child.poll() is None
        run.update(create_time=psutil.Process(child.pid).create_time(), boot=None)
        ran = astra("runs", "stop", "a")
        assert ran.code == 0 and not psutil.pid_exists(child.pid)
        assert ran.err.splitlines()[0] == f"stopped `runs/a` (supervisor {child.pid})"
        other = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
        run.update(pid=other.pid, create_time=psutil.Process(other.pid).create_time(), boot=None)
        stopped = json.loads(astra("runs", "stop", "a", "--json").out)
        assert (stopped["run"], stopped["pid"], stopped["state"]) == ("runs/a", other.pid, "dead (resumable)")
        other.wait()
    finally:
        child.kill()
        child.wait()


def test_runs_samples_filter(astra: Astra, runs: Path) -> None:
    run = make_run(runs / "a")
    run.samples.mkdir()

    def sample(step: int, verdict: str, finish: str) -> str:
        record = {"step": step, "version": step, "problem_id": f"p{step}", "problem": "1+1", "answer": "2"}
        record |= {"completion": "2", "tokens": [1, 2], "reward": float(verdict == "right"), "verdict": verdict}
        return json.dumps(record | {"finish_reason": finish}) + "\n"

    (run.samples / "000001.jsonl").write_text(sample(1, "right", "stop") + sample(1, "wrong", "length"))
    (run.samples / "000002.jsonl").write_text(sample(2, "timeout", "stop"))

    def shown(*options: str) -> list[tuple[int, str]]:
        return [(s["step"], s["verdict"]) for s in json.loads(astra("runs", "samples", "a", "--json", *options).out)]

    assert shown() == [(1, "right"), (1, "wrong"), (2, "timeout")]
    assert shown("--wrong") == [(1, "wrong"), (2, "timeout")]
    assert shown("--right", "--truncated") == [(1, "right"), (1, "wrong")]
    assert shown("--wrong", "--step", "1") == [(1, "wrong")]
    assert shown("-n", "1") == [(2, "timeout")]
    assert "problem: 1+1" in astra("runs", "samples", "a").out
    told = json.loads(sample(3, "right", "stop")) | {"parts": {"exact": 0.25}, "notes": {"why": "read 7"}}
    (runs.parent / "tried.jsonl").write_text(json.dumps(told) + "\n")
    shown = astra("runs", "samples", "tried.jsonl").out
    assert "  parts: exact 0.25\n  why: read 7\n" in shown, "the file of `astra rollout`"
    assert "no such samples; those of `astra rollout`" in astra("runs", "samples", "tried.jsonl", "--wrong").err


def test_runs_report_shows_first_last_and_difference(astra: Astra, runs: Path) -> None:
    run = make_run(runs / "a")
    run.eval.mkdir()
    run.eval_csv.write_text(
        "step,version,benchmark,items,n,avg_at_n,stderr,k,pass_at_k\n"
        "0,0,arithmetic-heldout,256,8,0.375,0.02,4,0.6\n"
        "100,100,arithmetic-heldout,256,8,0.875,0.01,4,0.9\n"
        "25,25,arithmetic-heldout,256,8,0.5,0.01,4,0.7\n"
    )
    run.metrics_jsonl.write_text(
        "".join(json.dumps({"step": s, "process": "trainer", "step_s": float(s)}) + "\n" for s in range(1, 21))
    )
    document = json.loads(astra("runs", "report", "a", "--json").out)
    (trend,) = document["evaluation"]
    assert (trend["first_step"], trend["first"], trend["last_step"], trend["last"]) == (0, 0.375, 100, 0.875)
    assert (trend["difference"], trend["pass_first"], trend["pass_last"]) == (0.5, 0.6, 0.9)
    assert document["figures"] == [{"figure": "seconds a step", "metric": "step_s", "first": 1.0, "last_tenth": 19.5}]
    assert "0.875" in astra("runs", "report", "a").out


def test_a_report_says_where_the_run_lies_now(astra: Astra, runs: Path) -> None:
    """A run that was moved since, whose summary names its old places."""
    run = make_run(runs / "here")
    run.summary_json.write_text(json.dumps({"paths": {"run": "runs/before", "export": "runs/before/export"}}))
    found = json.loads(astra("runs", "report", "here", "--json").out)["summary"]
    assert found["paths"] == {"run": "runs/here", "report": "runs/here/report.html"}


def test_an_evaluation_shows_its_results_and_answers(astra: Astra, runs: Path) -> None:
    run = make_run(runs / "e")
    run.update(command="eval")
    (run.eval / "items").mkdir(parents=True)
    row = {"step": 0, "version": 0, "benchmark": "b", "problem_id": "p", "problem": "1+1", "answer": "2"}
    row |= {"completion": "3", "tokens": [1], "reward": 0.0, "verdict": "wrong", "finish_reason": "stop"}
    (run.eval / "items" / "step_000000_b.jsonl").write_text(json.dumps(row) + "\n")
    figures = {"items": 1, "n": 1, "avg_at_n": 0.0, "stderr": 0.0, "k": 1, "pass_at_k": 0.0, "prompts_too_long": 1}
    figures |= {"grader": "number"}
    (run.eval / "results.json").write_text(json.dumps({"results": {"b": figures, "overall": figures}}))
    said = astra("runs", "report", "e").out
    assert "b          number  1      avg@1 0.000  " in said, "one item has no standard error"
    assert "b: 1 samples count as wrong: their prompt leaves no room in rollout.context_length" in said
    assert json.loads(astra("runs", "report", "e", "--json").out)["results"]["results"]["b"] == figures
    assert "completion: 3" in astra("runs", "samples", "e", "--wrong").out
    ran = astra("eval", TINY, "--out", str(run.path))
    assert ran.code == 2 and "holds an evaluation already (state: done)" in ran.err


def test_runs_clean_frees_what_it_says_and_keeps_results(astra: Astra, runs: Path) -> None:
    done = make_run(runs / "done")
    failed = make_run(runs / "failed", state="failed")
    recent = make_run(runs / "recent", started=time.time() - 120)
    for run in (done, failed, recent):
        for folder in (run.weights / "v000001", run.config, run.checkpoints, run.export):
            folder.mkdir(parents=True)
            (folder / "x").write_bytes(b"0" * 1000)
    assert json.loads(astra("runs", "clean", "--dry-run", "--json").out) == {
        "runs": [{"run": "runs/done", "bytes": 2000}],
        "bytes": 2000,
        "removed": False,
    }
    assert done.weights.is_dir()
    assert astra("runs", "clean").out.splitlines()[-1] == "freed 2 kB in 1 run"
    assert not done.weights.exists() and not done.config.exists()
    assert (done.checkpoints / "x").is_file() and (done.export / "x").is_file()
    assert failed.weights.is_dir() and recent.weights.is_dir()
    assert astra("runs", "clean", "--resumable", "--older-than", "0").out.splitlines()[-1] == "freed 4 kB in 2 runs"


def test_runs_clean_keeps_weights_that_an_evaluation_waits_for(astra: Astra, runs: Path) -> None:
    from astracli.hub.store import HubStore
    from astracli.hub.types import HubSettings

    run = make_run(runs / "a", state="interrupted")
    (run.weights / "v000000").mkdir(parents=True)
    (run.weights / "v000000" / "x").write_bytes(b"0" * 1000)
    limits: dict = {"batch_groups": 1, "max_staleness": 0, "lease_timeout_s": 1.0, "steps": 4, "eval_every": 2}
    store = HubStore(run.hub_sqlite, HubSettings(drop_equal_groups=False, engines=("engine0",), **limits))
    store.announce(0, 0)
    assert astra("runs", "clean", "a").out == "freed 0 B in 0 runs\n" and run.weights.is_dir()
    store.eval_done(0, 0, {})
    store.close()
    assert astra("runs", "clean", "a").out.endswith("freed 1 kB in 1 run\n") and not run.weights.exists()


def test_a_damaged_run_is_listed_and_keeps_no_other_from_being_cleaned(astra: Astra, runs: Path) -> None:
    (make_run(runs / "done").weights / "v000001").mkdir(parents=True)
    (runs / "done" / "weights" / "v000001" / "x").write_bytes(b"0" * 1000)
    make_run(runs / "hurt").status_json.write_text("{")
    assert astra("runs", "clean", "--older-than", "0").out == "runs/done  1 kB\nfreed 1 kB in 1 run\n"
    assert "unknown: status.json is damaged  -" in astra("runs", "list").out


def test_runs_clean_refuses_a_running_run(astra: Astra, runs: Path) -> None:
    run = make_run(runs / "a", state="running")
    run.weights.mkdir()
    ran = astra("runs", "clean", "a")
    assert ran.code == 2 and ran.err.startswith("error: run `runs/a` is running")
    ran = astra("runs", "clean", "--resumable", "--older-than", "0")
    assert ran.out == "freed 0 B in 0 runs\n" and ran.err.startswith("hint: runs that ended less than 0 days ago stay")
    assert run.weights.is_dir()
