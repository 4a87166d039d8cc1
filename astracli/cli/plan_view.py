"""`--dry-run`: print a launch plan as its document, or as tables."""

from __future__ import annotations

from typing import TYPE_CHECKING

from astracli.cli.output import Output

if TYPE_CHECKING:
    from astracli.plan import Command
    from astracli.recipe import Recipe


def print_plan(recipe: Recipe, command: Command, output: Output) -> None:
    """The plan of a command on this machine. Starts nothing."""
    from astracli.launch import run as launch

    if output.as_json:
        output.document(launch.dry_run(recipe, command))
        return
    from astracli import plan

    found = launch.planned(recipe, command)
    for table in plan.render(found):
        output.table(table.columns, table.rows, table.title)
        output.text("")
    blocked = any(problem.blocking for problem in found.problems)
    output.text("nothing was started" + ("; this machine cannot run it: see above" if blocked else ""))
