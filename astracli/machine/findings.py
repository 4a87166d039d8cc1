"""What is found wanting of a machine: problems, which stop a plan, and checks, the lines of `astra doctor`."""

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
    """False = the run mends it by itself (a download)."""


@dataclass(frozen=True)
class Check:
    name: str
    group: str
    status: Status
    value: str
    """What was found."""
    why: str = ""
    """Why it matters, one line; empty when all is well and there is nothing to say."""
    fix: str = ""
    """The next command or setting."""


class Flaw(NamedTuple):
    """What is wrong with a package; the fields of a `Check`."""

    value: str
    why: str
    fix: str


def flaw(facts: Machine, name: str) -> Flaw | None:
    """Of a package that looks installed and cannot be imported; None when it does not lie."""
    package = facts.package(name)
    if package.importable_spec and not package.origin:
        why = "a namespace stub, a folder without a module: `import` succeeds and finds nothing in it"
        return Flaw("stub", why, f"`pip install {name}`, or remove the empty folder")
    if package.version and not package.usable:
        why = "installed by its metadata, but there is no module to import"
        return Flaw(package.version, why, f"`pip install --force-reinstall {name}`")
    return None
