"""`astra doctor`: is this machine able to run a recipe, what is wrong, how to mend it."""

from __future__ import annotations

import json as json_module
import re
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from astracli.cli.options import FleetFactsOpt, JsonOpt, RecipeArg, RecipeOpt, SetOpt, load_recipe, one_name
from astracli.cli.output import Output, out, room
from astracli.errors import UserError

if TYPE_CHECKING:
    from astracli.config.recipe import Recipe

VERSION = re.compile(r"\d+\.\d[\w.+]*")
ORDER = {"fail": 0, "warn": 1, "ok": 2, "skip": 3}


def doctor(
    recipe_name: RecipeArg = None,
    recipe: RecipeOpt = None,
    set_: SetOpt = None,
    facts: FleetFactsOpt = None,
    facts_out: Annotated[
        Path | None, typer.Option("--facts-out", metavar="FILE", help="Also write this machine's facts to FILE.")
    ] = None,
    probe: Annotated[
        bool | None,
        typer.Option(
            "--probe/--no-probe", help="Import and measure too; default where there is a GPU or a recipe is named."
        ),
    ] = None,
    warm: Annotated[
        bool,
        typer.Option(
            "--warm", help="No checks: run one short step of the recipe, which fills the caches of compiled kernels."
        ),
    ] = False,
    tuned_out: Annotated[
        Path | None,
        typer.Option("--tuned-out", metavar="FILE", help="With --warm: also write to FILE what Triton has tuned."),
    ] = None,
    json: JsonOpt = False,
) -> None:
    """Check this machine, and whether it has what a recipe needs.

    Exits with 0 if a run would work, with 1 if a check fails. With a recipe, only what the recipe needs can fail.
    With --warm, exits with 0 when the caches are filled.
    """
    loaded = None if one_name(recipe_name, recipe) is None else load_recipe(recipe_name, recipe, set_, "doctor")
    if loaded is None and set_:
        raise UserError("--set given without a recipe", "name one: `astra doctor RECIPE --set ...`")
    if tuned_out is not None and not warm:
        raise UserError("--tuned-out given without --warm", "`astra doctor RECIPE --warm --tuned-out FILE`")
    if warm:
        _warm(loaded, out(json), tuned_out, others=bool(facts) or facts_out is not None or probe is not None)
        return
    from astracli.doctor.gather import gather
    from astracli.machine import documents

    machine = documents.load(facts[0]) if facts else gather(loaded)
    fleet = documents.fleet(loaded.agents if loaded else (), facts[1:]) if facts else {}
    if facts_out:
        _write_facts(facts_out, machine.document())
    from astracli.doctor import checks

    if facts and probe:
        raise UserError("--probe measures this machine, --facts judges another", "give one of them")
    wanted = probe if probe is not None else loaded is not None or bool(machine.gpus)
    start, prompt = [], None
    if loaded is not None and not facts:
        from astracli.launch import inputs

        here = inputs.findings(loaded, loaded.command, prompt=wanted)
        start, prompt = [check for check in here.refused if check.name != inputs.HOSTS], here.prompt
    if not facts:
        from astracli.launch.clusters import registry as clusters

        start = [*start, *clusters.findings(loaded)]
    report = checks.run(loaded, machine, probe=wanted and not facts, start=start, fleet=fleet)
    if json and prompt is not None:
        report[prompt.KEY] = prompt.document()
    show(report, out(json))
    if not json and prompt is not None:
        out(json).text("")
        out(json).passage(prompt.title(), prompt.shown())
    raise typer.Exit(0 if report["ok"] else 1)


def _warm(recipe: Recipe | None, output: Output, tuned_out: Path | None, *, others: bool) -> None:
    if recipe is None:
        raise UserError("--warm given without a recipe", "name one: `astra doctor RECIPE --warm`")
    if others:
        raise UserError("--warm runs the recipe on this machine and checks nothing", "leave out the other options")
    from astracli.launch import warm
    from astracli.machine.memory import words

    found = warm.warm(recipe, tuned_out)
    if output.as_json:
        output.document(found.document())
        return
    rows = [[cache.name, words(cache.before), words(cache.after), cache.place] for cache in found.caches]
    if rows:
        output.table(["cache", "before", "now", "place"], rows)
        output.text("")
    took = ", ".join(f"{what} {seconds:.0f} s" for what, seconds in found.seconds.items())
    output.text(f"{'warm' if rows else 'nothing is compiled on this machine'}: {took}")


def show(report: dict[str, Any], output: Output) -> None:
    """A doctor's report: failures first, each with its reason and its cure; the chosen backends last."""
    if output.as_json:
        output.document(report)
        return
    ordered = sorted(report["checks"], key=lambda check: ORDER[check["status"]])
    for check in ordered:
        if check["status"] in ("fail", "warn"):
            output.text("\n".join(_problem_lines(check)))
    good = _good_rows([check for check in ordered if check["status"] == "ok"])
    if good:
        output.table(["ok", "check", "finding"], good)
    skips: dict[str, list[str]] = {}
    for c in ordered:
        if c["status"] == "skip":
            skips.setdefault(c["value"], []).append(c["name"])
    skipped = [f"{', '.join(names)} ({value})" for value, names in skips.items()]
    if skipped:
        text = "skip  " + "; ".join(skipped)
        output.text("")
        output.text(textwrap.fill(text, room(), subsequent_indent=" " * 6, break_on_hyphens=False))
    if report.get("backends"):
        output.text("")
        output.table(["backend", "choice", "reason"], [[b["what"], b["choice"], b["reason"]] for b in _merged(report)])
    if report.get("placement"):
        output.text("")
        output.table(["placement", "where", "why"], [list(row.values()) for row in report["placement"]])
    if report.get("memory_by_place"):
        output.text("")
        from astracli.plan import gpus

        output.table(gpus.COLUMNS, gpus.rows([gpus.Use(**use) for use in report["memory_by_place"]]))
    output.text("")
    from astracli.machine.facts import RECORDED

    source = report["facts"].get("source", RECORDED)
    if source != RECORDED:
        output.text(textwrap.fill(f"judged from a document: {source}", room(), break_on_hyphens=False))
    output.text(_verdict(ordered))


def _good_rows(checks: list[dict[str, Any]]) -> list[list[str]]:
    """(group, check, finding); the group stands once, and packages that have nothing but a version share a row."""
    rows: list[list[str]] = []
    groups: dict[str, list[dict[str, Any]]] = {}
    for check in checks:
        groups.setdefault(check["group"], []).append(check)
    for group, members in groups.items():
        plain = [c for c in members if VERSION.fullmatch(c["value"])]
        shown = [[c["name"], c["value"]] for c in members if c not in plain or len(plain) < 2]
        if len(plain) > 1:
            shown.append(["packages", ", ".join(f"{c['name']} {c['value']}" for c in plain)])
        rows += [[group if number == 0 else "", *cells] for number, cells in enumerate(shown)]
    return rows


def _merged(report: dict[str, Any]) -> list[dict[str, str]]:
    """Rows of one choice and one reason as one: forward and backward of a kernel."""
    rows: list[dict[str, str]] = []
    for row in report["backends"]:
        if rows and (rows[-1]["choice"], rows[-1]["reason"]) == (row["choice"], row["reason"]):
            both = rows[-1]["what"].partition(", ")[0]
            rows[-1] = {**rows[-1], "what": both if row["what"].startswith(both) else f"{both}, {row['what']}"}
        else:
            rows.append(row)
    return rows


def _verdict(checks: list[dict[str, Any]]) -> str:
    count = {status: sum(check["status"] == status for check in checks) for status in ORDER}
    parts = [f"{count['ok']} ok"]
    parts += [
        f"{count[status]} {words}" for status, words in (("warn", "to look at"), ("fail", "failed")) if count[status]
    ]
    return f"{'a run would not work' if count['fail'] else 'ready'}: {', '.join(parts)}"


def _problem_lines(check: dict[str, Any]) -> list[str]:
    """What is wrong, why that matters, how to mend it; each said once."""
    said = [f"{check['group']}/{check['name']}: {check['value']}"]
    if check["why"] and check["why"] != check["value"]:
        said.append(check["why"])
    if check["fix"]:
        said.append(f"fix: {check['fix']}")
    lines = [line for words in said for line in textwrap.wrap(words, room() - 6, break_on_hyphens=False)]
    return [f"{check['status']:4}  {lines[0]}", *(f"      {line}" for line in lines[1:]), ""]


def _write_facts(path: Path, document: dict[str, Any]) -> None:
    try:
        path.write_text(json_module.dumps(document, indent=2) + "\n")
    except OSError as error:
        raise UserError(f"cannot write `{path}`: {(error.strerror or str(error)).lower()}") from None
