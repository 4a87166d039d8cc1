"""The report of `astra doctor`: every group of checks over one subject, then the probes when they were asked for.

Only what the recipe needs can fail. Without a recipe, Python and the packages that every run imports can fail; the
rest is `ok`, `warn` or `skip`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from types import MappingProxyType
from typing import Any

from astracli.config.recipe import Recipe
from astracli.doctor import data, gpu, hosts, network, recipe, system, trainer
from astracli.doctor.subject import Check, Subject, subject
from astracli.engines import registry as engines
from astracli.machine.facts import Machine
from astracli.plan.gpus import uses


def serving(subject: Subject) -> Iterator[Check]:
    """Of the recipe's engine, which may have its own Python; without a recipe of every one that needs installing."""
    if subject.recipe is not None:
        asked = [subject.engine] if subject.engine is not None else []
    else:
        asked = [item.plugin for item in engines.installed() if item.plugin is not None and item.plugin.package]
    for engine in asked:
        yield from engine.checks(subject.case(engine))


START = {"dtypes": "checkpoint", "tokenizer": "checkpoint", "tensor names": "checkpoint"}
"""Check of a group -> the check of a start that covers it, where it has another name."""
GROUPS: tuple[Callable[[Subject], Iterator[Check]], ...] = (
    system.checks,
    system.python,
    gpu.checks,
    trainer.kernels,
    serving,
    trainer.checks,
    network.checks,
    data.checks,
    recipe.checks,
    system.runs,
)


OF_EVERY_HOST = (system.checks, system.python, gpu.checks, trainer.kernels, serving)
"""Groups that judge each host of a run; the others are of the first alone."""


def run(
    asked: Recipe | None,
    facts: Machine,
    probe: bool = False,
    start: Sequence[Check] = (),
    fleet: Mapping[str, Machine] = MappingProxyType({}),
) -> dict[str, Any]:
    """The report: `{"ok", "checks", "backends", "placement", "memory_by_place", "facts"}`.

    `probe` also measures on this machine. `start`: what a start of the recipe here would refuse; it takes the place of
    a group's own finding about the same thing. `fleet`: documents of the other hosts.
    """
    judged = subject(asked, facts, fleet)
    refused = {check.name for check in start}
    found = [check for group in GROUPS for check in group(judged)]
    found = [c for c in found if c.status != "fail" or START.get(c.name, c.name) not in refused]
    told = {check.why for check in found}
    found += [check for check in start if check.value not in told]
    found += hosts.checks(judged, fleet, OF_EVERY_HOST)
    if probe:
        from astracli.doctor import probes

        found += probes.run(judged)
    choice, plan = judged.choice, judged.plan
    return {
        "ok": all(check.status != "fail" for check in found),
        "checks": [asdict(check) for check in found],
        "backends": [asdict(row) for row in choice.reasons] if choice else [],
        "placement": [row._asdict() for row in plan.placement.reasons] if plan else [],
        "memory_by_place": [asdict(use) for use in uses(plan)] if plan else [],
        "facts": facts.document(),
    }
