"""A trainer that was killed at any point and goes on, or that starts from another run's checkpoint."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from hub_tools import in_file
from trainer_job import STEPS, Job, expected, job, model_dir, same

from astracli.errors import RunFailed
from astracli.training import checkpoint
from astracli.training.checkpoint_saver import Save

__all__ = ["expected", "job", "model_dir"]


class Killed(BaseException):
    """The process is gone: nothing after it runs."""


@pytest.mark.parametrize(
    ("step", "where", "background"),
    [
        (1, "train", "off"), (2, "train", "on"), (1, "save", "on"), (2, "save", "off"), (1, "publish", "off"),
        (2, "publish", "on"), (1, "announce", "on"), (2, "announce", "off"), (1, "ack", "off"), (2, "ack", "on"),
    ],
)  # fmt: skip
def test_a_kill_at_any_point_changes_nothing(
    job: Job, expected: dict[str, torch.Tensor], where: str, step: int, background: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed just before `where` of `step`, resumed: the same weights, every batch trained once, every group used."""
    job.background = background

    def die(*arguments: Any, **options: Any) -> Any:
        raise Killed

    loop = job.loop()
    loop.start()
    job.train(loop, until=step)
    assert loop.hub is not None
    targets: dict[str, tuple[Any, str]] = {
        "train": (loop.trainer, "train"),
        "save": (loop.saver, "begin"),
        "publish": (loop.publisher, "publish_now"),
        "announce": (loop.hub, "announce"),
        "ack": (loop.hub, "ack"),
    }
    loop.publisher.settle()
    job.roll(step)
    with monkeypatch.context() as patch:
        patch.setattr(*targets[where], die)
        if where == "save" and step == 2:
            job.train(loop, until=3)  # no checkpoint is due in step 2
            job.roll(3)
        with pytest.raises(Killed):
            loop.advance()
            loop.publisher.settle()
    loop.saver.wait()  # a process that is gone writes no more
    again = job.resume()
    job.train(again)
    again.publisher.settle()
    assert same(again, expected)
    assert job.store.finished
    assert job.store.state().counts.consumed_steps == STEPS


def test_a_kill_while_a_checkpoint_is_written_goes_back_to_the_one_before(
    job: Job, expected: dict[str, torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Checkpoint 4 has all its bytes but is not whole: the hub still has what checkpoint 2 needs."""
    loop = job.loop()
    loop.start()
    job.train(loop, until=3)
    loop.saver.wait()

    def die(save: Any) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(Save, "make_whole", die)
        job.roll(3)
        assert loop.advance() and loop.step == 4
        with pytest.raises(Killed):
            loop.finish()
    assert in_file(job.run_dir.parent, "SELECT value FROM meta WHERE key = 'checkpoint_step'") == [(2,)]
    again = job.resume()
    assert again.step == 2
    job.train(again)
    again.finish()
    assert same(again, expected) and job.store.finished
    assert job.store.state().counts.consumed_steps == STEPS
    assert [c.step for c in checkpoint.find(job.run_dir / "checkpoints")] == [2, 4]


@pytest.mark.parametrize("where", ["publish_now", "announce", "ack"])
def test_a_kill_while_the_next_step_trains_changes_nothing(
    job: Job, expected: dict[str, torch.Tensor], where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Version 2 is still on its way, its checkpoint is on disk and batch 2 is handed out when everything ends."""
    job.background = "on"
    loop = job.loop()
    loop.start()
    job.train(loop, until=1)
    loop.publisher.settle()
    killed, reached = threading.Event(), threading.Event()

    def hang(*arguments: Any, **options: Any) -> Any:
        reached.set()
        killed.wait(60)
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(loop.publisher if where == "publish_now" else loop.hub, where, hang)
        job.train(loop, until=2)
        assert reached.wait(60)
        loop.saver.wait()
        job.roll(2)
        assert loop.hub is not None and loop.hub.batch(2).batch
        again = job.resume()
        assert again.step == 2
        killed.set()
        with pytest.raises(Killed):
            loop.publisher.settle()
    job.train(again)
    again.publisher.settle()
    assert same(again, expected)
    assert job.store.finished
    assert job.store.state().counts.consumed_steps == STEPS


def test_a_missing_checkpoint_is_named(job: Job) -> None:
    loop = job.loop(resume_step=2)
    with pytest.raises(RunFailed, match="no whole checkpoint of step 2"):
        loop.start()


def test_a_resume_trains_at_the_learning_rate_that_it_was_given(job: Job, expected: dict[str, torch.Tensor]) -> None:
    loop = job.loop()
    loop.start()
    job.train(loop, until=2)
    before = {record["lr"] for record in job.records() if "lr" in record}
    job.learning = {"learning_rate": 0.25, "schedule": "constant"}
    again = job.resume()
    job.train(again)
    rates = {record["step"]: record["lr"] for record in job.records() if "lr" in record}
    assert 0.25 not in before and (rates[2], rates[3]) == (0.25, 0.25)
    assert not same(again, expected)


def test_a_run_starts_with_weights_and_moments_of_another_ones_checkpoint(
    job: Job, model_dir: Path, tmp_path: Path
) -> None:
    first = job.loop()
    first.start()
    job.train(first, until=2)
    other = Job(tmp_path / "other", model_dir)
    try:
        second = other.loop(initial=checkpoint.place(job.run_dir / "checkpoints", 2))
        second.start()
        assert second.step == 0 and same(second, first.trainer.masters.wire_full())
        mine, theirs = (loop.trainer.masters.adam for loop in (second, first))
        assert mine.updates == theirs.updates > 0
        for own, given in zip(mine.moments(), theirs.moments(), strict=True):
            assert own.keys() == given.keys() and all(torch.equal(own[name], given[name]) for name in own)
        other.train(second, until=1)
        assert second.step == 1
    finally:
        other.server.thread.stop()
