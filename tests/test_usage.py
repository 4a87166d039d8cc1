"""What a run's processes take, by step: from real processes and a stand-in for nvidia-smi to curves in the report."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from astracli.launch.usage import UsageLog
from astracli.process.children import MemorySampler
from astracli.report.page.data import usage
from astracli.runs import metrics
from astracli.runs.run_dir import RunDir


class FakeLauncher:
    def __init__(self) -> None:
        self.now = {"trainer": (1000, 7), "engine0": (2000, 9)}

    def usage(self) -> dict[str, tuple[int, int]]:
        return dict(self.now)


def test_every_process_gpu_and_the_hub_have_a_line_a_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    smi = tmp_path / "nvidia-smi"
    smi.write_text("#!/bin/sh\nprintf '0, 100\\n1, 2048\\n2, [N/A]\\n'\n")
    smi.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    run, launcher = RunDir(tmp_path / "run"), FakeLauncher()
    run.path.mkdir()
    run.hub_sqlite.write_bytes(b"x" * 300)
    (run.path / "hub.sqlite-wal").write_bytes(b"x" * 50)
    log: Any = UsageLog(run, launcher, [1, 2])  # type: ignore[arg-type]
    log.step(0).result()
    launcher.now["trainer"] = (1500, 8)
    log.step(1).result()
    log.step(1)
    log.close()
    found = metrics.read(run.metrics_jsonl)
    assert {r["process"] for r in found} == {"supervisor"}
    assert [(r["of"], r["step"]) for r in found] == [
        (name, step) for step in (0, 1) for name in ("trainer", "engine0", "gpu1", "hub")
    ]
    memory, files, hub = usage(found)
    assert {line["name"]: line["points"] for line in memory["lines"]} == {
        "trainer": [[0, 1000], [1, 1500]],
        "engine0": [[0, 2000], [1, 2000]],
        "gpu1": [[0, 2147500000.0], [1, 2147500000.0]],  # 2 GiB, in five digits
    }
    assert [line["points"][-1][1] for line in files["lines"]] == [8, 9]
    assert hub["lines"] == [{"name": "hub", "metric": "hub_bytes", "points": [[0, 350], [1, 350]]}]


def test_descriptors_of_a_child_are_counted_with_those_of_its_own_children(tmp_path: Path) -> None:
    words = "import sys, subprocess; held = [open(sys.argv[1]) for _ in range(int(sys.argv[2]))]; print(1, flush=True)"
    (tmp_path / "f").touch()
    more = f"{words}; c = subprocess.Popen([sys.executable, '-c', sys.argv[3], sys.argv[1], '10'])"
    more += "; sys.stdin.read(); c.kill()"
    hold = f"{words}; import time; time.sleep(60)"
    with subprocess.Popen(
        [sys.executable, "-c", more, str(tmp_path / "f"), "30", hold], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as child:
        assert child.stdout is not None and child.stdin is not None
        assert [child.stdout.read(1) for _ in range(4)] == [b"1", b"\n"] * 2  # both have opened theirs
        sampler = MemorySampler(interval_s=3600.0)
        sampler.start(lambda: {child.pid: "holder"})
        sampler.sample()
        memory, files = sampler.latest["holder"]
        child.stdin.close()
    assert memory > 2**20 and 46 <= files < 70
