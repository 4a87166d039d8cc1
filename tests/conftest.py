"""Shared fixtures."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest


@dataclass
class Ran:
    """What one `astra` command line printed, and its exit code."""

    code: int
    out: str
    err: str


@pytest.fixture
def astra(capsys: pytest.CaptureFixture[str]) -> Callable[..., Ran]:
    """Run `astra ARGS...` in this process."""
    from astracli.cli.main import run

    def call(*args: str) -> Ran:
        capsys.readouterr()
        code = run(list(args))
        said = capsys.readouterr()
        return Ran(code, said.out, said.err)

    return call
