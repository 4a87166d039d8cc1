"""The command itself, in real processes and deterministic mode: train, lose processes to kill -9, resume, evaluate,
export; and the same bytes as a run that nobody disturbed."""

from __future__ import annotations

import csv
import json
import re
import shutil
import sqlite3
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import warm

sys.path.append(str(Path(__file__).parents[1] / "bench"))

import shared
from loop.exactness import SMALL, difference, digests, figures
from loop.kill_resume import Attempt
from shared import records

from astracli.data import arithmetic

STEPS = 4
ITEMS = 32
"""Of the benchmark `heldout`: the first of the shipped one, of which evaluations would take most of these runs."""
pytestmark = pytest.mark.timeout(900)  # three attempts, one after the other, on whatever else the machine does


def quick(run: Path) -> list[str]:
    """Settings of both runs."""
    benchmark = f'eval.benchmarks=["{run.parent / "heldout.jsonl"}"]'
    return [f"train.steps={STEPS}", *SMALL, "eval.samples=1", "eval.pass_k=1", benchmark]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("runs") / "undisturbed"
    items = [json.dumps({"problem": p.question, "answer": p.answer}) for p in arithmetic.held_out(ITEMS)]
    (run.parent / "heldout.jsonl").write_text("\n".join(items))
    code, console = Attempt(run, quick(run), resume=False).end(600)
    assert code == 0, console
    return run


@pytest.fixture(scope="module")
def finished(undisturbed: Path) -> Iterator[Path]:
    """The same run, that lost two processes to kill -9 and was resumed to its end."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shared, "start", warm.bench_start)  # the one above has shown that it starts by itself
        yield killed_twice(undisturbed.parent / "killed")


def killed_twice(run: Path) -> Path:
    first = Attempt(run, quick(run), resume=False)
    # before any checkpoint; its children end by themselves
    assert first.wait(lambda: len(first.steps()) >= 1 and first.kill("supervisor"), 300), first.end()[1]
    assert first.end()[0] == -9
    last = Attempt(run, ["launch.max_resumes=1"], resume=True)
    # past the checkpoint of two steps; from there it goes on by itself, in the same attempt
    assert last.wait(lambda: 2 in last.steps() and last.kill("trainer"), 300), last.end()[1]
    code, console = last.end(600)
    assert code == 0 and "the run goes on from the checkpoint of step 2, time 1 of 1" in console, console
    return run


def test_a_run_killed_twice_ends_in_the_same_bytes(undisturbed: Path, finished: Path) -> None:
    assert len(digests(undisturbed)) == 1 + 3 + 1 + STEPS, (
        "weights, three evaluations, their table, four steps' samples"
    )
    assert {key[:2] for key in figures(undisturbed)} == {
        *(("trainer", step) for step in range(STEPS)),
        *(("eval", step) for step in (0, 2, 4)),
    }
    assert difference(undisturbed, finished, whole=False) == []


def test_two_hosts_write_the_bytes_of_one(undisturbed: Path, tmp_path: Path) -> None:
    run = tmp_path / "two"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shared, "start", warm.bench_start)
        attempt = Attempt(run, [*quick(undisturbed), 'launch.hosts=["a", "b"]', "ssh.by_hand=true"], resume=False)
    named = re.compile(r"on it, give `astra (agent \S+) --token-file (\S+)`")
    assert attempt.wait(lambda: bool(named.search(attempt.log.read_text())), 120), attempt.end()[1]
    found = named.search(attempt.log.read_text())
    assert found is not None
    words = ["-m", "astracli", *found[1].split(), "--token-file", found[2], "--address", "127.0.0.2"]
    agent = warm.start([*words, "--dir", str(tmp_path / "b")], tmp_path / "agent.log")
    code, console = attempt.end(300)
    assert code == 0 and agent.wait(timeout=60) == 0, (console, (tmp_path / "agent.log").read_text())
    assert difference(undisturbed, run, whole=True) == []
    started = {path.stem for path in (tmp_path / "b" / "logs" / "attempt_1").iterdir()}
    assert started == {"engine0", "rollout"} and not (tmp_path / "b" / "stage").exists()
    assert not list((run / "agents").glob("*.token"))


def test_the_comparison_sees_one_bit_and_one_figure(undisturbed: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    for part in ("export", "eval", "samples"):
        shutil.copytree(undisturbed / part, other / part)
    lines = (undisturbed / "metrics.jsonl").read_text()
    (other / "metrics.jsonl").write_text(lines)
    assert difference(undisturbed, other, whole=True) == []
    weights = other / "export" / "model.safetensors"
    blob = bytearray(weights.read_bytes())
    blob[-1] ^= 1
    weights.write_bytes(blob)
    loss = next(record["loss"] for record in records(undisturbed) if record.get("loss") and record["step"] == 2)
    (other / "metrics.jsonl").write_text(lines.replace(json.dumps(loss), json.dumps(loss * 1.001)))
    assert difference(undisturbed, other, whole=True) == ["export/model.safetensors", "('trainer', 2, None, True)"]


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


@pytest.mark.skipif(sys.platform != "linux", reason="processes are forked on Linux alone")
def test_torch_was_imported_once(undisturbed: Path, finished: Path) -> None:
    summary = json.loads((undisturbed / "summary.json").read_text())
    assert summary["memory"]["peak_bytes_by_process"]["fork_server"] > 50e6
    logs = [log.read_text() for run in (undisturbed, finished) for log in run.glob("logs/*/*.log")]
    assert len(logs) == 12 and not any("imports everything itself" in said for said in logs)


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
    assert list(rows[0])[:10] == ["step", "version", "benchmark", *figures, "due_step"]
    spans = [(int(r["due_step"]), int(r["step"])) for r in rows if r["benchmark"] == "overall"]
    covered = [due for due in (0, 2, 4) for first, last in spans if first <= due <= last]
    assert covered == [0, 2, 4], "one may wait for the one before, and then takes a later step"
    assert spans[0] == (0, 0) and spans[-1][1] == 4 and len(rows) == 2 * len(spans)
    assert {(r["items"], r["n"]) for r in rows} == {(str(ITEMS), "1")}
    items = finished / "eval" / "items" / "step_000004_heldout.jsonl"
    assert len(items.read_text().splitlines()) == ITEMS


def test_the_export_loads_and_scores_what_the_run_says(finished: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(finished / "export", dtype=torch.float32)
    assert AutoTokenizer.from_pretrained(finished / "export").eos_token_id == 1
    assert sum(p.numel() for p in model.parameters()) == 914_232
    scored = warm.run(
        ["-m", "astracli", "eval", "--run-dir", str(finished), "--json"], cwd=finished.parent, timeout=300
    )
    assert scored.returncode == 0, scored.stderr
    last = list(csv.DictReader((finished / "eval" / "eval.csv").open()))[-1]
    again = json.loads(scored.stdout)["results"]["heldout"]["avg_at_n"]
    # the same draws; one sample may fall on the other side of a rounding difference between batches
    assert again == pytest.approx(float(last["avg_at_n"]), abs=1 / ITEMS + 1e-6)


def test_a_checkpoint_is_exported_text_only(finished: Path, astra: Callable[..., Any]) -> None:
    from transformers import AutoModelForCausalLM

    out = finished.parent / "text"
    words = ("runs", "export", str(finished), "--step", "2", "--text-only", "--out", str(out))
    done = astra(*words)
    assert done.code == 0, done.err
    assert done.err.splitlines() == [f"step 2 of `{finished}`"], "and no progress bar of a library"
    config = json.loads((out / "config.json").read_text())
    assert config["full_attention_interval"] == 4
    assert "model.layers.0.mlp.up_proj.weight" in AutoModelForCausalLM.from_pretrained(out).state_dict()
    taken = astra(*words)
    assert taken.code == 2 and "exists" in taken.err
    missing = astra("runs", "export", str(finished), "--step", "1", "--out", str(out) + "1")
    assert missing.code == 2 and "2, 4" in missing.err


def test_a_used_directory_is_refused(finished: Path, astra: Callable[..., Any]) -> None:
    answer = astra("train", "--recipe", "qwen3.5-tiny-m2po-delta", "--run-dir", str(finished))
    assert answer.code == 2
    assert "--resume" in answer.err and "Traceback" not in answer.err


def test_without_a_run_there_is_nothing_to_evaluate(runs: Path, astra: Callable[..., Any]) -> None:
    nothing = astra("eval", "--json")
    assert nothing.code == 2 and "hint:" in nothing.err
