"""What is found wanting of a machine: problems, which stop a plan, and checks, the lines of `astra doctor`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from astracli.machine.facts import usable

Status = Literal["ok", "warn", "fail", "skip"]


@dataclass(frozen=True)
class Problem:
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


def found(facts: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """A package of the document; one that the document does not name is not installed."""
    absent: Mapping[str, Any] = {"version": None, "importable_spec": False, "origin": None, "models": None, "pins": {}}
    package: Mapping[str, Any] = facts["packages"].get(name) or absent
    return package


def flaw(facts: Mapping[str, Any], name: str) -> tuple[str, str, str] | None:
    """(value, why, fix) of a package that looks installed and cannot be imported; None when it does not lie."""
    package = found(facts, name)
    if package["importable_spec"] and not package["origin"]:
        why = "a namespace stub, a folder without a module: `import` succeeds and finds nothing in it"
        return "stub", why, f"`pip install {name}`, or remove the empty folder"
    if package["version"] and not usable(facts, name):
        why = "installed by its metadata, but there is no module to import"
        return package["version"], why, f"`pip install --force-reinstall {name}`"
    return None
