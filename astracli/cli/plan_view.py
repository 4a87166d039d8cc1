"""`--dry-run`: print a launch plan as its document, or as tables."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from astracli.cli.output import Output, room
from astracli.errors import UserError

if TYPE_CHECKING:
    from astracli.config.recipe import Recipe
    from astracli.plan.types import Command
    from astracli.runs.run_dir import RunDir


ELSEWHERE = "`--facts NAME` plans for another machine"


def print_plan(
    recipe: Recipe,
    command: Command,
    output: Output,
    facts: str | None = None,
    resumed: RunDir | None = None,
    others: Sequence[str | None] = (),
) -> None:
    """The plan of a command on this machine, or on the one of a document (`--facts`). Starts nothing. `resumed`: the
    run that would go on; `others`: documents of the hosts beside the first, in the order of launch.hosts.

    On this machine also every check that a start makes; raises typer.Exit(2) when one of them would refuse.
    """
    from astracli.launch import inputs, queued
    from astracli.launch import run as launch
    from astracli.launch.first_prompt import FirstPrompt
    from astracli.machine import documents
    from astracli.plan.types import TRAINING
    from astracli.plan.view import render, to_json

    described = documents.load(facts) if facts is not None else None
    fleet = documents.fleet(recipe.agents, others)
    found = launch.planned(recipe, command, described, fleet)
    here = inputs.findings(recipe, command, resumed) if described is None else inputs.Findings([], None)
    known = [problem.message for problem in found.problems]  # what config.json says is in the plan already
    refused = [check for check in here.refused if check.value not in known]
    place = resumed.path.resolve() if resumed is not None else Path("runs").resolve() / f"{recipe.name}-TIME"
    job = queued.text(recipe, found, place) if command in TRAINING else None
    if output.as_json:
        machine = {"machine": facts, "source": described.source} if described else {}
        start = [{"check": c.name, "message": c.value, "hint": c.fix} for c in refused]
        first = {here.prompt.KEY: here.prompt.document()} if here.prompt else {FirstPrompt.KEY: None}
        output.document(to_json(found) | machine | {"start": start, "job": job} | first)
        raise typer.Exit(2 if refused else 0)
    if described is not None:
        told = f"for the machine `{facts}`, not this one: {described.source}"
        told += "".join(f"; host `{host}`: `{name}`" for host, name in zip(fleet, others, strict=True))
        output.text(textwrap.fill(told, room(), break_on_hyphens=False) + "\n")
    for table in render(found):
        output.table(table.columns, table.rows, table.title)
        output.text("")
    if here.prompt is not None:
        output.passage(here.prompt.title(), here.prompt.shown())
    if job is not None:
        output.passage("the job that would be submitted", job)
    blocked = any(problem.blocking for problem in found.problems)
    which = "that" if described is not None else "this"
    why = f"; {which} machine cannot run it: see above" if blocked else "; a start would be refused:" if refused else ""
    output.text(f"nothing was started{why}")
    if described is None and any(problem.kind == "gpus" for problem in found.problems):
        output.hint(f"{ELSEWHERE}: {', '.join(documents.names())}, or a file")
    for check in refused:
        output.error(check.value, check.fix or None)
    if refused:
        raise typer.Exit(2)


def refuse_facts(facts: str | None, dry_run: bool, command: Command) -> None:
    """`--facts` describes another machine: nothing can be started there. Raises UserError."""
    if facts is not None and not dry_run:
        raise UserError(
            f"--facts {facts} describes another machine: it goes with --dry-run",
            f"`astra {command} RECIPE --dry-run --facts {facts}` plans for it, `astra doctor RECIPE --facts {facts}` "
            "judges it",
        )
