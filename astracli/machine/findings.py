"""Problems of a machine, which may stop a plan, and checks, which are the lines of `astra doctor`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

from astracli.machine.facts import Machine

Status = Literal["ok", "warn", "fail", "skip"]


@dataclass(frozen=True)
class PlanProblem:
    """Something that this machine lacks for the plan."""

    kind: Literal["gpus", "memory", "package", "system", "disk", "checkpoint"]
    what: str
    """Short: `8 GPUs (this machine has 2)`."""
    message: str
    hint: str | None
    blocking: bool = True
    """False when the run solves it by itself, for example by a download."""


@dataclass(frozen=True)
class Check:
    name: str
    group: str
    status: Status
    value: str
    """What was found."""
    why: str = ""
    """Why it matters, in one line; empty when all is well."""
    fix: str = ""
    """What to do: a command or a setting."""


class Flaw(NamedTuple):
    """What is wrong with a package, as fields of a `Check`."""

    value: str
    why: str
    fix: str


def flaw(facts: Machine, name: str) -> Flaw | None:
    """What is wrong with a package that looks installed but cannot be imported; None for any other package."""
    package = facts.package(name)
    if package.importable_spec and not package.origin:
        why = "a namespace stub, a folder without a module: `import` succeeds and finds nothing in it"
        return Flaw("stub", why, f"`pip install {name}`, or remove the empty folder")
    if package.version and not package.usable:
        why = "installed by its metadata, but there is no module to import"
        return Flaw(package.version, why, f"`pip install --force-reinstall {name}`")
    return None
