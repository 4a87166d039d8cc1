"""What a command changes in a recipe, and what a resume goes on with: which recipe, from which step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from astracli.config import doors, recipe_io
from astracli.config.recipe import Recipe
from astracli.data import fetch
from astracli.errors import UserError
from astracli.process.console import say
from astracli.runs import find as runs
from astracli.runs.run_dir import RunDir

PORTIONS = (
    "train.tokens_per_microbatch", "train.activation_checkpointing", "train.optimizer_device", "train.reference_device",
    "rollout.max_running_requests", "rollout.running_ceiling", "eval.max_concurrency",
    *(f"rollout.{name}." for name in doors.names("astra.engines")),
)  # fmt: skip
"""How much is computed at once, where it lies and by which kernel: what a run that ran out of memory needs changed."""
CHANGEABLE = ("train.steps", "launch.", "metrics.", "resources.", "checkpoint.", *PORTIONS)
"""What `--set` may change on a resume: how long, where and how the run goes on, not what it learns from."""


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


def resumed_recipe(recipe: Recipe, run: RunDir) -> Recipe:
    """The run's recipe with the changes that a resume allows. Raises UserError for any other."""
    status = run.status()
    if status is not None and status.command != "train":
        raise UserError(
            f"`{run.path}` holds an `astra {status.command}`, only a training run can be resumed",
            f"start it again with `astra {status.command} {run.recipe_json}`",
        )
    stored = recipe_io.load(run.recipe_json)
    changed = [
        key for key in _differences(recipe_io.to_document(stored), recipe_io.to_document(recipe)) if key != "name"
    ]
    refused = [key for key in changed if not key.startswith(CHANGEABLE) or key == "launch.deterministic"]
    if refused:
        allowed = ", ".join(f"{key}*" if key.endswith(".") else key for key in CHANGEABLE)
        raise UserError(
            f"--set {refused[0]} on --resume: a run goes on as it began; what may change is {allowed}",
            f"start a new run with it: `astra train --recipe {run.recipe_json} --set {refused[0]}=...`",
        )
    return recipe.model_copy(update={"name": stored.name})


def _differences(before: Mapping[str, Any], after: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Dotted keys whose values differ."""
    found: list[str] = []
    for key in {**before, **after}:
        old, new = before.get(key), after.get(key)
        if isinstance(old, dict) and isinstance(new, dict):
            found += _differences(old, new, f"{prefix}{key}.")
        elif old != new:
            found.append(prefix + key)
    return found


def resume_step(run: RunDir, recipe: Recipe) -> int:
    """Steps that the newest whole checkpoint has trained; 0 without one: the same run from its beginning."""
    status = run.status()
    if status is not None and status.state == "done" and (status.steps or 0) >= recipe.train.steps:
        raise UserError(
            f"run `{run.path}` is done: {status.step} of {status.steps} steps",
            f"train on with `astra train --resume {run.path} --set train.steps={2 * (status.steps or 1)}`",
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
