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
from astracli.launch import inputs as problems_of_a_run

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
        recipe: Any = SimpleNamespace(data=data, eval=EvalTable())
        paths = problems_of_a_run.decontaminated(recipe, {"": str(FIXTURE)}, {str(mine): str(mine)})
        return [p.id for p in datasets.load(data, paths[""])]

    assert ids("off") == every and capsys.readouterr().err == ""
    assert ids("report") == every
    assert f"warning: 2 of {len(every)} training problems are in a benchmark" in capsys.readouterr().err
    assert ids("remove") == every[2:] == ids("remove")
    assert "left out" in capsys.readouterr().err


def test_summary_counts_by_benchmark() -> None:
    found = find(problems("a b c", "d e f", "g"), {"one": problems("a b c"), "two": problems("d e f", "x")})
    assert decontamination.summary(found, 3) == (
        "2 of 3 training problems are in a benchmark: one 1 (1 equal), two 1 (1 equal)"
    )
