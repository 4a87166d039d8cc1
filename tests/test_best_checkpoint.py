"""`checkpoint.best`: which checkpoint it is, that retention keeps it, and that what is evaluated has a checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from run_cases import TINY, make_run

from astracli.config import recipe_io
from astracli.errors import UserError
from astracli.hub.store import HubStore
from astracli.hub.types import HubSettings
from astracli.report import summary_table
from astracli.runs.run_dir import RunDir
from astracli.training import best, checkpoint

HELD_OUT = "arithmetic-heldout"


def evaluated(run: RunDir, scores: dict[int, float], *, checkpoints: Sequence[int]) -> None:
    """Scores of the held-out benchmark by step, and checkpoints that are whole."""
    run.eval.mkdir(exist_ok=True)
    lines = ["step,version,benchmark,items,n,avg_at_n,stderr,k,pass_at_k,due_step"]
    for step, score in scores.items():
        lines += [f"{step},{step},{HELD_OUT},256,8,{score},0.01,4,0.9,{step}"]
        lines += [f"{step},{step},overall,256,8,{1 - score},0.01,4,0.9,{step}"]
    run.eval_csv.write_text("\n".join(lines) + "\n")
    for step in checkpoints:
        place = checkpoint.place(run.checkpoints, step)
        place.mkdir(parents=True, exist_ok=True)
        (place / checkpoint.COMPLETE).write_text("{}")


def test_the_best_is_an_evaluated_checkpoint_and_of_equal_ones_the_earlier(tmp_path: Path) -> None:
    run = make_run(tmp_path / "a")
    assert best.best(run, HELD_OUT) is None
    scores = {0: 0.9, 10: 0.5, 20: 0.7, 30: 0.8, 40: 0.7, 50: 0.6}
    evaluated(run, scores, checkpoints=[10, 20, 40, 50])
    found = best.best(run, HELD_OUT)
    assert found is not None
    assert (found.score.step, found.score.avg_at_n, found.among) == (20, 0.7, 5), "30 has no checkpoint any more"
    assert found.path == run.checkpoints / "step_000020"
    other = best.best(run, "overall")
    assert other is not None and other.score.step == 10, "each benchmark for itself"
    words = summary_table.best_words(found.document(), "runs/a")
    assert words == (
        f"step 20, {HELD_OUT} avg@8 0.700 ± 0.010, the best of 5 evaluated; the model that the run started from scored "
        "0.900; `astra runs export runs/a --best`"
    )


def test_what_is_kept_is_the_best_and_what_is_being_evaluated(tmp_path: Path) -> None:
    run = make_run(tmp_path / "a")
    evaluated(run, {0: 0.9, 10: 0.7, 20: 0.5}, checkpoints=[10, 20, 30])
    keeps, plain = recipe_io.load(TINY, [f"checkpoint.best={HELD_OUT}"]), recipe_io.load(TINY)
    assert best.kept(run, keeps, {30}) == {10, 30} and best.kept(run, plain, {30}) == set()
    assert best.kept(make_run(tmp_path / "new"), keeps, {0}) == {0}


def test_retention_keeps_the_newest_and_what_it_is_told(tmp_path: Path) -> None:
    run = make_run(tmp_path / "a")
    evaluated(run, {}, checkpoints=[10, 20, 30, 40, 50])
    checkpoint.prune(run.checkpoints, 2, kept={20, 77})
    assert sorted(path.name for path in run.checkpoints.iterdir()) == ["step_000020", "step_000040", "step_000050"]
    checkpoint.prune(run.checkpoints, 1)
    assert [path.name for path in run.checkpoints.iterdir()] == ["step_000050"]


@pytest.mark.parametrize(
    ("sets", "message"),
    [
        (["checkpoint.best=math500"], "checkpoint.best = 'math500' is no benchmark of this run: it takes one of arith"),
        ([f"checkpoint.best={HELD_OUT}", "eval.every=0"], "needs evaluations and checkpoints, but eval.every is off"),
        (["checkpoint.best=overall", "checkpoint.every=0"], "checkpoints, but checkpoint.every is off"),
        (["checkpoint.best=overall", "eval.benchmarks=[]"], "checkpoints, but eval.benchmarks is off"),
    ],
)
def test_a_recipe_that_cannot_have_a_best_is_refused(sets: list[str], message: str) -> None:
    with pytest.raises(UserError) as refused:
        recipe_io.load(TINY, sets)
    assert message in refused.value.message


def test_what_is_evaluated_when_it_is_due_has_a_checkpoint() -> None:
    plain = recipe_io.load(TINY, ["train.steps=10", "checkpoint.every=4", "eval.every=3"])
    assert [step for step in range(1, 11) if plain.checkpoint_due(step)] == [4, 8, 10]
    keeps = recipe_io.load(
        TINY, ["train.steps=10", "checkpoint.every=4", "eval.every=3", f"checkpoint.best={HELD_OUT}"]
    )
    assert [step for step in range(1, 11) if keeps.checkpoint_due(step)] == [3, 4, 6, 8, 9, 10]


@pytest.mark.parametrize(("checkpoint_every", "taken"), [(0, 4), (5, 5)])
def test_an_evaluation_that_waits_takes_a_version_with_a_checkpoint(
    tmp_path: Path, checkpoint_every: int, taken: int
) -> None:
    settings = HubSettings(
        batch_groups=1, max_staleness=9, drop_equal_groups=False, lease_timeout_s=9.0, steps=9, eval_every=3,
        engines=("engine0",), checkpoint_every=checkpoint_every,
    )  # fmt: skip
    hub = HubStore(tmp_path / "hub.sqlite", settings)
    for version in range(5):
        pinned = hub.announce(version, version)
    assert pinned == [0, 4], "the evaluation of version 0 runs, and one that became due at 3 waits"
    hub.eval_done(0, 0, {})
    for version in range(5, 7):
        hub.announce(version, version)
    running = [(one.due_step, one.version) for one in hub.state().evals if one.state == "running"]
    assert running == [(3, taken)]
    hub.close()


def test_a_resume_without_evaluations_forgets_those_that_are_owed(tmp_path: Path) -> None:
    """Nobody would do them, and the run would wait for them at its end."""
    common: dict[str, Any] = {"batch_groups": 1, "max_staleness": 0, "drop_equal_groups": False, "lease_timeout_s": 9.0}
    hub = HubStore(tmp_path / "hub.sqlite", HubSettings(**common, steps=4, eval_every=2, engines=("engine0",)))
    hub.announce(0, 0)
    assert hub.pending_evals() == 1
    hub.close()
    again = HubStore(tmp_path / "hub.sqlite", HubSettings(**common, steps=4, eval_every=0, engines=("engine0",)))
    again.rewind(0, 0)
    again.announce(0, 0)
    assert again.pending_evals() == 0 and again.target("engine0").pinned is False
    again.close()


def test_export_of_the_best_says_why_there_is_none(astra: Callable[..., Any], runs: Path) -> None:
    run = make_run(runs / "a")
    refused = astra("runs", "export", "a", "--best")
    assert refused.code == 2 and "run `runs/a` keeps no best checkpoint: its checkpoint.best is not set" in refused.err
    run.recipe_json.write_text(recipe_io.to_json(recipe_io.load(TINY, [f"checkpoint.best={HELD_OUT}"])))
    evaluated(run, {0: 0.5}, checkpoints=[10])
    refused = astra("runs", "export", "a", "--best")
    assert refused.code == 2 and f"no checkpoint that was evaluated on {HELD_OUT}" in refused.err
    refused = astra("runs", "export", "a", "--best", "--step", "10")
    assert refused.code == 2 and "both --best and --step 10 given" in refused.err
