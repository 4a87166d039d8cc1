"""Several sources by weight, what they hold out, and benchmarks that read as training sources do."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from astracli.config import benchmarks as specs
from astracli.config import recipe_io
from astracli.config.recipe import Recipe
from astracli.config.recipe_data import DataTable
from astracli.data import benchmarks, datasets
from astracli.data.problems import folded
from astracli.data.prompts import BLOCK, PromptSource, interleaved
from astracli.errors import UserError
from astracli.launch.recipe_changes import with_evaluation


def rows(path: Path, n: int, name: str = "q") -> str:
    path.write_text("".join(json.dumps({"problem": f"{name} {i}", "answer": str(i)}) + "\n" for i in range(n)))
    return str(path)


def recipe(data: dict[str, Any], **tables: Any) -> Recipe:
    document = recipe_io.to_document(recipe_io.load("qwen3.5-tiny-m2po-full"))
    return recipe_io.check(document | {"data": data} | tables, "r")


def test_sources_are_spread_evenly_by_weight() -> None:
    order = interleaved({"a": 3.0, "b": 1.0})
    assert [name for name, _ in order[:8]] == list("aabaaaba") and len(order) == BLOCK
    for share, weights in (([600, 250, 150], (60, 25, 15)), ([334, 333, 333], (1, 1, 1)), ([998, 1, 1], (1e9, 1, 1))):
        order = interleaved(dict(zip("abc", weights, strict=True)))
        assert sorted(Counter(name for name, _ in order).values(), reverse=True) == share
        for name in "abc":  # each source's own places, in their order
            assert [place for own, place in order if own == name] == list(range(sum(own == name for own, _ in order)))
    assert interleaved({"": 1.0}) == [("", 0)]


def test_a_mix_is_a_function_of_the_index(tmp_path: Path) -> None:
    a, b = rows(tmp_path / "a.jsonl", 7), rows(tmp_path / "b.jsonl", 3, "other")
    mix: Any = [
        {"source": a, "weight": 3},
        {"source": b, "name": "rare", "template": "Say {question}", "reward": "number"},
    ]
    source = PromptSource(DataTable(mix=mix), 5)
    asked = [source.problem(i) for i in range(4000)]
    assert Counter(problem.source for problem in asked) == {"a": 3000, "rare": 1000}
    again = PromptSource(DataTable(mix=mix), 5)
    assert [again.problem(i) for i in (3999, 17, 1000, 2)] == [asked[i] for i in (3999, 17, 1000, 2)]
    for name, n in (("a", 7), ("rare", 3)):
        own = [problem.id for problem in asked if problem.source == name]
        for epoch in range(len(own) // n):
            assert sorted(own[epoch * n : (epoch + 1) * n]) == [f"{name}/{i}" for i in range(n)]
    assert all(p.messages[0]["content"] == f"Say {p.question}" for p in asked if p.source == "rare")
    assert len(source) == BLOCK
    levels: Any = [{"source": "arithmetic", "levels": ["sub2"], "name": "sums"}, {"source": a}]
    mixed = PromptSource(DataTable(mix=levels), 5)
    assert {mixed.problem(i).source for i in range(4)} == {"sums", "a"} and mixed.kind(0) in ("sub2", "a/0")


def test_what_a_mix_leaves_out_is_the_tables(tmp_path: Path) -> None:
    made = recipe(
        {"source": "x", "config": "c", "system": "s", "mix": [{"source": "o/b"}, {"source": "o/d", "system": "t"}]}
    )
    from astracli.config.recipe_data import sets

    tables = sets(made.data)
    assert [(name, t.source, t.config, t.system, t.reward) for name, t in tables.items()] == [
        ("b", "o/b", None, "s", "math"),
        ("d", "o/d", None, "t", "math"),
    ]
    with pytest.raises(UserError, match=r"two sources of data.mix are called `b`"):
        recipe({"mix": [{"source": "o/b"}, {"source": "b.csv"}]})
    with pytest.raises(UserError, match=r"`data.source` is missing"):
        recipe({})


@pytest.mark.parametrize("holdout", [0.25, 20])
def test_held_out_questions_are_never_trained_on(tmp_path: Path, holdout: float) -> None:
    """Repeated questions, in other spacing too, stand on one side; the same ones in every run, shuffled rows or not."""
    texts = [f"How much is {i} apples?" for i in range(100)] + [f"how much  is {i} apples?" for i in range(50)]
    path = tmp_path / "a.jsonl"

    def sides(order: list[int]) -> tuple[list[str], list[str]]:
        path.write_text("".join(json.dumps({"problem": texts[i], "answer": 1}) + "\n" for i in order))
        table = DataTable(source=str(path), holdout=holdout)
        found = [[p.question for p in datasets.load(table, path, side)] for side in ("train", "held_out")]  # type: ignore[arg-type]
        assert len(datasets.load(table, path, "all")) == 150
        return found[0], found[1]

    train, held = sides(list(range(150)))
    keys = [set(map(folded, side)) for side in (train, held)]
    assert not keys[0] & keys[1] and len(keys[0] | keys[1]) == 100 and len(held) == len(keys[1])
    assert len(held) == 20 if holdout == 20 else 15 <= len(held) <= 35
    again = sides(list(range(149, -1, -1)))
    assert set(map(folded, again[1])) == keys[1] and sorted(again[0]) == sorted(train)
    asked = PromptSource(DataTable(source=str(path), holdout=holdout), 0)
    assert {folded(asked.problem(i).question) for i in range(len(asked))} == keys[0]


def test_a_share_that_leaves_a_side_empty_is_refused(tmp_path: Path) -> None:
    path = rows(tmp_path / "a.jsonl", 3)
    for holdout, said in ((3, "holds all of the 3"), (1e-9, "holds none of the 3")):
        with pytest.raises(UserError, match=said):
            datasets.load(DataTable(source=path, holdout=holdout))
    with pytest.raises(UserError, match="neither a share below 1 nor a whole number"):
        recipe({"source": path, "holdout": 1.5})
    with pytest.raises(UserError, match="arithmetic-heldout"):
        recipe({"source": "arithmetic", "holdout": 0.1})


def test_what_is_held_out_is_a_benchmark(tmp_path: Path) -> None:
    path = rows(tmp_path / "a.jsonl", 40)
    made = recipe({"source": path, "holdout": 0.3, "reward": "number", "system": "s"}, eval={"benchmarks": []})
    assert made.eval.benchmarks == ["holdout"]
    fetched = benchmarks.fetch_all(made.eval.benchmarks, None, made)
    assert fetched == {"holdout": path}
    found = benchmarks.load("holdout", path, recipe=made)
    assert found.grader == "number" and found.messages(found.items[0])[0] == {"role": "system", "content": "s"}
    held = {item.question for item in found.items}
    assert held and not held & {p.question for p in datasets.load(made.data)}
    mixed = recipe({"mix": [{"source": path, "holdout": 5, "reward": "number"}, {"source": "arithmetic"}]})
    assert mixed.eval.benchmarks[-1] == "holdout:a"
    found = benchmarks.load("holdout:a", path, recipe=mixed)
    assert (found.name, found.grader, len(found.items)) == ("holdout:a", "number", 5)
    assert with_evaluation(made, ["aime24"], None).eval.benchmarks == ["aime24"], "what is asked for and no more"


def test_benchmarks_of_ones_own_read_as_training_sources_do(tmp_path: Path) -> None:
    import gzip

    path = tmp_path / "mine.csv.gz"
    path.write_bytes(gzip.compress(b"ask,gold,topic\n1+1,2,sums\n2*2,4,products\n"))
    own = {"source": str(path), "question_field": "ask", "answer_field": "gold", "reward": "number", "samples": 8}
    sets = {"mine": own | {"template": "{topic}: {question}"}}
    made = recipe({"source": "arithmetic"}, eval={"benchmarks": ["mine"], "sets": sets})
    assert benchmarks.fetch_all(["mine"], None, made) == {"mine": str(path)}
    found = benchmarks.load("mine", path, recipe=made)
    assert [found.messages(item)[0]["content"] for item in found.items] == ["sums: 1+1", "products: 2*2"]
    assert (found.grader, found.samples, found.items[0].row["topic"]) == ("number", 8, "sums")
    assert recipe_io.check(recipe_io.to_document(made), "r") == made
    by_path = recipe({"source": "arithmetic", "question_field": "ask", "answer_field": "gold", "reward": "math_boxed"})
    found = benchmarks.load(str(path), path, recipe=by_path)
    assert (found.name, found.grader, len(found.items)) == ("mine", "math_boxed", 2), "the recipe's fields and reward"
    with pytest.raises(UserError, match="no such benchmark") as caught:
        recipe({"source": "arithmetic"}, eval={"benchmarks": ["min"], "sets": sets})
    assert "did you mean `mine`" in str(caught.value.hint)
    assert specs.is_path("owner/name") and specs.is_path("a.parquet") and not specs.is_path("holdout:a")


def test_the_systems_turn_is_asked_of_known_benchmarks_too() -> None:
    made = recipe({"source": "arithmetic", "system": "Be brief.", "template": "Solve {question}"})
    found = benchmarks.load("arithmetic-heldout", recipe=made)
    turns = found.messages(found.items[0])
    assert [turn["content"] for turn in turns] == ["Be brief.", found.items[0].question], "their own words stay"
    assert benchmarks.load("arithmetic-sums-heldout", recipe=made).prompt.template == "Solve {question}"


def test_earlier_recipes_say_prompt_for_template(tmp_path: Path) -> None:
    file = tmp_path / "old.toml"
    file.write_text('extends = "qwen3.5-4b-m2po-delta"\n[data]\nprompt = "Old {question}"\n')
    assert recipe_io.load(file).data.template == "Old {question}"
    assert recipe_io.load(file, ["data.prompt=New {question}"]).data.template == "New {question}"
    assert recipe_io.load(file, ["data.template=Now {question}"]).data.template == "Now {question}"
