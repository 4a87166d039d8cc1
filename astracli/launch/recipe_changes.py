"""What a command changes in a recipe, and what a resume goes on with: which recipe, from which step."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path

from astracli.config import recipe_io
from astracli.config.recipe import Recipe
from astracli.data import fetch
from astracli.errors import UserError
from astracli.launch import resume_rules
from astracli.plan.types import TRAINING
from astracli.process.console import say
from astracli.runs import find as runs
from astracli.runs.changes import Changes, differences, shown
from astracli.runs.run_dir import ORIGIN, RunDir


def with_weights(recipe: Recipe, weights: str | None) -> Recipe:
    """Other weights in the place of the recipe's model."""
    if weights is None:
        return recipe
    local = fetch.local_path(weights, "--weights")
    path = weights if local is None or weights.startswith(fetch.BUNDLED_PREFIX) else str(local)
    return recipe.model_copy(update={"model": recipe.model.model_copy(update={"path": path, "revision": None})})


def with_evaluation(recipe: Recipe, benchmarks: Sequence[str] | None, samples: int | None) -> Recipe:
    """Other benchmarks or samples an item than the recipe's, None = its own. Raises UserError."""
    from astracli.config import benchmarks as sets

    names = list(benchmarks or recipe.eval.benchmarks)
    if not names:
        raise UserError(
            f"recipe `{recipe.name}` names no benchmark", f"name one: `--benchmark {next(iter(sets.BENCHMARKS))}`"
        )
    for name in names:
        sets.get(name, recipe)
    document = recipe_io.to_document(recipe)
    document["eval"]["benchmarks"] = names
    document["checkpoint"]["best"] = None  # it may name another one, and nothing is trained
    if isinstance(own := recipe.eval.samples, dict):
        document["eval"]["samples"] = {name: n for name, n in own.items() if name in names} or None
    if samples is not None:
        k = min(samples, recipe.eval.pass_k)
        document["eval"] |= {"samples": samples, "pass_k": k}
        if k < recipe.eval.pass_k:
            say(f"--samples {samples}: pass@{k} in the place of pass@{recipe.eval.pass_k}")
    document["launch"]["deterministic"] = True  # two evaluations with one seed write the same files
    checked = recipe_io.check(document, recipe.name)  # which adds what sources hold out
    return checked.model_copy(update={"eval": checked.eval.model_copy(update={"benchmarks": names})})


def require(recipe: Recipe, command: str) -> None:
    """Raise UserError for a recipe that is not one of this command: `[sft]` makes the difference."""
    if command == "sft" and recipe.sft is None:
        raise UserError(
            f"recipe `{recipe.name}` has no table [sft]: it is one of reinforcement learning",
            f"`astra train {recipe.name}`, or add [sft] to a recipe of your own; `tiny-sft` is a small one",
        )
    if command in ("train", "rollout") and recipe.sft is not None:
        raise UserError(
            f"recipe `{recipe.name}` has a table [sft]: it is one of supervised training",
            "`astra sft` runs it; `astra train RECIPE --from RUN`, with another recipe, goes on from its weights",
        )


def resumed_recipe(recipe: Recipe, run: RunDir) -> tuple[Recipe, Changes]:
    """The run's recipe with the changes that a resume allows, and these. Raises UserError with a reason for each key
    that may not change."""
    status = run.status()
    if status is not None and status.command not in TRAINING:
        raise UserError(
            f"`{run.path}` holds an `astra {status.command}`, only a training run can be resumed",
            f"start it again with `astra {status.command} {run.recipe_json}`",
        )
    stored = recipe_io.load(run.recipe_json)
    recipe = recipe.model_copy(update={"name": stored.name})
    changes = differences(recipe_io.to_document(stored), recipe_io.to_document(recipe))
    refused = {key: why for key in changes if (why := resume_rules.refusal(key)) is not None}
    if refused:
        lines = [f"`{key}` may not change on --resume: {why}" for key, why in refused.items()]
        values = {key: shown(changes[key][1]) for key in refused}  # a table inside a list takes a file
        words = (f"{key}={value}" if "{" not in value else f"{key}=..." for key, value in values.items())
        sets = " ".join(f"--set {shlex.quote(word)}" for word in words)
        from_weights = has_weights(run) and all(map(resume_rules.by_from, refused))
        raise UserError(
            "\n  ".join(lines),
            f"start a new run from the weights of this one: `astra {recipe.command} --from {run.path} {sets}`"
            if from_weights
            else f"start a new run: `astra {recipe.command} --recipe {run.recipe_json} {sets}`",
        )
    return recipe, changes


def has_weights(run: RunDir) -> bool:
    """Whether a new run can start from its weights: it has a checkpoint, or an export."""
    from astracli.training import checkpoint

    whole = (place / checkpoint.COMPLETE for place in run.checkpoints.glob("step_*"))
    return (run.export / ORIGIN).is_file() or any(file.is_file() for file in whole)


def of_resume(error: UserError, run: RunDir) -> UserError:
    """What is refused before a run goes on, with a hint that recommends nothing which the resume then refuses."""
    error.hint = resume_rules.completed(error.hint, "", run.path, weights=has_weights(run))
    return error


def resume_step(run: RunDir, recipe: Recipe) -> int:
    """Steps that the newest whole checkpoint has trained; 0 without one: the same run from its beginning."""
    status = run.status()
    if status is not None and status.state == "done" and (status.steps or 0) >= recipe.train.steps:
        raise UserError(
            f"run `{run.path}` is done: {status.step} of {status.steps} steps",
            f"train on with `astra {recipe.command} --resume {run.path} --set train.steps={2 * (status.steps or 1)}`",
        )
    step = checkpoint_step(run)
    if step and not run.hub_sqlite.is_file():
        raise UserError(
            f"`{run.hub_sqlite}` is gone: without the run's books nobody knows which prompts and groups were used",
            "put the file back, or start a new run from its weights: `astra runs export "
            f"{run.path} --out DIR`, then `--set model.path=DIR`",
        )
    if step > recipe.train.steps:
        raise UserError(f"train.steps = {recipe.train.steps}, but `{run.path}` has trained {step} steps already")
    return step


def checkpoint_step(run: RunDir) -> int:
    """Steps that the newest whole checkpoint has trained; 0 without one. Damaged ones are said, with what they cost."""
    from astracli.training import checkpoint

    newest = checkpoint.latest(run.checkpoints)
    step = newest.step if newest else 0
    if lost := checkpoint.damaged(run.checkpoints):
        names = ", ".join(f"`{checkpoint.place(run.checkpoints, one)}`" for one in lost)
        many = "checkpoints are" if len(lost) > 1 else "checkpoint is"
        where = f"the one of step {step}" if step else "the beginning"
        again = f"{lost[0] - step} step{'' if lost[0] - step == 1 else 's'}"
        say(
            f"warning: {len(lost)} {many} damaged or not whole: {names}; the run goes on from {where}, {again} are "
            "trained again"
        )
    return step


def resumed_evaluation(path: Path) -> RunDir:
    """A stopped evaluation, locked, without its hub's state, which would tell the workers to stop. Raises UserError."""
    status = runs.existing(path).status()
    if status is not None and (status.command != "eval" or status.state == "done"):
        what = "is done" if status.command == "eval" else f"is no evaluation but `astra {status.command}`"
        raise UserError(f"`{path}` {what}", "start a new one with `astra eval RECIPE`")
    run = runs.resume(path)
    for file in run.path.glob("hub.sqlite*"):
        file.unlink()
    return run
