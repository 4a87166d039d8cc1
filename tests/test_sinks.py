"""Sinks against the real packages, where they are installed."""

from __future__ import annotations

import json
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest

from astracli import metrics, sinks
from astracli.errors import UserError

RECORDS: list[dict[str, Any]] = [
    {"step": 0, "time": 1000.0, "process": "trainer", "loss": 0.5, "words": "no number"},
    {"step": 1, "time": 1001.0, "process": "trainer", "loss": 0.25},
    {"step": 0, "time": 1002.0, "process": "eval", "benchmark": "aime24", "version": 0, "eval_avg_at_n": 0.125},
]


def test_names_say_process_and_benchmark() -> None:
    assert [list(sinks.scalars(record)) for record in RECORDS] == [
        [("trainer/loss", 0.5)],
        [("trainer/loss", 0.25)],
        [("eval/aime24/eval_avg_at_n", 0.125)],
    ]


def test_built_in_sinks_are_entry_points_with_an_extra_each() -> None:
    project = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text())["project"]
    points = project["entry-points"]["astra.sinks"]
    assert set(points) == {"tensorboard", "wandb", "trackio"} <= set(project["optional-dependencies"])
    for place in points.values():
        assert hasattr(sinks, place.removeprefix("astracli.sinks:"))
    assert not any(name in dependency for name in points for dependency in project["dependencies"])


def test_a_missing_package_is_said_with_its_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match="`wandb` is not usable") as caught:
        metrics.open_sinks(["astracli.sinks:WandB"], tmp_path)
    assert caught.value.hint == 'pip install "astracli[wandb]"'


def run_through(name: str, run_dir: Path) -> None:
    (run_dir / "recipe.json").write_text(json.dumps({"name": "tiny", "train": {"steps": 2}}))
    (sink,) = metrics.open_sinks([f"astracli.sinks:{name}"], run_dir)
    sink.write(RECORDS[:2])
    sink.write(RECORDS[2:])
    sink.close()


def test_tensorboard(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run_through("TensorBoard", tmp_path)
    found = EventAccumulator(str(tmp_path / "tensorboard"))
    found.Reload()
    assert set(found.Tags()["scalars"]) == {"trainer/loss", "eval/aime24/eval_avg_at_n"}
    assert [(e.step, e.value, e.wall_time) for e in found.Scalars("trainer/loss")] == [
        (0, 0.5, 1000.0),
        (1, 0.25, 1001.0),
    ]


def test_wandb_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The real package takes every call and opens its offline run; what it wrote is not read back here."""
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    run_through("WandB", tmp_path)
    (file,) = (tmp_path / "wandb").glob("offline-run-*/*.wandb")
    assert file.read_bytes()[:4] == b":W&B"


def test_trackio(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    pytest.importorskip("trackio")
    import sqlite3

    run_through("Trackio", tmp_path)
    (file,) = (tmp_path / "trackio").glob("*.db")
    with sqlite3.connect(file) as database:
        rows = [
            (step, json.loads(text)) for step, text in database.execute("SELECT step, metrics FROM metrics ORDER BY id")
        ]
    assert (0, {"trainer/loss": 0.5}) in rows and (1, {"trainer/loss": 0.25}) in rows
