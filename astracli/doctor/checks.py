"""The report of `astra doctor`: every group of checks over one subject, then the probes when they were asked for.

Only what the recipe needs can fail. Without a recipe, Python and the packages that every run imports can fail; the
rest is `ok`, `warn` or `skip`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict
from typing import Any

from astracli.config.recipe import Recipe
from astracli.doctor import data, gpu, kernels, network, python, runs, serving, system, trainer
from astracli.doctor.recipe import checks as recipe_checks
from astracli.doctor.subject import Check, Subject, subject
from astracli.machine.facts import Machine
from astracli.plan.gpus import memory_by_place

GROUPS: tuple[Callable[[Subject], Iterator[Check]], ...] = (
    system.checks,
    python.checks,
    gpu.checks,
    kernels.checks,
    serving.checks,
    trainer.checks,
    network.checks,
    data.checks,
    recipe_checks,
    runs.checks,
)


def run(recipe: Recipe | None, facts: Machine, probe: bool = False) -> dict[str, Any]:
    """The report: `{"ok", "checks", "backends", "placement", "memory_by_place", "facts"}`.

    `probe` also measures on this machine.
    """
    judged = subject(recipe, facts)
    found = [check for group in GROUPS for check in group(judged)]
    if probe:
        from astracli.doctor import probes

        found += probes.run(judged)
    choice, plan = judged.fit.choice, judged.fit.plan
    placed = plan.placement.reasons if plan else ()
    return {
        "ok": all(check.status != "fail" for check in found),
        "checks": [asdict(check) for check in found],
        "backends": [asdict(row) for row in choice.reasons] if choice else [],
        "placement": [row._asdict() for row in placed],
        "memory_by_place": memory_by_place(plan) if plan else [],
        "facts": facts.document(),
    }
