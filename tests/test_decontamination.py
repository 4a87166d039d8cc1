"""Training problems that are benchmark items: found, counted, left out."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from astracli.config.recipe import EvalTable
from astracli.config.recipe_data import DataTable
from astracli.data import datasets, decontamination
from astracli.data.decontamination import find
from astracli.data.prompts import Problem
from astracli.errors import UserError
from astracli.launch import problem_files
from astracli.runs import find as runs

FIXTURE = Path(__file__).parent / "fixtures" / "problems.jsonl"
LONG = "A bag holds seven red balls and five blue balls and we draw two of them at random without putting them back"


def problems(*texts: str) -> list[Problem]:
    return [Problem(f"p{i}", text, "1") for i, text in enumerate(texts)]


def test_equal_near_and_clean() -> None:
    items = {"b": problems("What is $1+1$?", LONG)}
    train = problems(
        "what is 1 + 1",
        LONG + ". Find the chance.",
        "What is $1+2$?",
        LONG[:40] + " and then we stop and go home for good",
    )
    found = find(train, items)
    assert [(f.row, f.item_id, f.kind) for f in found] == [(0, "p0", "equal"), (1, "p1", "near")]
    assert found[0].share == 1.0 and 0.6 <= found[1].share <= 1.0


def test_share_is_of_the_shorter_text_and_the_threshold_counts() -> None:
    half = " ".join(LONG.split()[:16])  # 7 of its 7 n-grams stand in the item
    assert [f.share for f in find(problems(half), {"b": problems(LONG)})] == [1.0]
    mixed = half + " until nobody in the whole wide world can say any more how many there were"
    assert find(problems(mixed), {"b": problems(LONG)}) == []
    assert len(find(problems(mixed), {"b": problems(LONG)}, near=0.3)) == 1


def test_removed_from_a_file_and_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Fixture rows as training set, the first two of them as a benchmark of one's own."""
    monkeypatch.setenv("ASTRA_CACHE_DIR", str(tmp_path / "cache"))
    mine = tmp_path / "mine.jsonl"
    mine.write_text("".join(FIXTURE.open(encoding="utf-8").readlines()[:2]))
    every = [p.id for p in datasets.load(DataTable(source=str(FIXTURE)))]

    def ids(mode: str) -> list[str]:
        data = DataTable(source=str(FIXTURE), decontaminate=mode)  # type: ignore[arg-type]
        recipe: Any = SimpleNamespace(data=data, training_data=data, eval=EvalTable())
        paths = problem_files.decontaminated(recipe, {"": str(FIXTURE)}, {str(mine): str(mine)})
        return [p.id for p in datasets.load(data, paths[""])]

    assert ids("off") == every and capsys.readouterr().err == ""
    assert ids("report") == every
    assert f"warning: 2 of {len(every)} training problems are in a benchmark" in capsys.readouterr().err
    assert ids("remove") == every[2:] == ids("remove")
    assert "left out" in capsys.readouterr().err


def test_a_resumed_run_keeps_its_problems_whatever_benchmarks_it_has_now(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A run that began without the items of one benchmark, resumed with another one, with both, and with none."""
    monkeypatch.setenv("ASTRA_CACHE_DIR", str(tmp_path / "cache"))
    lines = FIXTURE.open(encoding="utf-8").readlines()
    one, two = tmp_path / "one.jsonl", tmp_path / "two.jsonl"
    one.write_text("".join(lines[:2]))
    two.write_text(lines[3])
    data = DataTable(source=str(FIXTURE), decontaminate="remove")
    recipe: Any = SimpleNamespace(data=data, training_data=data, eval=EvalTable())
    run = runs.create("r", tmp_path / "run")

    def files(*benchmarks: Path, resumed: bool = True) -> dict[str, Path | None]:
        fetched = {str(place): str(place) for place in benchmarks}
        return problem_files.decontaminated(recipe, {"": str(FIXTURE)}, fetched, run if resumed else None)

    began = files(one, resumed=False)
    problem_files.pin(run, recipe, began)
    for benchmarks in ((two,), (one, two), ()):
        capsys.readouterr()
        assert files(*benchmarks) == began
        problem_files.check(run, recipe, began)
        said = capsys.readouterr().err
        warned = f"warning: 1 of {len(lines) - 2} training problems are in a benchmark: {two} 1 (1 equal); stay in: a"
        assert warned in said if benchmarks else said == ""
    gone = began[""]
    assert gone is not None
    gone.unlink()
    problem_files.check(run, recipe, files(one))
    gone.unlink()
    with pytest.raises(UserError, match="others than when") as refused:
        problem_files.check(run, recipe, files(two))
    assert "with the same eval.benchmarks it is made again" in str(refused.value.hint)
    run.unlock()


def test_summary_counts_by_benchmark() -> None:
    found = find(problems("a b c", "d e f", "g"), {"one": problems("a b c"), "two": problems("d e f", "x")})
    assert decontamination.summary(found, 3) == (
        "2 of 3 training problems are in a benchmark: one 1 (1 equal), two 1 (1 equal)"
    )
