"""Rows of every format, compressed ones too; values that are missing, broken or beyond what can travel."""

from __future__ import annotations

import csv
import gzip
import json
import random
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from astracli.config.recipe_data import DataTable
from astracli.data import datasets
from astracli.data.rows import ArrowRows, open_rows
from astracli.data.values import as_text
from astracli.errors import UserError

TEXTS = ["plain", 'say "hi", please', "two\nlines", "é \u2028 \x85 \U0001f600", "a;b\tc"]
ROWS: list[dict[str, Any]] = [{"problem": f"{i} {TEXTS[i % 5]}", "answer": str(i)} for i in range(40)]


def as_jsonl(path: Path) -> None:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\r\n" for row in ROWS), "utf-8", newline="")


def as_json(path: Path) -> None:
    path.write_text(json.dumps(ROWS, indent=1), "utf-8")


def wrapped(path: Path) -> None:
    path.write_text(json.dumps({"version": {"data": [1]}, "data": ROWS}), "utf-8")


def as_csv(path: Path, delimiter: str = ",", encoding: str = "utf-8-sig") -> None:
    with path.open("w", encoding=encoding, newline="") as file:
        writer = csv.DictWriter(file, ["problem", "answer"], delimiter=delimiter)
        writer.writeheader()
        writer.writerows(ROWS)


def as_arrow(path: Path, *, stream: bool = False, codec: str | None = None) -> None:
    import pyarrow as pa

    table = pa.Table.from_pylist(ROWS)
    options = pa.ipc.IpcWriteOptions(compression=codec)
    new = pa.ipc.new_stream if stream else pa.ipc.new_file
    with new(str(path), table.schema, options=options) as writer:
        writer.write_table(table, max_chunksize=7)


KINDS: dict[str, Callable[[Path], None]] = {
    "a.jsonl": as_jsonl,
    "lines.json": as_jsonl,
    "list.json": as_json,
    "wrapped.json": wrapped,
    "a.csv": as_csv,
    "semicolons.csv": lambda path: as_csv(path, ";", "utf-8"),
    "a.tsv": lambda path: as_csv(path, "\t"),
    "a.arrow": as_arrow,
    "stream.arrow": lambda path: as_arrow(path, stream=True),
    "packed.feather": lambda path: as_arrow(path, codec="zstd"),
}


@pytest.mark.parametrize("name", KINDS)
def test_any_row_of_any_format(tmp_path: Path, name: str) -> None:
    KINDS[name](tmp_path / name)
    found = open_rows(tmp_path / name, "train")
    places = random.Random(1).sample(range(40), 40)
    assert [found.row(i) for i in places] == [ROWS[i] for i in places]
    assert list(found) == ROWS and len(found) == 40


@pytest.mark.parametrize("name", ["a.jsonl", "list.json", "a.csv"])
@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_compressed_files_are_unpacked_once(
    tmp_path: Path, name: str, suffix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    import zstandard

    monkeypatch.setenv("ASTRA_CACHE_DIR", str(tmp_path / "cache"))
    KINDS[name](tmp_path / name)
    raw, packed = (tmp_path / name).read_bytes(), tmp_path / (name + suffix)
    halves = (raw[:500], raw[500:])  # two frames behind each other are one file
    packed.write_bytes(b"".join(map(gzip.compress if suffix == ".gz" else zstandard.compress, halves)))
    for _ in range(2):
        assert list(open_rows(packed, "train")) == ROWS
        assert len(list((tmp_path / "cache" / "datasets").iterdir())) == 1
    with pytest.raises(UserError, match=rf"row 1 of `{packed}` \(line \d\).*no field `q`"):
        datasets.load(DataTable(source=str(packed), question_field="q"))
    packed.write_bytes(packed.read_bytes()[:-9])
    with pytest.raises(UserError, match="cannot be unpacked"):
        open_rows(packed, "train")


def test_a_directory_of_files_has_splits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "set"
    (folder / "data").mkdir(parents=True)
    as_csv(folder / "data" / "train-0.csv", encoding="utf-8")
    (folder / "data" / "test-0.csv").write_text("problem,answer\nlast,1\n")
    assert len(open_rows(folder, "train")) == 40
    assert (
        [row["problem"] for row in open_rows(folder, "test")]
        == ["last"]
        == [row["problem"] for row in open_rows(folder, "")]
    )
    assert len(open_rows(folder, "train[:10%]")) == 4
    with pytest.raises(UserError, match="has no split `dev`: train, test"):
        open_rows(folder, "dev")


def test_a_file_named_after_its_split_is_read_as_it_is(tmp_path: Path) -> None:
    """Other columns than the other split's, which one schema for all would refuse."""
    as_csv(tmp_path / "train.csv")
    (tmp_path / "test.jsonl").write_text('{"other": NaN}\n')
    assert list(open_rows(tmp_path, "train")) == ROWS and list(open_rows(tmp_path, "")) == [{"other": None}]
    assert open_rows(tmp_path, "test").path == tmp_path / "test.jsonl"


def test_configurations_of_a_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    head = "configs:\n- config_name: easy\n  data_files: e.jsonl\n- config_name: hard\n  data_files: h.jsonl\n"
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "README.md").write_text(f"---\n{head}---\n")
    for name in "eh":
        (tmp_path / "set" / f"{name}.jsonl").write_text(json.dumps({"problem": name, "answer": "1"}) + "\n")
    table = DataTable(source=str(tmp_path / "set"), config="hard")
    assert [problem.question for problem in datasets.load(table)] == ["h"]
    with pytest.raises(UserError, match=r"easy.*hard") as caught:
        datasets.load(DataTable(source=str(tmp_path / "set")))
    assert "data.config" in str(caught.value.hint)


def test_missing_values_are_missing_in_every_format(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    (tmp_path / "a.jsonl").write_text('{"x": null, "y": NaN, "z": [NaN, {"w": NaN}]}\n')
    (tmp_path / "a.csv").write_text('x,y\n,nan\n"",2\n')
    pq.write_table(pa.table({"x": pa.array([None], pa.int64()), "y": [float("nan")]}), tmp_path / "a.parquet")
    assert open_rows(tmp_path / "a.jsonl", "").row(0) == {"x": None, "y": None, "z": [None, {"w": None}]}
    assert list(open_rows(tmp_path / "a.csv", "")) == [{"x": None, "y": "nan"}, {"x": None, "y": "2"}]
    assert open_rows(tmp_path / "a.parquet", "").row(0) == {"x": None, "y": None}
    table = DataTable(source=str(tmp_path / "a.parquet"), question_field="y", answer_field="x")
    with pytest.raises(UserError, match=r"row 1 of .*field `y` has no value"):
        datasets.load(table)


def test_numbers_keep_what_is_written(tmp_path: Path) -> None:
    digits = "7" * 5000
    (tmp_path / "a.jsonl").write_text(f'{{"problem": "p", "answer": "{digits}"}}\n{{"problem": "q", "answer": 2.0}}\n')
    assert [p.answer for p in datasets.load(DataTable(source=str(tmp_path / "a.jsonl")))] == [digits, "2"]
    assert [as_text(v) for v in (1e23, -0.0, 1e15, 0.1, 3)] == ["1" + "0" * 23, "0", "1" + "0" * 15, "0.1", "3"]
    (tmp_path / "b.jsonl").write_text('{"problem": "p", "answer": 1e999}\n')
    with pytest.raises(UserError, match=r"row 1 .*`answer` is a number that is not finite"):
        datasets.load(DataTable(source=str(tmp_path / "b.jsonl")))


@pytest.mark.parametrize(
    ("name", "before", "after", "where"),
    [
        ("a.jsonl", '{"problem": "1", "answer": "2"}\n{"problem": "9999", "answer": ', "}\n", "line 2 column 31"),
        ("a.json", '[{"problem": "1",\n "answer": -', "}]", "line 2 column 13"),
        ("b.json", '{"problem": "1", "answer": [', ']}\n{"problem": "1", "answer": "2"}\n', "line 1 column 29"),
        ("c.json", '{"data": [{"problem": "1", "answer": ', "}]}", "line 1 column 38"),
    ],
)
def test_a_number_of_more_digits_than_can_be_read_is_refused_with_its_place(
    tmp_path: Path, name: str, before: str, after: str, where: str
) -> None:
    file = tmp_path / name
    file.write_text(before + "9" * 5000 + after)
    with pytest.raises(UserError, match=rf"`.*{name}` {where} holds a whole number of 5,000 digits") as refused:
        datasets.load(DataTable(source=str(file)))
    assert "9" * 50 not in str(refused.value)


def test_typed_columns_are_plain_values(tmp_path: Path) -> None:
    from datetime import date
    from decimal import Decimal

    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = [{"day": date(2026, 11, 30), "price": Decimal("2.50"), "tags": ["a"], "deep": {"n": 1}, "raw": b"\x00"}]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    (row,) = open_rows(tmp_path / "a.parquet", "")
    assert row == {"day": "2026-11-30", "price": "2.50", "tags": ["a"], "deep": {"n": 1}, "raw": b"\x00"}


def deep(levels: int) -> str:
    return "[" * levels + "]" * levels


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "a.jsonl",
            b'{"a": 1}\n{"a": "x \\ud83d"}',
            r"row 2 .*line 2\): column `a` holds half .*U\+D83D\) at character 3",
        ),
        ("a.jsonl", b'\n{"a": {"b": "\\udc00"}}', r"row 1 .*\(line 2\): column `a.b` holds half"),
        ("a.jsonl", b'{"a": ' + deep(200).encode() + b"}", "row 1 .*column `a` is nested more than 100 levels"),
        ("a.jsonl", b'{"a": ' + deep(200_000).encode() + b"}", r"row 1 .*\(line 1\) is nested more than 100 levels"),
        ("a.jsonl", b'{"a": 1}\n{"a": }', "line 2 is not JSON: Expecting value at column 7"),
        ("a.jsonl", '{"a": 1}'.encode("utf-16"), "is UTF-16"),
        ("a.json", b'[{"a": 1}, 2]', "line 1: something else than an object"),
        ("a.json", b'[{"a": 1}\n {"a": 2}]', "line 1: something else than an object"),
        ("a.json", b'[{"a": 1},\n{"a": [1}', "ends inside the row that begins at line 2"),
        ("a.json", b'[{"a": 1},\n\n{"a": x}]', "line 3 is not JSON"),
        ("a.json", b'{"a": {"b": 1},\n "c": 2}', "holds no list of objects"),
        ("a.csv", b"a,b\n1,2\n1,2,3\n", r"row 2 .*\(line 3\) has 3 fields, the header 2"),
        ("a.csv", b'a,b\n"x\ny",2\n"x"z,1\n', "line 4 is no record of CSV"),
        ("a.csv", b"a,a\n1,2\n", "two columns `a`"),
        ("a.csv", b"a,b\n1,\xff\n", "line 2 is not UTF-8"),
        ("a.parquet", b"PAR1", "no readable Parquet file"),
        ("a.arrow", b"ARROW1", "no readable Arrow file"),
    ],
)
def test_what_is_broken_is_named(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        list(open_rows(tmp_path / name, "train"))


@pytest.mark.parametrize("name", ["a.csv", "list.json", "a.arrow"])
def test_memory_does_not_grow_with_the_texts(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(f"{__name__}.ROWS", [{"problem": "x" * 4000, "answer": str(i)} for i in range(2000)])
    KINDS[name](tmp_path / name)
    assert (tmp_path / name).stat().st_size > 8_000_000
    open_rows(tmp_path / name, "train").row(0)
    tracemalloc.start()
    found = open_rows(tmp_path / name, "train")
    assert [int(found.row(i)["answer"]) for i in (1999, 3, 1000)] == [1999, 3, 1000]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 500_000, peak


def test_batches_of_a_compressed_arrow_file_come_and_go(tmp_path: Path) -> None:
    as_arrow(tmp_path / "a.arrow", codec="lz4")
    found = ArrowRows(tmp_path / "a.arrow")
    assert list(found) == ROWS and found.batch.cache_info().maxsize == 8  # type: ignore[attr-defined]
