"""What the recipe comes to here: its adapter, a refused combination, GPUs, memory and disk from its plan."""

from __future__ import annotations

from collections.abc import Iterator

from astracli.doctor.subject import Check, Subject

GROUP = "recipe"
ELSEWHERE = ("package", "system", "checkpoint")
"""Problems of a plan that other groups judge, with more to say."""


def checks(subject: Subject) -> Iterator[Check]:
    recipe, fit = subject.recipe, subject.fit
    if recipe is None:
        return
    if fit.adapter is not None:
        yield Check("adapter", GROUP, "ok", f"{fit.adapter.name}: {fit.adapter.summary}")
    if fit.refusal is not None:
        yield Check("refused", GROUP, "fail", recipe.name, fit.refusal.message, fit.refusal.hint or "")
    if fit.plan is None:
        return
    problems = [problem for problem in fit.plan.problems if problem.kind not in ELSEWHERE]
    for problem in problems:
        status = subject.bad(problem.blocking)
        yield Check(problem.kind, GROUP, status, f"needs {problem.what}", problem.message, problem.hint or "")
    told = fit.choice.warnings if fit.choice is not None else ()
    for warning in fit.plan.warnings:
        if warning not in told:  # those of the kernels are told in their own group
            what, _, why = warning.partition(": ")
            yield Check("load", GROUP, "warn", what, why)
    if not any(problem.blocking for problem in problems):
        yield Check("fit", GROUP, "ok", f"{recipe.name} fits here ({len(fit.plan.processes)} processes)")
