"""A launch plan as tables of text for the terminal, and as a JSON document."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from astracli.machine.memory import MemoryRow, Place, words
from astracli.plan import gpus
from astracli.plan.margin import reasons
from astracli.plan.memory import total
from astracli.plan.types import LaunchPlan, TextTable


def render(plan: LaunchPlan) -> list[TextTable]:
    """The plan as tables of text, for the terminal."""
    processes = []
    for p in plan.processes:
        numbers = (p.threads, p.nice, p.restarts, p.children)
        processes.append((p.name, p.module, ",".join(map(str, p.gpus)) or "-", *map(str, numbers)))
    columns = ("process", "module", "gpus", "threads", "nice", "restarts", "children")
    backends = tuple((b.what, b.choice, b.reason) for b in plan.choice.reasons)
    tables = [
        TextTable("processes", columns, tuple(processes)),
        TextTable("backends", ("what", "choice", "reason"), backends),
    ]
    if placed := (*plan.placement.reasons, *reasons(plan.margins)):
        tables.append(TextTable("placement", ("what", "where", "reason"), placed))
    if uses := gpus.uses(plan):
        tables.append(TextTable("memory a GPU", gpus.COLUMNS, tuple(gpus.rows(uses))))
    if plan.model:
        tables.append(TextTable("model", ("figure", "value"), tuple((k, _figure(k, v)) for k, v in plan.model.items())))
    everywhere: tuple[tuple[str, tuple[MemoryRow, ...], tuple[Place, ...]], ...] = (
        ("memory", plan.memory, ("gpu", "host")),
        ("disk", plan.disk, ("disk",)),
    )
    for title, rows, places in everywhere:
        body: list[tuple[str, ...]] = _each(rows)
        body += [("all", "sum", place, words(total(rows, where=place)), "") for place in places if rows]
        if body:
            tables.append(TextTable(title, ("process", "what", "where", "size", "basis"), tuple(body)))
    if plan.expected:
        tables.append(TextTable("expected", ("figure", "value"), tuple((k, str(v)) for k, v in plan.expected.items())))
    for title, lines in (("missing to run here", plan.missing), ("warnings", plan.warnings)):
        if lines:
            tables.append(TextTable(title, ("what",), tuple((line,) for line in lines)))
    return tables


def what(row: MemoryRow) -> str:
    """What a row is, for people."""
    return row.component.value.format(*row.counts) + (", while offloaded" if row.offloaded else "")


def _each(rows: Sequence[MemoryRow]) -> list[tuple[str, ...]]:
    """Rows of text; neighbours that need the same, as engines do, stand once: `4 x engine, each`."""
    needs: dict[str, list[tuple[str, ...]]] = {}
    for row in rows:
        needs.setdefault(row.process, []).append((what(row), row.where, words(row.bytes), row.basis))
    alike: list[list[str]] = []
    for name in needs:
        if alike and needs[alike[-1][0]] == needs[name]:
            alike[-1].append(name)
        else:
            alike.append([name])
    said = {n[0]: n[0] if len(n) == 1 else f"{len(n)} x {n[0].rstrip('0123456789')}, each" for n in alike}
    return [(label, *need) for name, label in said.items() for need in needs[name]]


def _figure(key: str, value: float) -> str:
    if key.endswith(("_per_token", "_per_sequence")) and "bytes" in key:
        return words(int(value))
    return f"{value / 1e9:.3g} GFLOP" if "flops" in key and value >= 1e8 else f"{value:,.0f}"


def to_json(plan: LaunchPlan) -> dict[str, Any]:
    """The plan as a JSON document: `plan.json` of a run, `--dry-run --json`."""
    document = asdict(plan)
    document["choice"] = plan.choice.settings() | {"reasons": [asdict(row) for row in plan.choice.reasons]}
    document |= {"memory": list(map(_row, plan.memory)), "disk": list(map(_row, plan.disk))}
    document |= {"gpu_sizes": {str(gpu): size for gpu, size in plan.gpu_sizes.items()}}
    document |= {"gpu_map": {str(gpu): names for gpu, names in plan.gpu_map.items()}}
    return document | {"missing": plan.missing, "memory_by_place": gpus.memory_by_place(plan)}


def _row(row: MemoryRow) -> dict[str, Any]:
    own = {"where": row.where, "bytes": row.bytes, "basis": row.basis, "fixed": row.fixed, "away": row.away}
    return {"process": row.process, "what": what(row), **own}
