"""The command itself, in real processes: train, lose a process to kill -9, resume, evaluate, export."""

from __future__ import annotations

import csv
import json
import os
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

ASTRA = [sys.executable, "-m", "astracli"]
STEPS = 4
SMALL = [
    f"train.steps={STEPS}",
    "train.batch_groups=4",
    "train.minibatches=2",
    "checkpoint.every=2",
    "eval.every=2",
    "eval.samples=2",
    "eval.pass_k=2",
]


def astra(*words: str, cwd: Path, timeout: float = 150) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*ASTRA, *words], cwd=cwd, capture_output=True, text=True, timeout=timeout)


def sets(*values: str) -> list[str]:
    return [word for value in values for word in ("--set", value)]


def records(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def kill_when(run: Path, name: str, ready: Any, supervisor: subprocess.Popen[str]) -> None:
    """kill -9 the child whose config file is RUN/config/NAME.json, once `ready()`."""
    deadline = time.monotonic() + 90
    while time.monotonic() < deadline and supervisor.poll() is None:
        if ready():
            for child in psutil.Process(supervisor.pid).children():
                if str(run / "config" / f"{name}.json") in " ".join(child.cmdline()):
                    os.kill(child.pid, signal.SIGKILL)
                    return
        time.sleep(0.05)
    raise AssertionError(f"{name} was not there to be killed: {supervisor.communicate(timeout=30)[1]}")


def trained_steps(run: Path) -> list[int]:
    if not (run / "metrics.jsonl").exists():
        return []
    return [r["step"] for r in records(run) if r["process"] == "trainer" and "loss" in r]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A delta run whose trainer was killed in step 3 or 4, and which was resumed to its end."""
    cwd = tmp_path_factory.mktemp("runs")
    run = cwd / "one"
    supervisor = subprocess.Popen(
        [*ASTRA, "train", "--recipe", "qwen3.5-tiny-m2po-delta", "--run-dir", str(run), *sets(*SMALL)],
        cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    kill_when(run, "trainer", lambda: len(trained_steps(run)) >= 3, supervisor)
    _, console = supervisor.communicate(timeout=60)
    assert supervisor.returncode == 1, console
    assert "trainer" in console and "--resume" in console
    resumed = astra("train", "--resume", str(run), cwd=cwd)
    assert resumed.returncode == 0, resumed.stderr
    return run


def test_nothing_is_lost_and_nothing_is_trained_twice(finished: Path) -> None:
    with sqlite3.connect(finished / "hub.sqlite") as hub:
        batches = hub.execute("SELECT step, lease_ids, acked FROM batches ORDER BY step").fetchall()
        states = dict(hub.execute("SELECT lease_id, state FROM groups").fetchall())
    assert [(step, acked) for step, _, acked in batches] == [(s, 1) for s in range(STEPS)]
    trained = [lease for _, ids, _ in batches for lease in json.loads(ids)]
    assert len(trained) == len(set(trained)) == STEPS * 4
    assert sorted(states) == list(range(len(states))), "every prompt up to the last has a fate"
    assert not any(state in ("leased",) for state in states.values())
    assert json.loads((finished / "status.json").read_text())["state"] == "done"


def test_trainer_and_engine_agree(finished: Path) -> None:
    parity = [r["parity_mean_abs"] for r in records(finished) if "parity_mean_abs" in r]
    assert parity and max(parity) <= 1e-4
    updates = [r for r in records(finished) if "pause_s" in r]
    assert {r["kind"] for r in updates} >= {"delta"}
    assert sum(r["resyncs"] for r in updates) == 0
    assert all(r["delta_bytes"] < r["full_bytes"] for r in records(finished) if r.get("delta_bytes"))


def test_evaluations_count_every_item(finished: Path) -> None:
    rows = list(csv.DictReader((finished / "eval" / "eval.csv").open()))
    figures = ["items", "n", "avg_at_n", "stderr", "k", "pass_at_k"]
    assert list(rows[0]) == ["step", "version", "benchmark", *figures, "due_step"]
    spans = [(int(r["due_step"]), int(r["step"])) for r in rows if r["benchmark"] == "overall"]
    covered = [due for due in (0, 2, 4) for first, last in spans if first <= due <= last]
    assert covered == [0, 2, 4], "one may wait for the one before, and then takes a later step"
    assert spans[0] == (0, 0) and spans[-1][1] == 4 and len(rows) == 2 * len(spans)
    assert {(r["items"], r["n"]) for r in rows} == {("256", "2")}
    items = finished / "eval" / "items" / "step_000004_arithmetic-heldout.jsonl"
    assert len(items.read_text().splitlines()) == 256 * 2


def test_the_export_loads_and_scores_what_the_run_says(finished: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(finished / "export", dtype=torch.float32)
    assert AutoTokenizer.from_pretrained(finished / "export").eos_token_id == 1
    assert sum(p.numel() for p in model.parameters()) == 914_232
    nothing = astra("eval", "--json", cwd=finished.parent, timeout=60)
    assert nothing.returncode == 2, "no runs/ here: exit 2"
    assert "hint:" in nothing.stderr
    scored = astra("eval", "--run-dir", str(finished), "--json", cwd=finished.parent)
    assert scored.returncode == 0, scored.stderr
    last = list(csv.DictReader((finished / "eval" / "eval.csv").open()))[-1]
    again = json.loads(scored.stdout)["results"]["arithmetic-heldout"]["avg_at_n"]
    # the same draws; two of 512 samples may fall on the other side of a rounding difference between batches
    assert again == pytest.approx(float(last["avg_at_n"]), abs=2 / 512 + 1e-6)


def test_a_checkpoint_is_exported_text_only(finished: Path) -> None:
    from transformers import AutoModelForCausalLM

    out = finished.parent / "text"
    words = ("runs", "export", str(finished), "--step", "2", "--text-only", "--out", str(out))
    done = astra(*words, cwd=finished.parent)
    assert done.returncode == 0, done.stderr
    assert done.stderr.splitlines() == [f"step 2 of `{finished}`"], "and no progress bar of a library"
    config = json.loads((out / "config.json").read_text())
    assert config["full_attention_interval"] == 4
    assert "model.layers.0.mlp.up_proj.weight" in AutoModelForCausalLM.from_pretrained(out).state_dict()
    taken = astra(*words, cwd=finished.parent)
    assert taken.returncode == 2 and "exists" in taken.stderr
    missing = astra("runs", "export", str(finished), "--step", "1", "--out", str(out) + "1", cwd=finished.parent)
    assert missing.returncode == 2 and "2, 4" in missing.stderr


def test_a_used_directory_is_refused(finished: Path) -> None:
    answer = astra("train", "--recipe", "qwen3.5-tiny-m2po-delta", "--run-dir", str(finished), cwd=finished.parent)
    assert answer.returncode == 2
    assert "--resume" in answer.stderr and "Traceback" not in answer.stderr
