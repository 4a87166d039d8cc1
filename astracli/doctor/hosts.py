"""The hosts of a run beside the first: each judged by its own document, and how fast the first reaches it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace

from astracli.backends.choice import choose
from astracli.doctor.subject import Check, Subject
from astracli.errors import UserError
from astracli.machine.facts import Machine
from astracli.machine.memory import speed

GROUP = "hosts"
Group = Callable[[Subject], Iterator[Check]]


def checks(subject: Subject, fleet: Mapping[str, Machine], groups: tuple[Group, ...]) -> Iterator[Check]:
    """`groups`: what is judged of every host; a check of host `b` is in the group `b: gpu`. Hosts of the recipe without
    a document are named."""
    agents = subject.recipe.agents if subject.recipe is not None else ()
    if unknown := [host for host in agents if host not in fleet]:
        how = "`--facts` once more for each, in the order of launch.hosts; a run writes RUN_DIR/agents/NAME.json"
        yield Check("not judged", GROUP, "skip", f"{', '.join(unknown)}: {how}")
    for host, facts in fleet.items():
        judged = _of(subject, host, facts)
        for group in groups:
            yield from (replace(check, group=f"{host}: {check.group}") for check in group(judged))
        yield _link(subject, host, facts)


def _of(subject: Subject, host: str, facts: Machine) -> Subject:
    """The same recipe on that host."""
    found = replace(subject, facts=facts, host=host)
    if subject.adapter is None or subject.recipe is None:
        return found
    try:
        return replace(found, choice=choose(subject.adapter, facts, subject.recipe, subject.config))
    except UserError:  # the plan says why
        return found


def _link(subject: Subject, host: str, facts: Machine) -> Check:
    if facts.link is None:
        return Check(f"link to {host}", GROUP, "skip", "not measured: an agent does, when it joins")
    value, plan = f"{speed(facts.link)} from the first host", subject.plan
    if plan is None or not plan.model:
        return Check(f"link to {host}", GROUP, "ok", value)
    full = 2 * plan.model["parameters"]
    return Check(f"link to {host}", GROUP, "ok", f"{value}: a full version in {full / facts.link:.2g} s")
