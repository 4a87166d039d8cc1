"""The registry of benchmarks: names, counts that are checked, and local copies."""

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from astracli.config import recipe_io
from astracli.config.benchmarks import BENCHMARKS
from astracli.data import arithmetic, benchmarks
from astracli.data.content_hash import content_hash
from astracli.data.prompts import Problem
from astracli.errors import UserError
from astracli.rewards.grader import grade_number


@pytest.fixture
def made_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sets of made-up items pass for benchmarks: their hashes are not looked at."""
    made_up = {name: replace(spec, hashes=()) for name, spec in BENCHMARKS.items()}
    monkeypatch.setattr("astracli.config.benchmarks.BENCHMARKS", made_up)


def write_items(path: Path, n: int, question: str = "problem", repeat: int = 1) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [{"id": f"i{i}", question: f"q{i}", "answer": f"0{i}"} for i in range(n)] * repeat
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_registry_has_the_samples_and_counts_of_the_reference() -> None:
    table = {name: (spec.counts[0], spec.samples) for name, spec in BENCHMARKS.items()}
    assert table == {
        "arithmetic-heldout": (256, 8),
        "arithmetic-steps-heldout": (256, 4),
        "arithmetic-sums-heldout": (96, 8),
        "arithmetic-products-heldout": (128, 4),
        "aime24": (30, 16),
        "aime25": (30, 16),
        "amc": (45, 16),
        "amc23": (40, 16),
        "amc22_23": (83, 16),
        "minerva": (272, 4),
        "math500": (500, 4),
        "gsm8k": (1319, 4),
        "olympiadbench": (675, 4),
    }


def test_arithmetic_needs_no_file() -> None:
    assert benchmarks.fetch("arithmetic-heldout") is None
    found = benchmarks.load("arithmetic-heldout")
    assert (len(found.items), found.samples, found.items[0].question) == (256, 8, "90+59")


def test_generated_sums_are_asked_as_the_recipe_asks() -> None:
    found = benchmarks.load("arithmetic-sums-heldout", own_prompt="What is {question}?")
    assert {item.meta["level"] for item in found.items} == {"add2"} and len(found.items) == 96
    assert found.messages(found.items[0])[-1]["content"] == f"What is {found.items[0].question}?"


def test_shown_sums_of_the_small_recipe_are_right_and_none_is_asked_in_its_evaluation() -> None:
    recipe = recipe_io.load("smollm2-135m-m2po-delta", ())
    shots = recipe.data.few_shot
    assert len(shots) == 4 and recipe.data.template == "What is {question}?"
    for shot in shots:
        a, b = shot.question.split("+")
        assert shot.answer == f"{a} + {b} = {int(a) + int(b)}"
        assert min(int(a), int(b)) < 10 or not arithmetic.is_held_out("+", int(a), int(b))


def test_sums_of_the_small_recipe_pay_nothing_for_what_was_read() -> None:
    recipe = recipe_io.load("smollm2-135m-m2po-delta", ())
    items = arithmetic.held_out(96, recipe.data.levels)
    assert [item.id for item in items] == [item.id for item in benchmarks.load("arithmetic-sums-heldout").items]
    asked = [*items, *(arithmetic.draw(i, recipe.seed, recipe.data.levels) for i in range(500))]
    copies = ("{q}", "{q} =", "{q} is a sum.", "{a}", "{b}", "The sum of {a} and {b}", r"\boxed{{{q}}}", "{q} = {q}")
    for copy in copies:
        texts = [copy.format(q=p.question, a=p.meta["a"], b=p.meta["b"]) for p in asked]
        verdicts = {grade_number(p.answer, text) for p, text in zip(asked, texts, strict=True)}
        assert verdicts <= {"wrong", "no_answer"}, copy
    assert all(grade_number(p.answer, f"{p.question} = {p.answer}") == "right" for p in asked)
    answers = Counter(arithmetic.draw(i, recipe.seed, recipe.data.levels).answer for i in range(5000))
    assert answers.most_common(1)[0][1] < 0.02 * 5000, "what always the same number earns"


def test_unknown_name_says_the_nearest() -> None:
    with pytest.raises(UserError) as caught:
        benchmarks.load("aime-24")
    assert caught.value.hint == "did you mean `aime24`?"


@pytest.mark.usefixtures("made_up")
def test_local_file_and_prompt(tmp_path: Path) -> None:
    found = benchmarks.load("aime24", write_items(tmp_path / "a.jsonl", 30))
    assert found.samples == 16 and found.pass_k == 4
    assert found.messages(found.items[3])[-1]["content"] == (
        "q3\nLet's think step by step. Please put your final answer within \\boxed{}."
    )


@pytest.mark.usefixtures("made_up")
def test_doubled_and_cut_sets_are_refused_with_both_counts(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"has 30 items, .* holds 120, 90 of them repeated"):
        benchmarks.load("aime24", write_items(tmp_path / "a.jsonl", 30, repeat=4))
    with pytest.raises(UserError, match=r"has 675 or 674 items, .* holds 29"):
        benchmarks.load("olympiadbench", write_items(tmp_path / "o.jsonl", 29))


@pytest.mark.usefixtures("made_up")
def test_data_directory_and_its_eval_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ASTRA_DATA_DIR", str(tmp_path))
    with pytest.raises(UserError, match="is not on this machine"):
        benchmarks.load("amc23")
    inner = write_items(tmp_path / "eval" / "amc23.jsonl", 40, question="question")
    assert benchmarks.fetch("amc23") == str(inner)
    outer = write_items(tmp_path / "amc23.jsonl", 40)
    gsm8k = write_items(tmp_path / "eval" / "gsm8k_test.jsonl", 1319)
    assert benchmarks.fetch_all(["amc23", "gsm8k", "arithmetic-heldout"]) == {
        "amc23": str(outer),
        "gsm8k": str(gsm8k),
        "arithmetic-heldout": None,
    }
    (tmp_path / "w").mkdir()
    monkeypatch.chdir(tmp_path / "w")
    Path("amc23").mkdir()  # a folder of that name where one works is no copy of the benchmark
    assert benchmarks.fetch("amc23") == str(outer)


@pytest.mark.usefixtures("made_up")
def test_the_recipes_directory_comes_before_the_environments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets as hf

    monkeypatch.setenv("ASTRA_DATA_DIR", str(tmp_path / "env"))
    write_items(tmp_path / "env" / "amc23.jsonl", 40)
    mine = write_items(tmp_path / "mine" / "eval" / "amc23.jsonl", 40)
    assert benchmarks.fetch("amc23", str(tmp_path / "mine")) == str(mine)
    rows = {"problem": [f"q{i}" for i in range(30)], "answer": [f"{i}" for i in range(30)]}
    saved = tmp_path / "mine" / "aime25"
    hf.DatasetDict({"test": hf.Dataset.from_dict(rows)}).save_to_disk(str(saved))
    assert benchmarks.fetch_all(["aime25"], str(tmp_path / "mine")) == {"aime25": str(saved)}
    with pytest.raises(UserError, match=r"data\.path = `.*nowhere` is no directory"):
        benchmarks.fetch("amc23", str(tmp_path / "nowhere"))


def test_content_hash_sees_what_is_said_and_not_how_it_is_set() -> None:
    items = [Problem("a", "What is $\\dfrac{1}{2}$ of  4?", "002"), Problem("b", "Say $x$", "\\left(1, 2\\right)")]
    same = [Problem("1", "say\n$x$", "(1,2)"), Problem("2", "What is \\frac{1}{2} of 4?", "2")]
    assert content_hash(items) == content_hash(same)
    assert (
        len({content_hash(s) for s in (items, items[:1], items * 2, [items[0], Problem("b", "Say $x$", "(2,1)")])}) == 4
    )
    assert content_hash([Problem("a", "q", "1.0")]) != content_hash([Problem("a", "q", "10")])


def test_changed_and_unknown_content_is_refused_with_both_hashes(tmp_path: Path) -> None:
    path = write_items(tmp_path / "a.jsonl", 30)
    with pytest.raises(
        UserError, match=r"`aime24` has the content hash 50c69a59aea22c18, `.*a.jsonl` has [0-9a-f]{16}"
    ):
        benchmarks.load("aime24", path)


def test_without_a_recorded_hash_the_count_is_checked_and_that_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "eval").mkdir()
    path = write_items(tmp_path / "eval" / "amc.jsonl", 45)
    assert benchmarks.fetch("amc", str(tmp_path)) == str(path)
    said = capsys.readouterr().err
    assert said.startswith("benchmark `amc`: the content hash of the 45-item set is not recorded, its count is checked")
    assert content_hash(benchmarks.load("amc", path).items) in said
    for wrong in (44, 46, 180):
        write_items(path, wrong)
        with pytest.raises(UserError, match=f"`amc` has 45 items, .* holds {wrong}"):
            benchmarks.fetch("amc", str(tmp_path))
    write_items(tmp_path / "eval" / "olympiadbench.jsonl", 674)
    benchmarks.fetch("olympiadbench", str(tmp_path))
    assert "the content hash of the 674-item set is not recorded" in capsys.readouterr().err
    write_items(tmp_path / "eval" / "olympiadbench.jsonl", 675)
    with pytest.raises(UserError, match="content hash"):
        benchmarks.fetch("olympiadbench", str(tmp_path))


def test_every_benchmark_says_licence_and_whether_anybody_loaded_it() -> None:
    assert all(spec.licence for spec in BENCHMARKS.values())
    assert {n for n, spec in BENCHMARKS.items() if spec.hub and not spec.hashes} == {"amc"}
    assert not any(spec.hub_loaded for spec in BENCHMARKS.values())


def test_a_set_of_ones_own_by_path(tmp_path: Path) -> None:
    path = write_items(tmp_path / "mine.jsonl", 7, question="question")
    found = benchmarks.load(str(path))
    assert (found.name, len(found.items), found.samples) == ("mine", 7, 4)
    assert found.messages(found.items[3]) == ({"role": "user", "content": "q3"},)
    assert benchmarks.fetch_all([str(path)]) == {str(path): str(path)}
    with pytest.raises(UserError, match="two benchmarks are called `mine`"):
        benchmarks.fetch_all([str(path), str(write_items(tmp_path / "b" / "mine.jsonl", 3))])
    with pytest.raises(UserError, match="no data at"):
        benchmarks.fetch(str(tmp_path / "nothing.jsonl"))
