"""The bench of M2PO's limits: a run that fails is a row, and the others come out all the same."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from astracli.errors import RunFailed


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(Path(__file__).parent.parent / "bench"))
    return importlib.import_module("learning.stale_data")


def test_a_failed_run_is_a_row_and_is_tried_again(
    bench: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    started: list[int] = []
    broken = {1}

    class Run:
        """Seed s ends at (s + 1) / 10, unless it is broken."""

        def __init__(self, label: str, staleness: int, seed: int, args: Any):
            self.seed = seed

        def run(self) -> dict[str, Any]:
            started.append(self.seed)
            if self.seed in broken:
                raise RunFailed("trainer and engine disagree at version 3")
            cuts = {"cut_itself": 0.01, "cut_published": 0.02, "cut_ppo": 0.03}
            means = {"ratio_mean": 1.0, "grad_norm": 2.0, "cpu_s": 9.0, "area": 0.5}
            return {"curve": [(0, 0.1), (80, (self.seed + 1) / 10)], "ended": None} | cuts | means

    def run_all(left: list[tuple[str, int, int]], args: Any) -> None:
        for each in left:
            bench.one((*each, args))

    monkeypatch.setattr(bench, "LimitsRun", Run)
    monkeypatch.setattr(bench, "run_all", run_all)
    monkeypatch.setattr(bench.torch, "set_num_threads", lambda n: None)
    words = [
        "stale_data.py",
        "limits",
        "--json",
        "--ways",
        "grpo",
        "--staleness",
        "2",
        "--seeds",
        "0",
        "1",
        "2",
        "--out",
        str(tmp_path),
    ]
    monkeypatch.setattr("sys.argv", words)
    with pytest.raises(SystemExit) as ended:
        bench.main()
    assert ended.value.code == 1
    found = json.loads(capsys.readouterr().out)
    (mean,), (failed,) = found["rows"], found["failed"]
    assert list(mean.values())[:5] == ["grpo", 2, 2, pytest.approx(0.2), 0.1]  # seeds 0 and 2
    assert list(failed.values()) == ["grpo", 2, 1, "trainer and engine disagree at version 3"]
    broken.clear()
    bench.main()
    assert started == [0, 1, 2, 1]
    (mean,) = json.loads(capsys.readouterr().out)["rows"]
    assert list(mean.values())[:5] == ["grpo", 2, 3, pytest.approx(0.2), 0.1]


def test_a_wrong_setting_is_refused_before_any_run(
    bench: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(
        "sys.argv", ["stale_data.py", "limits", "--out", str(tmp_path / "out"), "--set", "train.no_such_key=1"]
    )
    with pytest.raises(SystemExit) as ended:
        bench.main()
    assert ended.value.code == 2 and "no_such_key" in capsys.readouterr().err and not (tmp_path / "out").exists()
