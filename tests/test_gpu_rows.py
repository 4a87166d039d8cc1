"""bench/gpu_rows.py: its parts are those of the docs, each has its limit, and what one starts ends with it."""

from __future__ import annotations

import importlib
import json
import re
import shlex
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "bench"))
gpu_rows = importlib.import_module("gpu_rows")
PARTS, Part = gpu_rows.PARTS, gpu_rows.Part

DOCS = (ROOT / "docs" / "benchmarks.md").read_text(encoding="utf-8")
GIVEN = {"model_05b": "A", "model_15b": "B", "model_4b": "C", "data": "D"}


def test_the_docs_name_every_part_and_the_gpus_that_it_needs() -> None:
    table = DOCS[DOCS.index("## To be run") : DOCS.index("## The main job")]
    rows = re.findall(r"^\| (`.*?`) \| (\d) \|", table, re.M)
    assert [(name, int(gpus)) for names, gpus in rows for name in re.findall(r"`(\w+)`", names)] == [
        (part.name, part.gpus) for part in PARTS
    ]


@pytest.mark.parametrize("part", PARTS, ids=lambda part: part.name)
def test_a_part_is_a_command_that_exists_with_options_that_it_has(part: Any) -> None:
    command = gpu_rows.words(part, GIVEN, Path("/out"), Path("/runs"))
    assert isinstance(command, list) and not any("{" in word for word in command)
    file = next((word for word in command if word.endswith(".py")), None)
    assert file is None or (ROOT / file).is_file()
    if file and file.startswith("bench/"):
        source = (ROOT / file).read_text() + (ROOT / "bench" / "shared.py").read_text()
        source += "".join(other.read_text() for other in (ROOT / file).parent.glob("*.py"))
        for option in (word for word in command if word.startswith("--")):
            assert f'"{option}"' in source or f"{option[2:].replace('-', '_')}=" in source, option


def test_what_a_part_lacks_is_named() -> None:
    (part,) = (part for part in PARTS if part.name == "math")
    assert gpu_rows.words(part, {"data": "D"}, Path("/out"), Path("/runs")) == "needs --model-15b"


def test_parts_that_fail_or_take_too_long_do_not_stop_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    child = tmp_path / "child"
    hangs = (
        f"import subprocess, time, pathlib; p = subprocess.Popen(['sleep', '600']); "
        f"pathlib.Path({str(child)!r}).write_text(str(p.pid)); print('began', flush=True); time.sleep(600)"
    )
    parts = (
        Part("hangs", f"-c {shlex.quote(hangs)}", 4.0),
        Part("fails", "-c 'raise SystemExit(\"no such card\")'", 60),
        Part("of_two", "-c 1", 60, gpus=2),
        Part("works", "-c \"import pathlib; pathlib.Path('{out}', 'seen').write_text('yes')\"", 60),
    )
    monkeypatch.setattr(gpu_rows, "PARTS", parts)
    monkeypatch.setattr(gpu_rows, "gpus", lambda: 1)
    monkeypatch.setattr(sys, "argv", ["gpu_rows.py", "--out", str(tmp_path / "out"), "--json"])
    with pytest.raises(SystemExit) as ended:
        gpu_rows.main()
    assert ended.value.code == 1
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert [(one["part"], one["state"], one["why"]) for one in summary] == [
        ("hangs", "out of time", "limit 4 s"), ("fails", "failed", "exit 1"),
        ("of_two", "left out", "needs 2 GPUs, 1 are there"), ("works", "done", ""),
    ]  # fmt: skip
    assert json.loads(capsys.readouterr().out)["parts"] == summary
    assert (tmp_path / "out" / "hangs.out").read_text() == "began\n"
    assert "no such card" in (tmp_path / "out" / "fails.err").read_text()
    assert (tmp_path / "out" / "works" / "seen").read_text() == "yes"
    assert not psutil.pid_exists(int(child.read_text()))
