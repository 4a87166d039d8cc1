"""Several runs beside each other: `astra runs list`, `astra runs compare`, `astra eval --compare A B C`."""

from __future__ import annotations

import itertools
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from conftest import Ran
from run_cases import TINY, make_run

from astracli.config import recipe_io
from astracli.evaluation.compare import holm
from astracli.report import many_runs
from astracli.runs.run_dir import RunDir

Astra = Callable[..., Ran]


def filled(path: Path, sets: Sequence[str], scores: Sequence[float], rewards: Sequence[float], right: int) -> RunDir:
    """A run with scores at steps 0, 10, ..., a reward a step, and ten items of which the first `right` are right."""
    run = make_run(path)
    run.recipe_json.write_text(recipe_io.to_json(recipe_io.load(TINY, sets)))
    (run.eval / "items").mkdir(parents=True)
    lines = ["step,version,benchmark,items,n,avg_at_n,stderr,k,pass_at_k,due_step"]
    for step, score in enumerate(scores):
        lines += [f"{10 * step},0,{name},10,1,{score},0.05,1,{score},0" for name in ("b", "overall")]
    run.eval_csv.write_text("\n".join(lines) + "\n")
    records = [
        {"step": step, "process": "trainer", "reward_mean": 9.0, "arrived_groups": 4, "arrived_reward_mean": reward}
        for step, reward in enumerate(rewards)
    ]
    run.metrics_jsonl.write_text("".join(json.dumps(r) + "\n" for r in records))
    items = [{"benchmark": "b", "problem_id": f"i{i}", "verdict": "right" if i < right else "wrong"} for i in range(10)]
    (run.eval / "items" / "step_000020_b.jsonl").write_text("".join(json.dumps(i) + "\n" for i in items))
    return run


@pytest.fixture
def three(runs: Path) -> Path:
    filled(runs / "low", ["train.learning_rate=1e-5"], [0.1, 0.2, 0.3], [0.0, 0.5], right=0)
    filled(runs / "high", ["train.learning_rate=1e-3", "seed=7"], [0.1, 0.4, 0.9], [0.25] * 30, right=9)
    filled(runs / "same", ["train.learning_rate=1e-5"], [0.1], [], right=1)
    return runs


def test_the_list_has_score_reward_steps_and_what_differs(astra: Astra, three: Path) -> None:
    rows = {row["run"]: row for row in json.loads(astra("runs", "list", "--json").out)}
    assert rows["high"]["score"] == {"benchmark": "b", "step": 20, "n": 1, "avg_at_n": 0.9, "stderr": 0.05}
    assert (rows["low"]["reward"], rows["high"]["reward"], rows["same"]["reward"]) == (0.25, 0.25, None)
    seed = recipe_io.load(TINY).seed
    assert rows["high"]["settings"] == {"seed": 7, "train.learning_rate": 0.001}
    assert rows["low"]["settings"] == rows["same"]["settings"] == {"seed": seed, "train.learning_rate": 1e-05}
    lines = {line.split()[0]: line for line in astra("runs", "list").out.splitlines()}
    assert lines["high"].split()[2:5] == ["40/100", "0.900", "0.250"]
    assert lines["high"].endswith("seed=7 train.learning_rate=0.001")
    assert lines["same"].split()[3:5] == ["0.100", "-"]


@pytest.mark.parametrize("content", ['{"a": ', "[1, 2]", "\0", "9" * 5000, "[" * 100_000, "step,benchmark\nx,b\n"])
@pytest.mark.parametrize("name", ["recipe.json", "eval/eval.csv", "eval/items/step_000020_b.jsonl"])
def test_a_damaged_file_is_named_and_breaks_no_list(astra: Astra, three: Path, name: str, content: str) -> None:
    (three / "high" / name).write_text(content)
    said = astra("runs", "compare", "high", "low")
    rows = name != "eval/eval.csv" or "\n" in content  # a table without rows is none
    assert (f"{name}` is damaged" in said.err.replace("\n", " ")) == rows, said
    assert said.code == (2 if rows and "items" not in name else 0)  # without its items there are means, and no test
    assert "unexpected" not in said.err and "Traceback" not in said.err
    listed = astra("runs", "list")
    assert listed.code == 0 and {"low", "high", "same"} <= {line.split()[0] for line in listed.out.splitlines() if line}


def test_the_newest_reward_is_read_from_the_end_of_the_file(tmp_path: Path) -> None:
    run = make_run(tmp_path / "long")
    record = {"process": "trainer", "arrived_groups": 1, "filler": "x" * 2000}
    steps = [record | {"step": s, "arrived_reward_mean": float(s >= 990)} for s in range(1000)]
    run.metrics_jsonl.write_text("".join(json.dumps(r) + "\n" for r in steps))
    assert run.metrics_jsonl.stat().st_size > 2 * many_runs.TAIL_BYTES
    assert many_runs.newest_reward(run) == 1.0
    nothing = {"step": 1000, "process": "trainer", "arrived_groups": 0, "arrived_reward_mean": 7.0, "reward_mean": 0.5}
    with run.metrics_jsonl.open("a") as file:
        file.write(json.dumps(nothing) + "\n")
    assert many_runs.newest_reward(run) == 1.0, "a step in which no group came in has none"


def test_many_differences_are_cut_and_counted() -> None:
    differ = {f"k.{i}": [i, None] for i in range(8)}
    assert many_runs.differing_words(differ, 0) == "k.0=0 k.1=1 k.2=2 k.3=3 k.4=4 k.5=5 and 2 more"
    assert many_runs.differing_words({"m": ["a b", True], "n": [[1, "x"], 0.5]}, 0) == 'm=a b n=[1, "x"]'


def test_compare_shows_table_settings_plot_and_tests(astra: Astra, three: Path) -> None:
    found = json.loads(astra("runs", "compare", "low", "high", "same", "--json").out)
    assert [(row["mark"], row["run"]) for row in found["runs"]] == [("A", "low"), ("B", "high"), ("C", "same")]
    assert found["settings"]["train.learning_rate"] == [1e-05, 0.001, 1e-05]
    assert found["plot"]["lines"]["B"] == [[0, 0.1], [10, 0.4], [20, 0.9]]
    tests = {test["run"]: test for test in found["tests"]}
    assert list(tests) == ["high", "same"], "each against the first; none is left out"
    # nine of ten items differ, all in one direction: 2 of the 2^9 choices of their signs are as far from 0
    assert tests["high"]["p"] == pytest.approx(2 / 2**9) and tests["high"]["p_holm"] == pytest.approx(4 / 2**9)
    assert (tests["high"]["verdict"], tests["same"]["verdict"]) == ("real", "not shown")
    assert (tests["same"]["p"], tests["same"]["p_holm"]) == (1.0, 1.0)
    said = astra("runs", "compare", "low", "high", "same").out
    assert "score (avg@n), over steps" in said and "corrected for 2 comparisons" in said
    assert next(line for line in said.splitlines() if line.startswith("train.learning_rate")).split()[1:] == [
        "1e-05", "0.001", "1e-05",
    ]  # fmt: skip


def test_compare_plots_a_metric_and_says_what_it_cannot_test(astra: Astra, three: Path) -> None:
    make_run(three / "bare")
    ran = astra("runs", "compare", "low", "bare", "--metric", "arrived_reward_mean")
    assert ran.code == 0 and "arrived_reward_mean, over steps" in ran.out and "paired test" not in ran.out
    assert "not in the paired test: `bare`: `runs/bare` holds no evaluation" in ran.err
    ran = astra("runs", "compare", "low", "high", "--metric", "reward_men")
    assert ran.code == 2 and "hint: did you mean reward_mean" in ran.err
    ran = astra("runs", "compare", "low")
    assert ran.code == 2 and "a comparison takes two runs or more" in ran.err


def test_scores_compare_on_the_benchmarks_that_all_runs_have(astra: Astra, three: Path) -> None:
    """`low` has the benchmark `c` too, and then `high` as well, beside a third one; RUN@STEP is that step's score."""

    def add(run: str, name: str, *scores: float) -> None:
        table = three / run / "eval" / "eval.csv"
        rows = "".join(f"{10 * i},0,{name},10,1,{score},0.03,1,0,0\n" for i, score in enumerate(scores))
        table.write_text(table.read_text() + rows)

    def scores() -> list[tuple[float, ...]]:
        found = json.loads(astra("runs", "compare", "low@10", "high", "--json").out)["runs"]
        return [tuple(row["score"][key] for key in ("step", "avg_at_n", "stderr")) for row in found]

    add("low", "c", 0.5, 0.6, 0.9)
    assert scores() == [(10, 0.2, 0.05), (20, 0.9, 0.05)]
    ran = astra("runs", "compare", "low@10", "high")
    assert "scores are those on b, which all of these runs were evaluated on" in ran.err
    assert " ".join(ran.out.splitlines()[1].split()).startswith("A low@10 done 40 0.100 ± 0.050 0.200 ± 0.050 10 0.25 ")
    add("high", "c", 0.5, 0.7)
    for run, name in (("high", "d"), ("low", "e")):
        add(run, name, 1.0, 1.0, 1.0)
    mean = 0.5 * (0.05**2 + 0.03**2) ** 0.5
    assert scores() == [(10, pytest.approx(0.4), pytest.approx(mean)), (10, pytest.approx(0.55), pytest.approx(mean))]
    table = three / "low" / "eval" / "eval.csv"
    table.write_text(table.read_text().replace(",b,", ",x,").replace(",c,", ",y,"))
    assert "their scores do not compare" in astra("runs", "compare", "low", "high").err
    ran = astra("eval", "--compare", "low@best", "high")
    assert ran.code == 2 and "keeps no best checkpoint" in ran.err


def test_scores_by_other_graders_are_said_not_to_mean_the_same(astra: Astra, three: Path) -> None:
    for name, grader in (("low", "math"), ("high", "mine:short")):
        table = three / name / "eval" / "eval.csv"
        head, *rows = table.read_text().splitlines()
        table.write_text("\n".join([f"{head},grader", *(f"{row},{grader}" for row in rows)]) + "\n")
    said = astra("runs", "compare", "low", "high", "same").err
    assert "warning: `b` was not graded alike (A by math, B by mine:short): its scores do not mean the same" in said
    assert "graded alike" not in astra("runs", "compare", "low", "same").err
    assert "evaluation  step 20: b (math) avg@1 0.300" in astra("runs", "status", "low").out


def test_tables_fit_a_terminal_of_80_columns(astra: Astra, three: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    commands = (
        ("runs", "list"), ("runs", "compare", "low", "high", "same"), ("eval", "--compare", "low", "high", "same"),
        ("eval", "--compare", "low", "high"), ("runs", "status", "low"), ("recipes", "list"),
        ("train", TINY, "--dry-run"),
    )  # fmt: skip
    for command in commands:
        ran = astra(*command)
        assert ran.code == 0 and len(ran.out.splitlines()) > 1, command
        assert max(ran.out.splitlines(), key=len)[80:] == "", command


def test_eval_compare_takes_as_many_as_are_given(astra: Astra, three: Path) -> None:
    filled(three / "fourth", [], [0.1], [], right=2)
    found = json.loads(astra("eval", "--compare", "low", "high", "same", "fourth", "--json").out)
    assert found["first"] == "low"
    assert [test["run"] for test in found["comparisons"]] == ["high", "same", "fourth"]
    assert "same" in astra("eval", "--compare", "low", "high", "same").out
    for extra in (["--samples", "3"], ["--set", "seed=1"], ["--dry-run"]):
        ran = astra("eval", "--compare", "low", "high", *extra)
        assert ran.code == 2 and f"--compare generates nothing: {extra[0]} means nothing with it" in ran.err
    ran = astra("eval", "--compare", "low", "high", "low")
    assert ran.code == 2 and "`low` is given twice" in ran.err
    ran = astra("eval", TINY, "extra")
    assert ran.code == 2 and "unexpected extra argument (extra)" in ran.err


def test_holm_by_hand_and_its_error_rate() -> None:
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.5, 0.9]) == [1.0, 1.0] and holm([0.02]) == [0.02] and holm([]) == []
    for ps in itertools.permutations([0.2, 0.001, 0.04]):
        assert dict(zip(ps, holm(ps), strict=True)) == pytest.approx({0.001: 0.003, 0.04: 0.08, 0.2: 0.2})


def test_a_plot_by_hand() -> None:
    drawn = many_runs.plot({"A": [(0, 0.0), (4, 1.0)], "B": [(0, 0.0), (4, 0.0)]}, width=14, height=3)
    assert drawn == [
        "1 |        ..A",
        "  |    ....",
        "0 | *........B",
        "  +-----------",
        "    0        4",
    ]
    assert many_runs.plot({}) == [] and many_runs.plot({"A": []}) == []
    (top, *_, _axis, _ends) = many_runs.plot({"A": [(3, 0.5)]})
    assert top.startswith("0.5 |") and sum("A" in line for line in many_runs.plot({"A": [(3, 0.5)]})) == 1
