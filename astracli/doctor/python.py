"""Interpreter, and the packages that every run imports."""

from __future__ import annotations

from collections.abc import Iterator

from astracli.doctor.subject import Check, Subject, flaw
from astracli.machine.facts import version_tuple

GROUP = "python"
OLDEST_PYTHON = (3, 11)
CORE = {
    "torch": (2, 11),
    "transformers": (5, 8),
    "safetensors": (0, 5),
    "numpy": (2,),
    "datasets": (4,),
    "math-verify": (0, 9),
    "pydantic": (2, 9),
    "typer": (0, 16),
}
"""What every run imports, and from which version on."""


def checks(subject: Subject) -> Iterator[Check]:
    facts = subject.facts
    version, executable = facts.python.version, facts.python.executable
    if version_tuple(version) < OLDEST_PYTHON:
        fix = "make a virtual environment with a newer one: `python3.12 -m venv .venv`"
        yield Check("python", GROUP, "fail", version, "astra needs 3.11 or newer", fix)
    else:
        yield Check("python", GROUP, "ok", f"{version} at {executable}")
    for name, least in CORE.items():
        yield _core(subject, name, least)


def _core(subject: Subject, name: str, least: tuple[int, ...]) -> Check:
    oldest = ".".join(map(str, least))
    fix = f"`pip install '{name}>={oldest}'`"
    wrong = flaw(subject.facts, name)
    if wrong is not None:
        return Check(name, GROUP, "fail", wrong.value, f"every run imports it; it is {wrong.why}", wrong.fix)
    if not subject.facts.usable(name):
        return Check(name, GROUP, "fail", "not importable", "every run imports it", fix)
    version = str(subject.facts.package(name).version)
    if subject.facts.version_of(name) < least:
        return Check(name, GROUP, "fail", version, f"needs {oldest} or newer", fix)
    return Check(name, GROUP, "ok", version)
