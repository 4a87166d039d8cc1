"""The trainer process against a real hub: order of a step, resume after a kill at any point, samples, stop."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import configs
import pytest
import torch
from hub_tools import in_file, open_store
from test_hub_api import TOKEN, Server
from training_tools import recipe, sample_groups, save_model

from astracli.errors import RunFailed
from astracli.hub.client import HubClient
from astracli.process.config import TrainerConfig
from astracli.rl.types import pack_group
from astracli.training import checkpoint
from astracli.training.checkpoint_saver import Save
from astracli.training.fsdp import Ranks
from astracli.training.loop import TrainLoop, in_background
from astracli.training.optimizer import NotFinite
from astracli.weights.format.manifest import read_stable
from astracli.weights.publish import publisher
from astracli.weights.publish.snapshot import Snapshot

STEPS = 4


class FakeReporter:
    def __init__(self) -> None:
        self.stop_requested = threading.Event()
        self.said: list[str | None] = []

    def ready(self) -> None:
        self.said.append("ready")

    def waiting(self, reason: str | None) -> None:
        self.said.append(reason)

    def progress(self, **fields: Any) -> None:
        self.fields = fields


class Killed(BaseException):
    """The process is gone: nothing after it runs."""


class Job:
    """A hub, a run directory and the engine's part: groups that depend on their lease alone."""

    def __init__(self, directory: Path, model_dir: Path, gpu_leases: Sequence[str] = ()):
        self.background = "off"
        self.learning: dict[str, Any] = {}
        """Keys of the recipe's table `train`, changed."""
        self.run_dir = directory / "run"
        self.run_dir.mkdir(parents=True)
        self.model_dir = model_dir
        settings: dict[str, Any] = {"batch_groups": 2, "max_staleness": 0, "steps": STEPS, "gpu_leases": gpu_leases}
        self.store = open_store(directory, drop_equal_groups=False, **settings)
        self.server = Server(self.store, directory)
        self.reporter = FakeReporter()

    def loop(self, **changes: Any) -> TrainLoop:
        return TrainLoop(self.config(**changes), self.reporter, Ranks())  # type: ignore[arg-type]

    def config(self, **changes: Any) -> TrainerConfig:
        return configs.trainer(
            run_dir=self.run_dir,
            hub_url=self.server.url,
            token=TOKEN,
            recipe=recipe(
                train={"steps": STEPS, "batch_groups": 2, "max_staleness": 0, "parity_tolerance": 100.0}
                | self.learning,
                checkpoint={"every": 2},
                weights={"transfer": "delta", "background": self.background},
                metrics={"samples_per_step": 3},
            ),
            model_path=self.model_dir,
            **changes,
        )

    def roll(self, version: int) -> None:
        self.store.engine_state("engine0", version, "ready")
        for lease in self.store.lease("w", 9, engine="engine0").leases:
            (made,) = sample_groups(None, 1, seed=lease.lease_id, version=version, first=lease.lease_id)
            assert self.store.put(pack_group(made)) == "accepted"

    def train(self, loop: TrainLoop, until: int = STEPS) -> None:
        while loop.step < until:
            self.roll(loop.step)
            assert loop.advance()

    def resume(self) -> TrainLoop:
        newest = checkpoint.latest(self.run_dir / "checkpoints")
        step = newest.step if newest else 0
        self.store.rewind(step, step)
        loop = self.loop(attempt=2, resume_step=step)
        loop.start()
        assert loop.step == step
        return loop

    def records(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.server.metrics.read_text().splitlines()]


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def job(tmp_path: Path, model_dir: Path) -> Iterator[Job]:
    made = Job(tmp_path, model_dir)
    yield made
    made.server.thread.stop()


@pytest.fixture(scope="module")
def expected(model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    """Weights of a run that nothing interrupted."""
    whole = Job(tmp_path_factory.mktemp("whole"), model_dir)
    loop = whole.loop()
    loop.start()
    whole.train(loop)
    whole.server.thread.stop()
    return loop.trainer.masters.wire_full()


def same(loop: TrainLoop, expected: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(tensor, expected[name]) for name, tensor in loop.trainer.masters.wire_full().items())


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


@pytest.mark.parametrize("background", ["off", "on"])
@pytest.mark.parametrize("where", ["train", "save", "publish", "announce", "ack"])
@pytest.mark.parametrize("step", [1, 2])
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
    monkeypatch.setattr("astracli.training.loop.BATCH_WAIT_S", 0.2)
    job.background = "on"
    loop = job.loop()
    loop.start()

    def full(*arguments: Any) -> Any:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(loop.publisher, "publish_now", full)
    job.train(loop, until=1)
    with pytest.raises(OSError, match="No space left"):
        loop.advance()  # no group of version 1 will ever come


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


def test_deterministic_runs_publish_in_the_step() -> None:
    def chosen(background: str, deterministic: bool, device: str) -> bool:
        tables: dict[str, Any] = {"weights": {"background": background}, "train": {"max_staleness": 0}}
        return in_background(recipe(**tables, launch={"deterministic": deterministic}), device)

    assert chosen("auto", False, "cuda") and chosen("on", False, "cpu")
    assert not chosen("auto", False, "cpu") and not chosen("off", False, "cuda")
    assert not chosen("on", True, "cuda") and not chosen("auto", True, "cpu")


def test_a_missing_checkpoint_is_named(job: Job) -> None:
    loop = job.loop(resume_step=2)
    with pytest.raises(RunFailed, match="no whole checkpoint of step 2"):
        loop.start()


def test_waiting_says_for_what_and_ends_on_a_stop(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("astracli.training.loop.BATCH_WAIT_S", 0.2)
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
