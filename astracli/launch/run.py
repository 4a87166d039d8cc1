"""What the commands do: recipe in, exit code out. What can be refused is refused before anything is started."""

from __future__ import annotations

import json
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

from astracli.config import recipe_io
from astracli.config.recipe import Recipe
from astracli.data import fetch
from astracli.errors import UserError
from astracli.launch import (
    from_run,
    job,
    problem_files,
    queued,
    random_weights,
    recipe_changes,
    resume_rules,
    teacher_inputs,
)
from astracli.launch.clusters import registry as clusters
from astracli.launch.clusters.contract import Queue
from astracli.launch.configs import RunContext
from astracli.launch.from_run import Source
from astracli.launch.inputs import Inputs, fetched, needs
from astracli.launch.job import Job
from astracli.machine import read as machine_read
from astracli.machine.facts import Machine
from astracli.models import registry
from astracli.models.chat import template_of
from astracli.plan.build import build, refuse
from astracli.plan.types import TRAINING, Command, LaunchPlan
from astracli.process.atomic import write_atomic
from astracli.process.config import Keep, SampleFile
from astracli.process.console import plain, say
from astracli.runs import changes as run_changes
from astracli.runs import find as runs
from astracli.runs import metrics
from astracli.runs.changes import Changes
from astracli.runs.run_dir import RunDir


def planned(
    recipe: Recipe, command: Command, facts: Machine | None = None, fleet: Mapping[str, Machine] = MappingProxyType({})
) -> LaunchPlan:
    """The plan of a command, for this machine or the one that `facts` describes, and the hosts of `fleet`; never
    refuses what a machine lacks, only what is wrong."""
    from astracli.backends import choice as backend
    from astracli.doctor.gather import with_engine

    here, recorded = facts is None, facts.checkpoint if facts is not None else None
    facts = with_engine(machine_read.probe(), recipe) if facts is None else facts
    most = recipe.resources.gpu_memory_gib
    facts, fleet = facts.limited(most), {host: other.limited(most) for host, other in fleet.items()}
    config: Mapping[str, Any] | None = None
    if recorded is not None and recorded.path == recipe.model.path:
        config = recorded.config
    config = _config_if_here(recipe) if config is None else config
    adapter = registry.resolve(recipe, config)
    choice = backend.choose(adapter, facts, recipe, config, updated=command in TRAINING)
    local = fetch.local_path(recipe.model.path) if here and config is not None else None
    size = sum(file.stat().st_size for file in local.glob("*.safetensors")) if local is not None else None
    template = template_of(local) if local is not None else None
    return build(
        recipe,
        adapter,
        choice,
        facts,
        command=command,
        config=config,
        checkpoint_bytes=size,
        chat_template=template,
        teacher=teacher_inputs.parameters(recipe) if command == "train" else 0,
        fleet=fleet,
    )


def train(recipe: Recipe, **options: Any) -> int:
    """`train_run`, and its exit code alone."""
    return train_run(recipe, **options)[0]


def train_run(
    recipe: Recipe,
    *,
    command: Literal["train", "sft"] = "train",
    run_dir: Path | None = None,
    resume: Path | None = None,
    source: Source | None = None,
    keep_optimizer: bool = False,
    warm: bool = False,
) -> tuple[int, RunDir]:
    """Run `astra train` or `astra sft` to its end. -> (exit code, the run). Raises UserError before the start,
    RunFailed after it.

    `resume`: the run to go on with; `recipe` is then its own, changed. `source`: the run whose weights a new one starts
    from, with `keep_optimizer` its moments too. `warm`: the run is there to fill caches.
    """
    began = time.monotonic()
    changes: Changes = {}
    if resume is not None:
        recipe, changes = recipe_changes.resumed_recipe(recipe, runs.existing(resume))
        command = recipe.command  # a run goes on as what it is
    recipe_changes.require(recipe, command)
    if source is not None:
        recipe = from_run.checked(recipe, source, keep_optimizer=keep_optimizer)
    queue = clusters.queue(recipe)
    plan = _train_plan(recipe, resume, source) if queue is None else planned(recipe, command)
    if queue is not None:
        queued.refuse(recipe, plan)
    there = run_dir is not None and run_dir.exists()
    run = runs.resume(resume) if resume is not None else runs.create(recipe.name, run_dir)
    step: int | None = None
    try:
        if resume is not None:
            step = recipe_changes.resume_step(run, recipe)
        if source is not None:
            recipe = from_run.take(recipe, source, run, keep_optimizer=keep_optimizer)
        elif resume is None and recipe.model.weights == "random":
            recipe = random_weights.take(recipe, run)
        inputs = _inputs(recipe, command, run if resume is not None else None)
        problem_files.pin(run, recipe, inputs.data)
    except BaseException:
        if resume is None:
            from_run.forget(run)
            job.discard(run, there)
        else:
            run.unlock()
        raise
    if queue is not None:
        return _submit(queue, recipe, plan, run, changes, step)
    initial = from_run.initial_checkpoint(run)
    code, summary = _run(began, inputs, recipe, plan, run, changes, resume_step=step, initial=initial, warm=warm)
    if summary and not warm:
        from astracli.report.summary_table import print_summary

        print_summary(summary)
    if code == 130:
        say(f"interrupted; go on with `astra {command} --resume {run.path}`")
    return code, run


def rollout(
    recipe: Recipe, *, weights: str | None = None, n: int, out: Path, run_dir: Path | None = None, keep: Keep = "all"
) -> int:
    """Generate and grade `n` groups into `out`, all samples or the right ones; the exit code."""
    began = time.monotonic()
    recipe_changes.require(recipe, "rollout")
    recipe = recipe_changes.with_weights(recipe, weights)
    plan = _refusing_plan(recipe, "rollout")
    inputs = _inputs(recipe, "rollout")
    run = runs.create(f"{recipe.name}-rollout", run_dir)
    code, _ = _run(began, inputs, recipe, plan, run, samples=SampleFile(path=out.resolve(), groups=n, keep=keep))
    if code == 0 or out.exists():
        say(("interrupted; " if code else "") + rollout_words(out, keep))
    return code


def evaluate(recipe: Recipe, *, as_json: bool = False, **options: Any) -> int:
    """`evaluate_run`, then print the figures; the exit code."""
    code, run = evaluate_run(recipe, **options)
    if code == 0:
        document = json.loads((run.eval / "results.json").read_text())
        document |= {"weights": recipe_io.load(run.recipe_json).model.path, "path": str(run.eval)}
        if as_json:
            print(json.dumps(document, indent=2))
        else:
            from astracli.report.results import result_lines

            width = shutil.get_terminal_size().columns if sys.stdout.isatty() else None
            print(plain("\n".join(result_lines(document, width))))
            say(f"items and figures are in {run.eval}")
    elif code == 130:
        say(f"interrupted; go on with `astra eval --resume {run.path}`")
    return code


def evaluate_run(
    recipe: Recipe,
    *,
    weights: str | None = None,
    run_dir: Path | None = None,
    benchmarks: Sequence[str] | None = None,
    samples: int | None = None,
    out: Path | None = None,
    resume: Path | None = None,
) -> tuple[int, RunDir]:
    """Evaluate once. -> (exit code, the evaluation's directory). Files go into `out`, else below the `eval/` of
    `run_dir`.

    `resume` goes on with an evaluation that was stopped; `recipe` is then its own.
    """
    began = time.monotonic()
    if resume is None:
        recipe = recipe_changes.with_evaluation(recipe_changes.with_weights(recipe, weights), benchmarks, samples)
    plan = _refusing_plan(recipe, "eval")
    inputs = _inputs(recipe, "eval")
    if resume is not None:
        run = recipe_changes.resumed_evaluation(resume)
    elif out is not None:
        run = runs.create(f"{recipe.name}-eval", out)
    elif run_dir is not None:
        run = runs.create("", run_dir / "eval" / time.strftime("again-%Y%m%d-%H%M%S"))
    else:
        run = runs.create(f"{recipe.name}-eval")
    code, _ = _run(began, inputs, recipe, plan, run)
    return code, run


def _run(
    began: float,
    inputs: Inputs,
    recipe: Recipe,
    plan: LaunchPlan,
    run: RunDir,
    changes: Changes = MappingProxyType({}),
    **more: Any,
) -> tuple[int, Mapping[str, Any]]:
    """Run everything in the run directory, then unlock it. -> (exit code, summary). `began`: when the command began;
    `changes`: what a resume changes in the recipe; `more`: further fields of `RunContext`."""
    attempt = job.open_run(run, recipe_io.to_json(recipe), plan)
    cluster = clusters.of(recipe)
    save_s = cluster.queue.save_s(recipe) if cluster is not None and cluster.queue is not None else None
    context = RunContext(clusters.addressed(recipe), plan, run, attempt, inputs, save_s=save_s, **more)
    apply_changes(run, context.resume_step or 0, attempt, changes)
    before = {"planning": time.monotonic() - began - inputs.seconds, "fetching": inputs.seconds}
    task = Job(context, before, replan=lambda machines: planned(recipe, plan.command, fleet=machines))
    for warning in plan.warnings:
        say(f"warning: {warning}")
    names = ", ".join(process.name for process in plan.processes)
    where = f" from step {context.resume_step}, attempt {attempt}" if context.resume_step is not None else ""
    say(f"run {run.path}{where}: {names}; logs in {run.attempt_logs(attempt)}")
    try:
        code = task.run()
    finally:
        run.unlock()
    if task.save.is_set() and code == 130:
        queued.again(recipe, run)
    return code, task.summary


def _submit(
    queue: Queue, recipe: Recipe, plan: LaunchPlan, run: RunDir, changes: Changes, step: int | None
) -> tuple[int, RunDir]:
    """Hand a run that lies ready to a queue, whose job goes on with it from here."""
    write_atomic(run.recipe_json, recipe_io.to_json(recipe))
    apply_changes(run, step or 0, max(run.attempts(), default=0) + 1, changes)
    run.unlock()
    queued.submit(queue, recipe, plan, run)
    return 0, run


def apply_changes(run: RunDir, step: int, attempt: int, changes: Changes) -> None:
    """Write down what a resume changes, say it, and drop answers that were drawn under other settings."""
    from astracli.evaluation import files as eval_files

    recorded = run_changes.record(run, step, attempt, changes)
    if recorded is None:
        return
    say(f"changed {run_changes.words(recorded)}")
    if resume_rules.asks_anew(changes):
        eval_files.forget_unfinished(run.eval)


# -- plan -------------------------------------------------------------------------------------------------------------


def _refusing_plan(recipe: Recipe, command: Command) -> LaunchPlan:
    """The plan, when it can run here. Raises UserError."""
    plan = planned(recipe, command)
    refuse(plan)
    return plan


def _inputs(recipe: Recipe, command: Command, resumed: RunDir | None = None) -> Inputs:
    """What the command reads, checked and on this machine. Raises UserError."""
    data, benchmarks = needs(recipe, command)
    clusters.check(recipe, command)
    return fetched(recipe, data=data, benchmarks=benchmarks, resumed=resumed)


def _train_plan(recipe: Recipe, resume: Path | None, source: Source | None) -> LaunchPlan:
    """As `_refusing_plan`; a command in its hint goes on with the same run, or starts from the same weights."""
    try:
        return _refusing_plan(recipe, recipe.command)
    except UserError as error:
        same = f"--resume {resume}" if resume is not None else f"--from {source.text}" if source is not None else None
        if error.hint is None or same is None:
            raise
        error = UserError(error.message, error.hint.replace(f"--recipe {recipe.name} ", f"{same} "))
        raise (recipe_changes.of_resume(error, runs.existing(resume)) if resume is not None else error) from None


def _config_if_here(recipe: Recipe) -> Mapping[str, Any] | None:
    """The model's config.json if it is on this machine, None for a Hub id that an adapter knows; else it is fetched."""
    path, revision = recipe.model.path, recipe.model.revision
    if fetch.local_path(path, made_by=recipe.model.made_by) is not None:
        return fetch.fetch_config(path, revision)
    known = any(item.plugin and path in item.plugin.known_configs for item in registry.installed())
    cached = fetch.cached_config(path, revision)
    return cached if cached is not None or known else fetch.fetch_config(path, revision)


# -- results ----------------------------------------------------------------------------------------------------------


def rollout_words(out: Path, keep: Keep = "all") -> str:
    """How many samples were written, and how they were graded. A file without any goes: it would be in the way when the
    same command is given again."""
    with out.open("rb") as lines:
        rewards = [record["reward"] for record in metrics.parse(lines)]
    if not rewards:
        out.unlink()
        return "no samples yet" if keep == "all" else "no sample was right: nothing is written"
    if keep == "right":
        return f"{len(rewards)} right samples in {out}"
    return f"{len(rewards)} samples, mean reward {sum(rewards) / len(rewards):.3f}, in {out}"
