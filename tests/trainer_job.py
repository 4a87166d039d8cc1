"""A trainer that trains in this process: its hub, its run directory, and groups that depend on their lease alone."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import configs
import pytest
import torch
from hub_tools import open_store
from test_hub_api import TOKEN, Server
from training_tools import recipe, sample_groups, save_model

from astracli.process.config import TrainerConfig
from astracli.rl.types import pack_group
from astracli.training import checkpoint
from astracli.training.fsdp import Ranks
from astracli.training.loop import TrainLoop

STEPS = 4


class FakeReporter:
    def __init__(self) -> None:
        self.stop_requested = threading.Event()
        self.save_requested = threading.Event()
        self.said: list[str | None] = []

    def ready(self) -> None:
        self.said.append("ready")

    def waiting(self, reason: str | None) -> None:
        self.said.append(reason)

    def progress(self, **fields: Any) -> None:
        self.fields = fields


class Job:
    """A hub, a run directory and the engine's part: groups that depend on their lease alone."""

    def __init__(self, directory: Path, model_dir: Path, gpu_leases: Sequence[str] = ()):
        self.background = "off"
        self.learning: dict[str, Any] = {}
        """Keys of the recipe's table `train`, changed."""
        self.tables: dict[str, dict[str, Any]] = {}
        """Other tables of the recipe."""
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
                **{
                    "weights": {"transfer": "delta", "background": self.background},
                    "metrics": {"samples_per_step": 3},
                    **self.tables,
                },
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
