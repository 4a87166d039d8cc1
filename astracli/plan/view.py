"""A launch plan as tables of text for the terminal, and as a JSON document."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from itertools import groupby
from typing import Any, NamedTuple

from astracli.machine.memory import MemoryRow, Place, words
from astracli.plan import gpus
from astracli.plan.memory import total
from astracli.plan.types import LaunchPlan


class TextTable(NamedTuple):
    title: str
    columns: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]


def render(plan: LaunchPlan) -> list[TextTable]:
    """The plan as tables of text, for the terminal."""
    processes, several = [], any(p.host is not None for p in plan.processes)
    for p in plan.processes:
        module, numbers = p.module.removeprefix("astracli."), (p.threads, p.nice, p.restarts, p.children)
        where = (p.host or "this",) if several else ()
        processes.append((p.name, *where, module, ",".join(map(str, p.gpus)) or "-", *map(str, numbers)))
    columns = ("process", *(("host",) if several else ()), "module", "gpus", "threads", "nice", "restarts", "children")
    backends = [(b.what, b.choice, b.reason) for b in plan.choice.reasons]
    figures, kinds = ("figure", "value"), ("process", "what", "where", "size", "basis")
    tables = [
        TextTable("processes", columns, processes),
        TextTable("backends", ("what", "choice", "reason"), backends),
        TextTable("placement", ("what", "where", "reason"), [*plan.placement.reasons, *gpus.reasons(plan.margins)]),
        TextTable("memory a GPU", gpus.COLUMNS, gpus.rows(gpus.uses(plan))),
        TextTable("model", figures, [(k, _figure(k, v)) for k, v in plan.model.items()]),
        TextTable("memory", kinds, _with_sums(plan.memory, ("gpu", "host"))),
        TextTable("disk", kinds, _with_sums(plan.disk, ("disk",))),
        TextTable("prompts", ("what", "how"), list(plan.prompts.items())),
        TextTable("expected", figures, [(k, str(v)) for k, v in plan.expected.items()]),
        TextTable("missing to run here", ("what",), [(line,) for line in plan.missing]),
        TextTable("warnings", ("what",), [(line,) for line in plan.warnings]),
    ]
    return [table for table in tables if table.rows]


def _with_sums(rows: Sequence[MemoryRow], places: Sequence[Place]) -> list[tuple[str, ...]]:
    sums = [("all", "sum", place, words(total(rows, where=place)), "") for place in places if rows]
    for host in dict.fromkeys(row.host for row in rows if row.host is not None):
        sums += [(f"all on {host}", "sum", place, words(total(rows, where=place, host=host)), "") for place in places]
    return [*_each(rows), *sums]


def what(row: MemoryRow) -> str:
    """What a row is, for people."""
    return row.component.value.format(*row.counts) + (", while offloaded" if row.offloaded else "")


def _each(rows: Sequence[MemoryRow]) -> list[tuple[str, ...]]:
    """Rows of text; neighbours that need the same, as engines do, share them: `4 x engine, each`."""
    needs: dict[str, list[tuple[str, ...]]] = {}
    for row in rows:
        needs.setdefault(row.process, []).append((what(row), row.where, words(row.bytes), row.basis))
    result = []
    for same, group in groupby(needs, needs.__getitem__):
        first, *others = group
        label = f"{1 + len(others)} x {first.rstrip('0123456789')}, each" if others else first
        result += [(label, *need) for need in same]
    return result


def _figure(key: str, value: float) -> str:
    if key.endswith(("_per_token", "_per_sequence")) and "bytes" in key:
        return words(int(value))
    return f"{value / 1e9:.3g} GFLOP" if "flops" in key and value >= 1e8 else f"{value:,.0f}"


def to_json(plan: LaunchPlan) -> dict[str, Any]:
    """The plan as a JSON document: `plan.json` of a run, `--dry-run --json`."""
    document = asdict(plan)
    document["choice"] = plan.choice.settings() | {"reasons": [asdict(row) for row in plan.choice.reasons]}
    document |= {"memory": list(map(_row, plan.memory)), "disk": list(map(_row, plan.disk))}
    document |= {"margins": [asdict(each) | {"gpu": each.gpu.index, "host": each.gpu.host} for each in plan.margins]}
    document |= {"gpu_sizes": {str(gpu): size for gpu, size in plan.gpu_sizes.items()}}
    document |= {"gpu_map": {str(gpu): names for gpu, names in plan.gpu_map.items()}}
    return document | {"missing": plan.missing, "memory_by_place": [asdict(use) for use in gpus.uses(plan)]}


def _row(row: MemoryRow) -> dict[str, Any]:
    own = {"where": row.where, "bytes": row.bytes, "basis": row.basis, "fixed": row.fixed, "away": row.away}
    return {"process": row.process, "what": what(row), **own}
