"""`astra doctor`: is this machine able to run a recipe, what is wrong, how to mend it."""

from __future__ import annotations

import json as json_module
import textwrap
from pathlib import Path
from typing import Annotated, Any

import typer

from astracli.cli.options import JsonOpt, RecipeArg, RecipeOpt, SetOpt, load_recipe, one_name
from astracli.cli.output import WIDTH, Output, out
from astracli.errors import UserError

ORDER = {"fail": 0, "warn": 1, "ok": 2, "skip": 3}


def doctor(
    recipe_name: RecipeArg = None,
    recipe: RecipeOpt = None,
    set_: SetOpt = None,
    facts: Annotated[
        Path | None, typer.Option("--facts", metavar="FILE", help="Judge the machine described in FILE, not this one.")
    ] = None,
    facts_out: Annotated[
        Path | None, typer.Option("--facts-out", metavar="FILE", help="Also write this machine's facts to FILE.")
    ] = None,
    probe: Annotated[bool, typer.Option("--probe/--no-probe", help="Run small numeric checks on the device.")] = True,
    json: JsonOpt = False,
) -> None:
    """Check this machine, and what a recipe lacks here.

    Exit 1 when a check fails.
    """
    loaded = None if one_name(recipe_name, recipe) is None else load_recipe(recipe_name, recipe, set_, "doctor")
    if loaded is None and set_:
        raise UserError("--set given without a recipe", "name one: `astra doctor RECIPE --set ...`")
    machine = _read_facts(facts) if facts else _probe()
    if facts_out:
        facts_out.write_text(json_module.dumps(machine, indent=2) + "\n")
    from astracli.doctor import checks

    report = checks.run(loaded, machine, probe=probe and facts is None)
    show(report, out(json))
    raise typer.Exit(0 if report["ok"] else 1)


def show(report: dict[str, Any], output: Output) -> None:
    """A doctor's report: failures first, each with its reason and its cure."""
    if output.as_json:
        output.document(report)
        return
    ordered = sorted(report["checks"], key=lambda check: ORDER[check["status"]])
    for check in ordered:
        if check["status"] in ("fail", "warn"):
            output.text("\n".join(_problem_lines(check)))
    rest = [check for check in ordered if check["status"] not in ("fail", "warn")]
    output.table(
        ["status", "group", "check", "finding"],
        [[check["status"], check["group"], check["name"], check["value"]] for check in rest],
    )
    if report.get("backends"):
        output.text("")
        output.table(
            ["backend", "choice", "reason"], [[b["what"], b["choice"], b["reason"]] for b in report["backends"]]
        )
    failed = sum(check["status"] == "fail" for check in ordered)
    output.text("")
    output.text("all checks passed" if report["ok"] else f"{failed} of {len(ordered)} checks failed")


def _problem_lines(check: dict[str, Any]) -> list[str]:
    """What is wrong, why that matters, how to mend it; each said once."""
    said = [f"{check['group']}: {check['value'] or check['name']}"]
    if check["why"] and check["why"] != check["value"]:
        said.append(check["why"])
    if check["fix"]:
        said.append(f"fix: {check['fix']}")
    lines = [line for words in said for line in textwrap.wrap(words, WIDTH - 6, break_on_hyphens=False)]
    return [f"{check['status']:4}  {lines[0]}", *(f"      {line}" for line in lines[1:]), ""]


def _probe() -> dict[str, Any]:
    from astracli import machine

    return machine.probe()


def _read_facts(path: Path) -> dict[str, Any]:
    hint = "make one with `astra doctor --facts-out FILE`"
    try:
        document = json_module.loads(path.read_text())
    except OSError as error:
        raise UserError(f"cannot read facts file `{path}`: {(error.strerror or str(error)).lower()}", hint) from None
    except ValueError as error:
        raise UserError(f"facts file `{path}` is not JSON: {error}", hint) from None
    if not isinstance(document, dict):
        raise UserError(f"facts file `{path}` holds no JSON object", hint)
    return document
