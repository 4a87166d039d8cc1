"""What the recipe comes to here: its adapter, a refused combination, GPUs, memory and disk from its plan."""

from __future__ import annotations

from collections.abc import Iterator

from astracli.doctor.subject import Check, Subject

GROUP = "recipe"
ELSEWHERE = ("package", "system", "checkpoint")
"""Problems of a plan that other groups judge, with more to say."""


def checks(subject: Subject) -> Iterator[Check]:
    recipe, plan = subject.recipe, subject.plan
    if recipe is None:
        return
    if subject.adapter is not None:
        yield Check("adapter", GROUP, "ok", f"{subject.adapter.name}: {subject.adapter.summary}")
    if subject.refusal is not None:
        yield Check("refused", GROUP, "fail", recipe.name, subject.refusal.message, subject.refusal.hint or "")
    if plan is None:
        return
    problems = [p for p in plan.problems if p.kind not in ELSEWHERE or (p.kind == "checkpoint" and p.blocking)]
    for problem in problems:
        status = subject.bad(problem.blocking)
        yield Check(problem.kind, GROUP, status, f"needs {problem.what}", problem.message, problem.hint or "")
    told = subject.choice.warnings if subject.choice is not None else ()
    for warning in plan.warnings:
        if warning not in told:  # those of the kernels are told in their own group
            what, _, why = warning.partition(": ")
            yield Check("load", GROUP, "warn", what, why)
    if not any(problem.blocking for problem in problems):
        yield Check("fit", GROUP, "ok", f"{recipe.name} fits here ({len(plan.processes)} processes)")
