"""Tables of the command line: aligned, wrapped, no wider than the terminal, and made from nested documents."""

from __future__ import annotations

import sys

import pytest

from astracli.cli.output import room, sections, table_lines


def test_tables_align_wrap_and_put_numbers_right() -> None:
    lines = table_lines(["name", "n", "words"], [["a", 5, "one two three four five six"], ["bb", 10, None]], width=32)
    assert lines == [
        "name   n  words",
        "a      5  one two three four",
        "          five six",
        "bb    10  -",
    ]


def test_a_table_is_no_wider_than_its_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "60")
    assert room() == 100, "a file or a pipe has no columns"
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    assert room() == 60
    monkeypatch.setenv("COLUMNS", "200")
    assert room() == 100


def test_a_nested_document_becomes_titled_tables() -> None:
    found = sections({"a": 1, "b": {"c": [1, 2], "d": []}, "e": [{"x": 1}, {"x": 2, "y": True}]})
    assert found == [
        (None, [], [["a", 1]]),
        ("b", [], [["c", "1, 2"], ["d", "-"]]),
        ("e", ["x", "y"], [[1, None], [2, True]]),
    ]
