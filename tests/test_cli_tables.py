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


def test_every_column_wraps_between_words_the_widest_first() -> None:
    rows = [["one two three four", 12345, "alpha beta"], ["x", 7, "/a/path/that/is/one/word and more"]]
    lines = table_lines(["what", "n", "words"], rows, width=44)
    assert lines == [
        "what             n  words",
        "one two      12345  alpha beta",
        "three four",
        "x                7  /a/path/that/is/one/word",
        "                    and more",
    ]
    assert "".join(table_lines([], [["a", "/a/path/that/is/one/word and more"]], width=20)).split() == [
        "a", "/a/path/that/is/one/word", "and", "more",
    ]  # fmt: skip


@pytest.mark.parametrize("width", [12, 40, 80])
def test_no_word_is_broken_at_any_width(width: int) -> None:
    rows = [[f"name{i}", i, "some words of a reason " * i, "x" * 30] for i in range(5)]
    lines = table_lines(["name", "n", "why", "place"], rows, width=width)
    words = {word for row in rows for cell in row for word in str(cell).split()} | {"name", "n", "why", "place"}
    assert {word for line in lines for word in line.split()} == words
    assert width < 80 or max(map(len, lines)) <= width


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
