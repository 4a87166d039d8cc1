"""What the commands do: recipe in, exit code out. What can be refused is refused before anything is started."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from astracli.config import recipe_io
from astracli.config.recipe import Recipe
from astracli.data import fetch
from astracli.errors import UserError
from astracli.launch import inputs, job, problems, recipe_changes
from astracli.launch.job import Job
from astracli.machine import facts as machine
from astracli.models import registry
from astracli.models.adapter_tools import has_chat_template
from astracli.plan import build as planning
from astracli.plan.build import Command, LaunchPlan
from astracli.process.console import say
from astracli.runs import find as runs
from astracli.runs import metrics


@dataclass(frozen=True)
class Source:
    """What a job reads, all of it on this machine."""

    paths: Mapping[str, Any]
    seconds: float
    """Spent on fetching."""


def planned(recipe: Recipe, command: Command, facts: Mapping[str, Any] | None = None) -> LaunchPlan:
    """The plan of a command, for this machine or the one that `facts` describes; never refuses what the machine lacks,
    only what is wrong."""
    recorded = facts["checkpoint"] if facts is not None else None
    if recorded is not None and recorded["path"] == recipe.model.path and recorded["config"] is not None:
        return _plan(recipe, command, recorded["config"], facts)
    return _plan(recipe, command, _config_if_here(recipe), facts)


def train(recipe: Recipe, *, run_dir: Path | None = None, resume: Path | None = None, dry_run: bool = False) -> int:
    """Run `astra train` to its end; the exit code. Raises UserError before the start, RunFailed after it."""
    if dry_run:
        print(json.dumps(planning.to_json(_plan(recipe, "train", _config_if_here(recipe))), indent=2, default=str))
        return 0
    began = time.monotonic()
    if resume is not None:
        recipe = recipe_changes.resumed_recipe(recipe, runs.existing(resume))
    plan = _refusing_plan(recipe, "train")
    there = run_dir is not None and run_dir.exists()
    run = runs.resume(resume) if resume is not None else runs.create(recipe.name, run_dir)
    step: int | None = None
    try:
        if resume is not None:
            step = recipe_changes.resume_step(run, recipe)
        source = _fetch(recipe, data=True, benchmarks=recipe.eval.benchmarks if recipe.eval.every else [])
        problems.pin(run, recipe, source.paths["data"])
    except BaseException:
        if resume is None:
            job.discard(run, there)
        raise
    attempt = job.open_run(run, recipe_io.to_json(recipe), planning.to_json(plan))
    extra: dict[str, dict[str, Any]] = {}
    if step is not None:
        extra = {"trainer": {"step": step}, "engine": {"await_weights": True}}
    task = Job(recipe, plan, run, attempt, source.paths, extra, resume_step=step, phases=_before(began, source))
    job.say_start(run, plan, attempt, step)
    try:
        code = task.run()
    finally:
        run.unlock()
    if task.summary:
        from astracli.report.summary_table import print_summary

        print_summary(task.summary)
    if code == 130:
        say(f"interrupted; go on with `astra train --resume {run.path}`")
    return code


def rollout(recipe: Recipe, *, weights: str | None = None, n: int, out: Path, run_dir: Path | None = None) -> int:
    """Generate and grade `n` groups into `out`; the exit code."""
    began = time.monotonic()
    recipe = recipe_changes.with_weights(recipe, weights)
    plan = _refusing_plan(recipe, "rollout")
    source = _fetch(recipe, data=True, benchmarks=[])
    run = runs.create(f"{recipe.name}-rollout", run_dir)
    attempt = job.open_run(run, recipe_io.to_json(recipe), planning.to_json(plan))
    extra = {"rollout": {"out": str(out.resolve()), "n": n}}
    task = Job(recipe, plan, run, attempt, source.paths, extra, prompts=n, phases=_before(began, source))
    job.say_start(run, plan, attempt, None)
    try:
        code = task.run()
    finally:
        run.unlock()
    if code == 0 or out.exists():
        say(("interrupted; " if code else "") + _rollout_words(out))
    return code


def evaluate(
    recipe: Recipe,
    *,
    weights: str | None = None,
    run_dir: Path | None = None,
    benchmarks: Sequence[str] | None = None,
    samples: int | None = None,
    out: Path | None = None,
    resume: Path | None = None,
    as_json: bool = False,
) -> int:
    """Evaluate once and print the figures; the exit code. Files go into `out`, else below the `eval/` of `run_dir`.

    `resume` goes on with an evaluation that was stopped; `recipe` is then its own.
    """
    began = time.monotonic()
    if resume is None:
        recipe = recipe_changes.with_evaluation(recipe_changes.with_weights(recipe, weights), benchmarks, samples)
    plan = _refusing_plan(recipe, "eval")
    source = _fetch(recipe, data=False, benchmarks=recipe.eval.benchmarks)
    if resume is not None:
        run = recipe_changes.resumed_evaluation(resume)
    elif out is not None:
        run = runs.create(f"{recipe.name}-eval", out)
    elif run_dir is not None:
        run = runs.create("", run_dir / "eval" / time.strftime("again-%Y%m%d-%H%M%S"))
    else:
        run = runs.create(f"{recipe.name}-eval")
    attempt = job.open_run(run, recipe_io.to_json(recipe), planning.to_json(plan))
    extra = {"eval": {"standalone": True, "out": str(run.eval.resolve()), "greedy": True}}
    task = Job(recipe, plan, run, attempt, source.paths, extra, phases=_before(began, source))
    job.say_start(run, plan, attempt, None)
    try:
        code = task.run()
    finally:
        run.unlock()
    if code == 0:
        document = json.loads((run.eval / "results.json").read_text())
        document |= {"weights": recipe.model.path, "path": str(run.eval)}
        _print_results(document, as_json)
    elif code == 130:
        say(f"interrupted; go on with `astra eval --resume {run.path}`")
    return code


def _before(began: float, source: Source) -> dict[str, float]:
    return {"planning": time.monotonic() - began - source.seconds, "fetching": source.seconds}


# -- plan -------------------------------------------------------------------------------------------------------------


def _plan(
    recipe: Recipe, command: Command, config: Mapping[str, Any] | None, facts: Mapping[str, Any] | None = None
) -> LaunchPlan:
    """`facts`: of another machine; None = this one."""
    from astracli.backends import choice as backend
    from astracli.doctor.gather import with_engine

    here = facts is None
    facts = with_engine(machine.probe(), recipe) if facts is None else facts
    adapter = registry.resolve(recipe, config)
    choice = backend.choose(adapter, facts, recipe, config)
    local = fetch.local_path(recipe.model.path) if here and config is not None else None
    size = sum(file.stat().st_size for file in local.glob("*.safetensors")) if local is not None else None
    return planning.build(recipe, adapter, choice, facts, command=command, config=config, checkpoint_bytes=size)


def _refusing_plan(recipe: Recipe, command: Command) -> LaunchPlan:
    """The plan, when it can run here. Raises UserError."""
    plan = _plan(recipe, command, _config_if_here(recipe))
    planning.refuse(plan)
    for process in plan.processes:
        if process.python is None and find_spec(process.module) is None:
            raise UserError(
                f"this version of astra has no `{process.module}`, which `{process.name}` needs",
                "use `--set rollout.engine=embedded`" if process.role == "engine" else "reinstall astracli",
            )
    return plan


def _config_if_here(recipe: Recipe) -> Mapping[str, Any] | None:
    """The model's config.json if it is on this machine, None for a Hub id that an adapter knows; else it is fetched."""
    path, revision = recipe.model.path, recipe.model.revision
    if fetch.local_path(path, made_by=recipe.model.made_by) is not None:
        return fetch.fetch_config(path, revision)
    known = any(item.adapter and path in item.adapter.known_configs for item in registry.installed())
    cached = fetch.cached_config(path, revision)
    return cached if cached is not None or known else fetch.fetch_config(path, revision)


def _fetch(recipe: Recipe, *, data: bool, benchmarks: Sequence[str]) -> Source:
    """Model, training problems and benchmarks, each checked before anything starts. Raises UserError."""
    from astracli.data import benchmarks as sets
    from astracli.data import datasets

    began = time.monotonic()
    inputs.check_setting(recipe, rewards=data)
    model = fetch.fetch_model(recipe.model.path, recipe.model.revision)
    inputs.check_checkpoint(model)
    if not has_chat_template(model):
        say(
            f"warning: no chat template in `{model}`: prompts go to the model as bare text, right for a base model and "
            "wrong for a chat model; copy its chat_template.jinja beside tokenizer.json"
        )
    fetched = sets.fetch_all(benchmarks, recipe.data.path)
    path = datasets.fetch(recipe) if data else None
    if path is not None:
        path = problems.decontaminated(recipe, path, fetched)
    paths = {"model": str(model), "data": path, "benchmarks": fetched}
    return Source(paths, time.monotonic() - began)


# -- results ----------------------------------------------------------------------------------------------------------


def _print_results(document: Mapping[str, Any], as_json: bool) -> None:
    """Figures of `astra eval` on stdout."""
    if as_json:
        print(json.dumps(document, indent=2))
        return
    from astracli.report.summary_table import result_lines

    print("\n".join(result_lines(document)))
    say(f"items and figures are in {document['path']}")


def _rollout_words(out: Path) -> str:
    """How many samples were written, and how they were graded. A file without any goes: it would be in the way when the
    same command is given again."""
    with out.open(encoding="utf-8") as lines:
        rewards = [record["reward"] for record in metrics.parse(lines)]
    if not rewards:
        out.unlink()
        return "no samples yet"
    return f"{len(rewards)} samples, mean reward {sum(rewards) / len(rewards):.3f}, in {out}"
