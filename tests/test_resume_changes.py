"""A resume that changes the recipe: what is taken, refused with reasons, recorded and shown."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from launch_tools import plan_of, tiny
from test_launch import stored_run

from astracli.errors import UserError
from astracli.launch import recipe_changes, run
from astracli.machine.findings import PlanProblem
from astracli.report import run_files, status_page


def test_resume_takes_what_the_stored_state_allows_and_says_what_changed(tmp_path: Path) -> None:
    stored = stored_run(tmp_path, tiny())
    allowed = tiny(train__steps=200, train__learning_rate=1.0, eval__every=7, checkpoint__keep=3)
    recipe, changes = recipe_changes.resumed_recipe(allowed, stored)
    assert recipe == allowed
    own = tiny()
    assert changes == {
        "train.steps": (own.train.steps, 200),
        "train.learning_rate": (own.train.learning_rate, 1.0),
        "eval.every": (own.eval.every, 7),
        "checkpoint.keep": (own.checkpoint.keep, 3),
    }
    assert recipe_changes.resumed_recipe(tiny(), stored) == (own, {})


def test_a_hint_before_a_run_goes_on_recommends_nothing_that_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A check of the start finds a fault in a file that was changed since the run began, and names a key."""
    stored = stored_run(tmp_path, tiny())

    def refuse(*_: object, **__: object) -> None:
        raise UserError("no question", "name the right one with data.question_field")

    monkeypatch.setattr("astracli.launch.inputs.check_setting", lambda *_: None)
    monkeypatch.setattr("astracli.data.benchmarks.fetch_all", lambda *_: {})
    monkeypatch.setattr("astracli.data.datasets.fetch", refuse)
    for _ in range(2):  # a refusal leaves the run free
        with pytest.raises(UserError, match="no question") as refused:
            run.train(tiny(), resume=stored.path)
    assert refused.value.hint == (
        "name the right one with data.question_field; another value of `data.question_field` takes a new run, --resume "
        f"refuses it: `astra train --recipe {tmp_path}/recipe.json --set data.question_field=...`"
    )


def test_resume_refuses_the_rest_with_a_reason_for_each_and_a_way(tmp_path: Path) -> None:
    stored = stored_run(tmp_path, tiny())
    with pytest.raises(UserError, match="`seed` may not change") as refused:
        recipe_changes.resumed_recipe(tiny(seed=3), stored)
    assert refused.value.hint == f"start a new run: `astra train --recipe {tmp_path}/recipe.json --set seed=3`", (
        "it has no weights yet that another run could start from"
    )
    (tmp_path / "checkpoints" / "step_000010").mkdir(parents=True)
    (tmp_path / "checkpoints" / "step_000010" / "COMPLETE").write_text("{}")
    with pytest.raises(UserError) as refused:
        recipe_changes.resumed_recipe(tiny(seed=3, train__batch_groups=4, train__steps=7), stored)
    assert refused.value.message == (
        "`seed` may not change on --resume: order of the problems and all draws follow from it\n"
        "  `train.batch_groups` may not change on --resume: "
        "batches that the hub has fixed already have the run's own size"
    )
    again = f"`astra train --from {tmp_path} --set seed=3 --set train.batch_groups=4`"
    assert refused.value.hint == f"start a new run from the weights of this one: {again}"
    with pytest.raises(UserError) as refused:
        recipe_changes.resumed_recipe(tiny(model__path="astra:other"), stored)
    again = f"`astra train --recipe {tmp_path}/recipe.json --set model.path=astra:other`"
    assert refused.value.hint == f"start a new run: {again}", "--from would start from the run's own model again"
    for key, value in (("algorithm__name", "grpo"), ("launch__deterministic", True)):
        with pytest.raises(UserError, match=rf"`{key.replace('__', '.')}` may not change on --resume: "):
            recipe_changes.resumed_recipe(tiny(**{key: value}), stored)


def test_a_change_is_recorded_with_its_step_and_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stored = stored_run(tmp_path, tiny())
    partial = tmp_path / "eval" / "partial" / "step_000010"
    partial.mkdir(parents=True)
    run.apply_changes(stored, 20, 2, {"train.learning_rate": (1e-05, 5e-06), "model.revision": (None, "main")})
    assert partial.is_dir(), "these answers were drawn as they would be now"
    run.apply_changes(stored, 30, 3, {"eval.temperature": (0.6, 1.0)})
    assert not partial.exists(), "answers drawn at another temperature"
    run.apply_changes(stored, 30, 4, {})
    lines = [json.loads(line) for line in stored.changes_jsonl.read_text().splitlines()]
    assert [(line["step"], line["attempt"]) for line in lines] == [(20, 2), (30, 3)]
    assert lines[0]["changes"] == {"train.learning_rate": [1e-05, 5e-06], "model.revision": [None, "main"]}
    first = "from step 20: train.learning_rate 1e-05 -> 5e-06, model.revision none -> main"
    assert capsys.readouterr().err.splitlines()[0] == f"changed {first}"
    second = "from step 30: eval.temperature 0.6 -> 1.0"
    assert run_files.row(stored)["changes"] == [first, second]
    stored.start(recipe="t", steps=40, step=30)
    shown = [words for key, words in status_page.page(stored).rows if key == "changed"]
    assert shown == [first, second]


def test_a_plan_that_does_not_fit_names_a_command_that_goes_on_with_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A new run by the recipe would begin at step 0."""
    stored, recipe = stored_run(tmp_path, tiny()), tiny()
    way = f"run `astra train --recipe {recipe.name} --set train.tokens_per_microbatch=256`"
    problem = PlanProblem("memory", "too large", "too large", way)
    short = replace(plan_of(recipe), problems=(problem,))
    monkeypatch.setattr(run, "planned", lambda *_: short)
    with pytest.raises(UserError) as refused:
        run.train(recipe, resume=stored.path)
    assert refused.value.hint == f"run `astra train --resume {tmp_path} --set train.tokens_per_microbatch=256`"
    with pytest.raises(UserError) as refused:
        run.train(recipe, run_dir=tmp_path / "new")
    assert refused.value.hint == way
