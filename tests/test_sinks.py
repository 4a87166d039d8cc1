"""Sinks against the real packages, where they are installed."""

from __future__ import annotations

import json
import struct
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest

from astracli.errors import UserError
from astracli.runs import metrics, sinks

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
        assert hasattr(sinks, place.removeprefix("astracli.runs.sinks:"))
    assert not any(name in dependency for name in points for dependency in project["dependencies"])


def test_a_missing_package_is_said_with_its_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match="`wandb` is not usable") as caught:
        metrics.open_sinks(["astracli.runs.sinks:WandB"], tmp_path)
    assert caught.value.hint == 'pip install "astracli[wandb]"'


def run_through(name: str, run_dir: Path) -> None:
    (run_dir / "recipe.json").write_text(json.dumps({"name": "tiny", "train": {"steps": 2}}))
    (sink,) = metrics.open_sinks([f"astracli.runs.sinks:{name}"], run_dir)
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


def wandb_history(path: Path) -> list[dict[str, Any]]:
    """The history rows of an offline run: a LevelDB log behind 7 bytes of header, one protobuf record each."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, place, parts, rows = path.read_bytes(), 7, b"", []
    assert data[:4] == b":W&B"
    while place + 7 <= len(data):
        room = 32768 - place % 32768
        if room < 7:
            place += room
            continue
        _, size, kind = struct.unpack_from("<IHB", data, place)
        parts += data[place + 7 : place + 7 + size]
        place += 7 + size
        if kind in (1, 4):  # whole, or the last part
            record = Record()
            record.ParseFromString(parts)
            parts = b""
            if record.HasField("history"):
                rows.append({i.key or ".".join(i.nested_key): json.loads(i.value_json) for i in record.history.item})
    return rows


def test_wandb_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    """Read back from the file that `wandb sync` sends; the terminal gets one line."""
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    run_through("WandB", tmp_path)
    (file,) = (tmp_path / "wandb").glob("offline-run-*/*.wandb")
    rows = wandb_history(file)
    shown = [{k: v for k, v in row.items() if k not in ("_runtime", "_step")} for row in rows]
    assert shown == [
        {"step": 0, "_timestamp": 1000.0, "trainer/loss": 0.5},
        {"step": 1, "_timestamp": 1001.0, "trainer/loss": 0.25},
        {"step": 0, "_timestamp": 1002.0, "eval/aime24/eval_avg_at_n": 0.125},
    ]
    said = capfd.readouterr()
    assert said.out == "" and said.err == f"wandb: offline; send it with `wandb sync {file.parent}`\n"


def test_trackio(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    pytest.importorskip("trackio")
    import sqlite3

    run_through("Trackio", tmp_path)
    said = capfd.readouterr()
    assert (said.out, said.err) == ("", "trackio: look at it with `trackio show --project astra`\n")
    (file,) = (tmp_path / "trackio").glob("*.db")
    with sqlite3.connect(file) as database:
        names = {name for (name,) in database.execute("SELECT DISTINCT run_name FROM metrics")}
        rows = [
            (step, json.loads(text)) for step, text in database.execute("SELECT step, metrics FROM metrics ORDER BY id")
        ]
    assert names == {tmp_path.name}
    assert rows == [(0, {"trainer/loss": 0.5}), (1, {"trainer/loss": 0.25}), (0, {"eval/aime24/eval_avg_at_n": 0.125})]
