"""Text from data does not command the terminal that shows it, nor the spreadsheet that opens it."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest

from astracli.cli.main import run
from astracli.cli.output import Output
from astracli.process.console import plain, plain_values, say
from astracli.process.worker import Status
from astracli.report import run_files
from astracli.report.live import RunProgress
from astracli.runs import tables
from astracli.runs.run_dir import RunDir

EVIL = "\x1b]0;title\x07\x1b[2Jgr\u00fc\u00df\u9b03 e\u0301 \u202etxt\x9b31m\r\x00"


def harmless(text: str) -> bool:
    return not any((ord(c) < 32 and c not in "\n\t") or 127 <= ord(c) < 160 or c == "\u202e" for c in text)


def test_control_characters_are_shown_as_escapes() -> None:
    shown = plain(EVIL)
    assert shown == r"\x1b]0;title\x07\x1b[2Jgr" + "\u00fc\u00df\u9b03 e\u0301 " + r"\u202etxt\x9b31m\x0d\x00"
    assert plain("a\tb\nc") == "a\tb\nc" and plain_values({"k\x1b": [EVIL, 1]}) == {r"k\x1b": [shown, 1]}


def test_every_way_to_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    out, data = Output(), Output(as_json=True)
    out.text(EVIL)
    out.table(["a", EVIL], [[EVIL, EVIL]])
    out.facts({"a": EVIL, "b": {"c": EVIL}, "d": [{"e": EVIL}]}, EVIL)
    out.note(EVIL)
    out.hint(EVIL)
    out.error(EVIL, EVIL)
    say(EVIL)
    said = capsys.readouterr()
    assert harmless(said.out) and harmless(said.err) and r"\x1b]0;title" in said.out
    data.document({"a": EVIL})
    written = capsys.readouterr().out
    assert harmless(written) and json.loads(written) == {"a": EVIL}, "JSON keeps every character"


def test_samples_logs_and_names_of_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    home = RunDir(tmp_path / "r")
    home.samples.mkdir(parents=True)
    home.recipe_json.write_text("{}")
    sample = {"step": 0, "problem": EVIL, "completion": EVIL, "verdict": EVIL, "reward": EVIL}
    (home.samples / "step_000000.jsonl").write_text(json.dumps(sample) + "\n")
    home.attempt_logs(1).mkdir(parents=True)
    (home.attempt_logs(1) / "trainer.log").write_text(EVIL)
    home.metrics_jsonl.write_text(json.dumps({"process": EVIL, "step": 1, "figure": EVIL}) + "\n")
    home.start(recipe=EVIL)
    home.end("failed", exit_code=1, cause=EVIL)
    for command in ("samples", "logs", "status"):
        assert run(["runs", command, str(home.path)]) == 0
        said = capsys.readouterr()
        assert harmless(said.out + said.err), command
    assert run(["runs", "status", f"{tmp_path}/{EVIL[:-1]}"]) == 2
    assert harmless(capsys.readouterr().err)


def test_the_view_of_a_run_shows_what_a_process_waits_for() -> None:
    progress = RunProgress("r", 3)
    progress.statuses = {"trainer": Status(waiting=EVIL)}
    assert harmless(" ".join(progress.waits()))


def number(cell: str) -> bool:
    try:
        return bool(float(cell) or True)
    except ValueError:
        return False


def test_a_cell_that_a_spreadsheet_would_execute_is_text(tmp_path: Path) -> None:
    names = ["=HYPERLINK(1)", "+1+cmd|' /C calc'!A0", "-x", "@SUM(1)", "\tx", "plain", "'quoted", "", 'a,"b"']
    rows = [{"step": i, "benchmark": name, "low": -0.5, "=k": "-1.5"} for i, name in enumerate(names)]
    file = tmp_path / "eval.csv"
    file.write_text(tables.text_of(["step", "benchmark", "low", "=k"], rows))
    with file.open(newline="") as stream:
        written = list(csv.reader(stream))
    for line in written:
        assert not [cell for cell in line if cell.startswith(tables.FORMULA) and not number(cell)]
    assert written[1][2:] == ["-0.500000", "-1.5"], "numbers stay numbers"
    back = tables.read(file)
    assert [row["benchmark"] for row in back] == names and back[0]["=k"] == "-1.5"
    file.write_text(tables.text_of(["step", "benchmark", "low", "=k"], back))
    assert tables.read(file) == back


def test_a_run_finds_its_benchmark_again(tmp_path: Path) -> None:
    home = RunDir(tmp_path)
    home.eval.mkdir()
    row = {"step": 0, "version": 0, "benchmark": "=evil", "items": 1, "n": 1, "avg_at_n": 0.5, "stderr": 0.0, "k": 1}
    row |= {"pass_at_k": 0.5, "due_step": 0}
    home.eval_csv.write_text(tables.text_of(tuple(row), [row]))
    assert list(run_files.eval_rows(home)) == ["=evil"]
