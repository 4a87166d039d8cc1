"""Versions that a trainer publishes beside its next step."""

from __future__ import annotations

import threading
import time
from dataclasses import replace
from typing import Any

import pytest
from trainer_job import STEPS, Job, job, model_dir
from training_tools import recipe

from astracli.training.loop import in_background
from astracli.weights.format.manifest import read_stable
from astracli.weights.publish import publisher
from astracli.weights.publish.snapshot import Snapshot

__all__ = ["job", "model_dir"]


def test_the_step_goes_on_while_its_version_is_published_and_the_next_one_waits(
    job: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    job.background = "on"
    loop = job.loop()
    loop.start()
    assert loop.hub is not None
    gate, announced = threading.Event(), loop.hub.announce

    def late(*arguments: Any) -> Any:
        gate.wait(60)
        return announced(*arguments)

    def release() -> None:
        while "version 1 to be published" not in job.reporter.said:
            time.sleep(0.01)
        time.sleep(0.2)
        gate.set()

    monkeypatch.setattr(loop.hub, "announce", late)
    job.train(loop, until=1)
    assert loop.publisher.busy and read_stable(job.run_dir / "weights", 0)
    assert job.store.state().latest_version == 0
    threading.Thread(target=release, daemon=True).start()
    job.train(loop, until=2)
    assert job.store.state().latest_version >= 1
    assert "version 1 to be published" in job.reporter.said and job.reporter.said[-1] is None
    job.train(loop)
    loop.finish()
    assert job.store.finished and job.store.state().latest_version == STEPS
    steps = [r for r in job.records() if "loss" in r]
    assert [r["step"] for r in steps] == list(range(STEPS))
    assert steps[1]["publish_wait_s"] > 0.1 > steps[0]["publish_wait_s"]
    for record in steps:
        assert record["publish_s"] == pytest.approx(record["publish_wait_s"] + record["snapshot_s"])
        assert record["stable_s"] >= record["digest_s"] + record["write_s"] and record["bytes_per_changed"] > 0


def test_a_step_counts_the_copy_that_its_version_is_published_from(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU without room for another version copies to the host, and training waits for it."""
    take = publisher.take

    def slowly(*arguments: Any, **options: Any) -> Snapshot:
        time.sleep(0.3)
        taken = take(*arguments, **options)
        return replace(taken, seconds=taken.seconds + 0.3)

    job.background = "on"
    loop = job.loop()
    loop.start()
    monkeypatch.setattr(publisher, "take", slowly)
    job.train(loop)
    loop.publisher.settle()
    steps = [r for r in job.records() if "loss" in r]
    assert len(steps) == STEPS
    for record in steps:
        assert record["step_s"] > record["train_s"] + record["publish_s"] > 0.3
        assert record["tokens_per_s"] == pytest.approx(record["tokens"] / record["step_s"])


def test_an_error_in_the_background_ends_the_wait_for_a_batch_with_its_cause(
    job: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("astracli.training.batches.BATCH_WAIT_S", 0.2)
    job.background = "on"
    loop = job.loop()
    loop.start()

    def full(*arguments: Any) -> Any:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(loop.publisher, "publish_now", full)
    job.train(loop, until=1)
    with pytest.raises(OSError, match="No space left"):
        loop.advance()  # no group of version 1 will ever come


def test_deterministic_runs_publish_in_the_step() -> None:
    def chosen(background: str, deterministic: bool, device: str) -> bool:
        tables: dict[str, Any] = {"weights": {"background": background}, "train": {"max_staleness": 0}}
        return in_background(recipe(**tables, launch={"deterministic": deterministic}), device)

    assert chosen("auto", False, "cuda") and chosen("on", False, "cpu")
    assert not chosen("auto", False, "cpu") and not chosen("off", False, "cuda")
    assert not chosen("on", True, "cuda") and not chosen("auto", True, "cpu")
