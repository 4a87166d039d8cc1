"""Training sets that stay on disk: rows of every kind of file by place; each prompt once an epoch, kills included."""

from __future__ import annotations

import json
import random
import tracemalloc
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hub_tools import in_file, open_store

from astracli.config.recipe_data import DataTable
from astracli.data import datasets
from astracli.data.prompts import PromptSource
from astracli.data.rows import GROUPS, ParquetRows, open_rows
from astracli.data.text_rows import JsonlRows
from astracli.errors import UserError
from astracli.hub.store import HubStore
from astracli.launch import problem_files
from astracli.rl.types import Group, Sample, Segment, pack_group
from astracli.runs import find as runs


def made(n: int, width: int = 0) -> list[dict[str, Any]]:
    return [{"id": f"r{i}", "problem": f"q{i} " + "x" * width, "answer": i} for i in range(n)]


def jsonl(path: Path, rows: list[dict[str, Any]]) -> Path:
    file = path / "set.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def parquet(path: Path, rows: list[dict[str, Any]], group: int = 7) -> Path:
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path / "set.parquet", row_group_size=group)
    return path / "set.parquet"


def saved(path: Path, rows: list[dict[str, Any]]) -> Path:
    import datasets as hf

    hf.DatasetDict({"train": hf.Dataset.from_list(rows)}).save_to_disk(str(path / "saved"))
    return path / "saved"


def folder(path: Path, rows: list[dict[str, Any]]) -> Path:
    (path / "folder").mkdir()
    jsonl(path / "folder", rows).rename(path / "folder" / "train.jsonl")
    return path / "folder"


@pytest.mark.parametrize("write", [jsonl, parquet, saved, folder])
def test_any_row_of_any_kind_of_file(
    tmp_path: Path, write: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    rows = made(50)
    found = open_rows(write(tmp_path, rows), "train")
    places = random.Random(1).sample(range(50), 50)
    assert [found.row(i) for i in places] == [rows[i] for i in places]
    assert list(found) == rows and len(found) == 50


def test_empty_lines_are_no_rows_and_messages_count_them(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_bytes(b'{"a": 1}\n\n  \n{"a": "\xc3\xa9"}\r\n{"a":\n{"a": "\xff"}')
    rows = JsonlRows(file)
    assert (len(rows), rows.row(0), rows.row(1)) == (4, {"a": 1}, {"a": "é"})
    with pytest.raises(UserError, match="line 5 is not JSON"):
        rows.row(2)
    with pytest.raises(UserError, match="line 6 is not UTF-8"):
        rows.row(3)


def test_memory_does_not_grow_with_the_texts(tmp_path: Path) -> None:
    rows = made(2000, width=4000)
    file, table = jsonl(tmp_path, rows), parquet(tmp_path, rows, group=50)
    assert file.stat().st_size > 8_000_000
    source = DataTable(source=str(file))
    datasets.load(source)
    tracemalloc.start()
    prompts = PromptSource(source, 3)
    assert len({prompts.problem(i).id for i in range(2000)}) == 2000
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 500_000, peak
    lazy = ParquetRows(table)
    for place in random.Random(2).sample(range(2000), 300):
        assert lazy.row(place)["answer"] == place
    held = lazy.group.cache_info()
    assert held.currsize <= GROUPS and held.misses > GROUPS


def test_names_stay_unique(tmp_path: Path) -> None:
    file = jsonl(tmp_path, [{"id": name, "problem": name, "answer": 1} for name in ("a", "a#2", "a", "a")])
    loaded = datasets.load(DataTable(source=str(file)))
    assert [p.id for p in loaded] == ["a", "a#2", "a#2#2", "a#3"] and loaded[2].id == "a#2#2"
    assert loaded.duplicates == 2


# -- epochs and kills --------------------------------------------------------------------------------------------------

ROWS, BATCH, EPOCHS = 30, 4, 3


def open_hub(folder: Path) -> HubStore:
    return open_store(folder, batch_groups=BATCH, steps=1000)


def graded(lease: int, version: int, rewards: tuple[float, float]) -> bytes:
    tokens = Segment(version, np.arange(3, dtype=np.int32), np.full(3, -0.5, np.float32))
    samples = [Sample(i, [tokens], "stop", reward, "right") for i, reward in enumerate(rewards)]
    return pack_group(Group(lease, f"p{lease}", np.array([1, 2], np.int32), samples))


def attempt(folder: Path, chance: random.Random, start: int, events: int) -> int:
    """A run that goes on at step `start` and is killed after so many events. -> the step it would go on from."""
    hub = open_hub(folder)
    hub.rewind(start, start)
    hub.announce(start, start)
    hub.engine_state("engine0", start, "ready")
    step, held = start, []
    for _ in range(events):
        held += [lease.lease_id for lease in hub.lease("w", chance.randint(1, 5), engine="engine0").leases]
        chance.shuffle(held)
        for lease in [held.pop() for _ in range(min(len(held), chance.randint(0, 4)))]:
            fate = chance.random()
            if fate < 0.1:
                hub.skip(lease, "prompt of 3000 tokens")
            elif fate < 0.2:
                hub.give_back([lease])
            else:
                hub.put(graded(lease, step, (0.0, 1.0) if fate < 0.8 else (1.0, 1.0)))
        if hub.batch(step).batch:
            step += 1
            hub.announce(step, step)
            hub.engine_state("engine0", step, "ready")
            hub.ack(step - 1, step, step if step % 2 == 0 else None)
    hub.close()
    return step - step % 2  # a checkpoint every two steps: the odd one is trained again


@pytest.mark.parametrize("seed", [1, 2])
def test_killed_and_resumed_every_prompt_is_asked_once_an_epoch(tmp_path: Path, seed: int) -> None:
    chance, step = random.Random(seed), 0
    data = DataTable(source=str(jsonl(tmp_path, made(ROWS))))
    kills = 0
    while step * BATCH < ROWS * EPOCHS:
        step = attempt(tmp_path, chance, step, chance.randint(5, 20))
        kills += 1
    assert kills >= 4
    rows = in_file(tmp_path, "SELECT lease_id, prompt, state FROM groups ORDER BY lease_id")
    fates = Counter(state for _, _, state in rows)
    assert fates["assigned"] >= step * BATCH and fates["skipped"] and fates["dropped"]
    assert [prompt for _, prompt, _ in rows] == list(range(len(rows))), "no place is left out, none is asked twice"
    source = PromptSource(data, 5)
    for epoch in range(len(rows) // ROWS):
        names = [source.problem(prompt).id for _, prompt, _ in rows[epoch * ROWS : (epoch + 1) * ROWS]]
        assert sorted(names) == sorted(f"r{i}" for i in range(ROWS))


def test_a_resume_refuses_other_problems(tmp_path: Path) -> None:
    rows = made(5)
    data = DataTable(source=str(jsonl(tmp_path, rows)))
    recipe: Any = SimpleNamespace(data=data, training_data=data)
    run = runs.create("r", tmp_path / "run")
    problem_files.pin(run, recipe, {"": Path(recipe.data.source)})
    assert json.loads((run.path / "data.json").read_text())["rows"] == 5
    jsonl(tmp_path, [row | {"answer": "mended"} for row in rows])
    problem_files.check(run, recipe, {"": Path(recipe.data.source)})  # the same questions in the same order
    jsonl(tmp_path, rows[::-1])
    with pytest.raises(UserError, match=r"others than when .* began: 5 rows of .* then, 5 of") as caught:
        problem_files.check(run, recipe, {"": Path(recipe.data.source)})
    assert "put the old file back" in str(caught.value.hint)
    run.unlock()
