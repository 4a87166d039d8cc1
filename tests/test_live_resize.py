"""The live view on a terminal whose size changes, seen through an emulator of one that breaks long lines anew."""

from __future__ import annotations

import io
import re

import pytest
from hub_tools import hub_state
from rich.console import Console

from astracli.hub.types import Counts
from astracli.process.worker import Status
from astracli.report import live
from astracli.report.live import LiveView, RunProgress

CODE = re.compile(r"\x1b\[(\??)(\d*)([A-Za-z])")

EMPTY = "\0"
"""A cell that was erased: no part of its line when that is broken anew."""


class Terminal(io.StringIO):
    """Lines as a terminal keeps them: what does not fit its width goes on in the next row, also after a resize."""

    def __init__(self, columns: int, rows: int):
        super().__init__()
        self.columns, self.rows = columns, rows
        self.lines: list[str] = [""]
        """Of any length; each fills `_rows` rows."""
        self.row = self.column = 0
        """Of the cursor: a row of the broken lines, counted from the first."""

    def isatty(self) -> bool:
        return True

    def _rows(self, line: str) -> int:
        return max(1, -(-len(line) // self.columns))

    def _place(self) -> tuple[int, int]:
        """(line, first column of the cursor's row in it)"""
        row = self.row
        for number, line in enumerate(self.lines):
            if row < self._rows(line):
                return number, row * self.columns
            row -= self._rows(line)
        raise AssertionError("below the last line")

    def resize(self, columns: int) -> None:
        """The cursor stays in its line, behind the same text."""
        line, start = self._place()
        at = start + self.column
        self.lines = [each.rstrip(EMPTY) if i != line else each for i, each in enumerate(self.lines)]
        self.columns = columns
        before = sum(self._rows(each) for each in self.lines[:line])
        self.row, self.column = before + min(at // columns, self._rows(self.lines[line]) - 1), at % columns

    def write(self, text: str) -> int:
        position = 0
        while position < len(text):
            if match := CODE.match(text, position):
                self._code(match[1], int(match[2] or 1), match[3], match[2])
                position = match.end()
                continue
            self._character(text[position])
            position += 1
        return len(text)

    def _character(self, character: str) -> None:
        line, start = self._place()
        if character == "\r":
            self.column = 0
        elif character == "\n":
            self.row += self._rows(self.lines[line]) - start // self.columns
            self.column = 0
            if line + 1 == len(self.lines):
                self.lines.append("")
        else:
            held = self.lines[line].ljust(start + self.column)
            self.lines[line] = held[: start + self.column] + character + held[start + self.column + 1 :]
            self.column += 1

    def _code(self, private: str, count: int, kind: str, given: str) -> None:
        if private or kind == "m":
            return
        line, start = self._place()
        if kind == "A":
            self.row = max(0, self.row - count)
        elif kind == "J":
            assert not given
            self.lines[line:] = [self.lines[line][: start + self.column]]
        elif kind == "K":
            assert given == "2", "the whole row"
            row = self.lines[line]
            self.lines[line] = row[:start] + EMPTY * min(self.columns, len(row) - start) + row[start + self.columns :]
        else:
            raise AssertionError(kind)

    def text(self) -> list[str]:
        shown = (line.replace(EMPTY, " ").rstrip() for line in self.lines)
        return [line for line in shown if line]


@pytest.mark.parametrize("sizes", [[100, 60], [100, 47, 31], [100, 47, 90, 33], [60, 100, 100], [100, 99, 98]])
def test_a_resized_terminal_keeps_no_leftovers(monkeypatch: pytest.MonkeyPatch, sizes: list[int]) -> None:
    monkeypatch.setattr(live, "LIVE_EVERY_S", 0.0)
    terminal = Terminal(sizes[0], 40)
    terminal.write("before\n")
    console = Console(file=terminal, force_terminal=True, color_system=None, legacy_windows=False)
    console.size = (sizes[0], 40)
    view = LiveView(console)
    progress = RunProgress("a-run-with-a-name-20261130-201500", 100, clock=lambda: 100.0, began=35.0)
    waiting = {
        f"trainer{i}": Status("ready", "waiting for 3 of 16 groups in flight, and more words " * 2, heard=1.0)
        for i in range(3)
    }
    progress.feed([{"step_s": 2.0, "backward_s": 1.0}], hub_state(counts=Counts(consumed_steps=7)), waiting, "running")
    view.update(progress)
    for columns in sizes[1:]:
        terminal.resize(columns)
        console.size = (columns, 40)
        view.update(progress)
        fresh = Terminal(columns, 40)
        Console(file=fresh, force_terminal=True, color_system=None, width=columns).print(live.draw(progress))
        assert terminal.text() == ["before", *fresh.text()]
    view.close()
    assert terminal.text() == ["before"]
