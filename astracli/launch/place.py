"""Whether a run's directory and its hub's file are still where the run began: else nothing that it writes will last."""

from __future__ import annotations

import os
from pathlib import Path

from astracli.errors import RunFailed
from astracli.runs.run_dir import RunDir


class Place:
    """What lies where, as the file system numbers it, when the run begins."""

    def __init__(self, run: RunDir):
        self._run = run
        self._known = {path: _number(path) for path in (run.path, run.hub_sqlite)}

    def fault(self) -> RunFailed | None:
        """What was moved, removed or replaced; None when all is in place."""
        for path, number in self._known.items():
            now = _number(path)
            if number is None or now == number:
                continue
            done = "moved or removed" if now is None else "replaced by another"
            if path == self._run.path:
                return RunFailed(
                    f"run directory `{path}` was {done} while the run went on",
                    "go on from where it lies now: `astra train --resume DIR`",
                )
            return RunFailed(
                f"`{path}`, the books of the run, was {done} while the run went on: it could not be resumed",
                "put the file back and resume, or start a new run; the newest checkpoint can still be exported with "
                f"`astra runs export {self._run.path}`",
            )
        return None


def _number(path: Path) -> tuple[int, int] | None:
    try:
        found = os.stat(path)
    except OSError:
        return None
    return found.st_dev, found.st_ino
