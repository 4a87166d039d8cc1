"""The trainer process against a real hub: order of a step, samples, export, waiting, stop."""

from __future__ import annotations

import json
import threading
from typing import Any

import pytest
import torch
from hub_tools import in_file
from test_hub_api import TOKEN
from trainer_job import STEPS, Job, expected, job, model_dir, same

from astracli.errors import RunFailed
from astracli.hub.client import HubClient
from astracli.training import checkpoint
from astracli.training.optimizer import NotFinite
from astracli.weights.format.manifest import read_stable

__all__ = ["expected", "job", "model_dir"]


def test_a_run_from_start_to_export(job: Job, expected: dict[str, torch.Tensor]) -> None:
    loop = job.loop()
    loop.start()
    assert job.reporter.said[-1] == "ready"
    assert read_stable(job.run_dir / "weights", 0)["manifests"].keys() == {"full"}
    job.train(loop)
    loop.finish()
    assert same(loop, expected)
    assert job.store.finished
    assert [c.step for c in checkpoint.find(job.run_dir / "checkpoints")] == [2, 4]
    assert read_stable(job.run_dir / "weights", 4)["manifests"].keys() == {"delta"}
    assert (job.run_dir / "export" / "model.safetensors").exists()

    steps = [r for r in job.records() if "loss" in r]
    assert [r["step"] for r in steps] == [0, 1, 2, 3]
    for record in steps:
        assert record["process"] == "trainer"
        assert record["staleness_max"] == 0
        assert 0 < record["delta_density"] <= 1 and 0 < record["delta_bytes"] < 2 * record["full_bytes"]
        assert record["step_s"] >= record["wait_s"] + record["train_s"]
        assert record["tokens"] == pytest.approx(record["tokens_per_s"] * record["step_s"])
    assert [("checkpoint_s" in r) for r in steps] == [False, True, False, True]
    written = [r for r in job.records() if "checkpoint_write_s" in r]
    assert len(written) == 2 and all(r["checkpoint_bytes"] == written[0]["checkpoint_bytes"] > 0 for r in written)
    assert in_file(job.run_dir.parent, "SELECT value FROM meta WHERE key = 'checkpoint_step'") == [(STEPS,)]

    lines = (job.run_dir / "samples" / "step_000002.jsonl").read_text().splitlines()
    assert len(lines) == 3
    for sample in map(json.loads, lines):
        assert list(sample) == [
            "step", "version", "problem_id", "problem", "answer", "sample", "completion",
            "tokens", "logprobs", "advantage", "reward", "verdict", "finish_reason",
        ]  # fmt: skip
        assert sample["step"] == sample["version"] == 2
        assert len(sample["tokens"]) == len(sample["logprobs"]) > 0


def test_a_gradient_that_is_no_number_ends_the_run_with_its_last_steps(
    job: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    loop = job.loop()
    loop.start()
    job.train(loop, until=2)

    def broken(*arguments: Any) -> Any:
        raise NotFinite("the gradient norm of step 2 is nan", "lower train.learning_rate")

    monkeypatch.setattr(loop.trainer, "train", broken)
    with pytest.raises(RunFailed) as failed:
        job.train(loop, until=3)
    first, *seen = failed.value.message.split("\n  ")
    assert first == "the gradient norm of step 2 is nan" and failed.value.hint == "lower train.learning_rate"
    trained = [record for record in job.records() if "grad_norm" in record]
    norms = ", ".join(f"step {record['step']} {record['grad_norm']:.3g}" for record in trained)
    assert [line.partition(":")[0] for line in seen] == ["reward", "entropy", "gradient norm", "learning rate"]
    assert seen[2] == f"gradient norm: {norms}" and len(trained) == 2


def test_waiting_says_for_what_and_ends_on_a_stop(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("astracli.training.batches.BATCH_WAIT_S", 0.2)
    loop = job.loop()
    loop.start()
    job.store.engine_state("engine0", 0, "ready")
    job.store.lease("w", 1, engine="engine0")
    timer = threading.Timer(0.6, job.reporter.stop_requested.set)
    timer.start()
    assert loop.advance() is False
    reasons = [said for said in job.reporter.said if said and said != "ready"]
    assert set(reasons) == {"groups for step 0: 0 of 2, 1 in flight"}
    with HubClient(job.server.url, TOKEN) as hub:
        assert hub.batch(0, wait_s=0).wait
    assert loop.step == 0


def test_a_checkpoint_that_is_asked_for_is_made_between_two_that_are_due(job: Job) -> None:
    loop = job.loop()
    loop.start()
    job.train(loop, until=3)
    job.reporter.save_requested.set()
    assert loop.advance() is False
    loop.leave()
    assert [found.name for found in sorted((job.run_dir / "checkpoints").glob("step_*"))] == [
        "step_000002",
        "step_000003",
    ]
    job.reporter.save_requested.clear()
    again = job.resume()
    assert again.step == 3
    job.train(again)
    assert again.step == STEPS
