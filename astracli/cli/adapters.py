"""`astra adapters`: list, show and check model adapters."""

from __future__ import annotations

from typing import Annotated

import typer

from astracli.cli.options import JsonOpt
from astracli.cli.output import out

app = typer.Typer(help="List, show and check model adapters.", rich_markup_mode=None, no_args_is_help=True)
NameArg = Annotated[str, typer.Argument(metavar="ADAPTER", help="Adapter name.")]


@app.command("list")
def list_(json: JsonOpt = False) -> None:
    """List the installed adapters and the model types they are for.

    Shows the model types and the package of each, and what is wrong with one that cannot be loaded.
    """
    from astracli.models import registry

    found = [registry.to_json(item) for item in registry.installed()]
    rows = [
        [
            a["name"],
            ", ".join(a["model_types"]) or "-",
            a["package"],
            f"broken: {a['error']}" if a["error"] else a["summary"],
        ]
        for a in found
    ]
    out(json).table(["adapter", "model types", "package", "summary"], rows, document=found)


@app.command()
def show(name: NameArg, json: JsonOpt = False) -> None:
    """Show what an adapter declares."""
    from dataclasses import asdict

    from astracli.models import registry

    adapter = registry.get(name)
    facts = {
        "name": adapter.name,
        "summary": adapter.summary,
        "model_types": list(adapter.model_types),
        "hybrid": adapter.hybrid,
        "keep_fp32": list(adapter.keep_fp32),
        "frozen": list(adapter.frozen),
        "parity_tolerance": dict(adapter.parity_tolerance),
        "forbidden": [asdict(f) | {"compute_capabilities": list(f.compute_capabilities)} for f in adapter.forbidden],
    }
    out(json).facts(facts)


@app.command()
def check(name: NameArg, json: JsonOpt = False) -> None:
    """Check an adapter on its smallest model.

    Checks names, dtypes, blocks, and that rows beside each other do not mix. Exits with 1 if a check fails.
    """
    from astracli.models import registry
    from astracli.training import adapter_check

    adapter = registry.get(name)
    report = adapter_check.check(adapter)
    rows = [[c["name"], c["status"], c["value"]] for c in report["checks"]]
    out(json).table(["check", "status", "finding"], rows, document=report)
    raise typer.Exit(0 if report["ok"] else 1)
