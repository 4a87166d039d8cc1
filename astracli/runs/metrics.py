"""Metrics are JSONL lines: {"time", "step", "process", NAME_unit: value, ...}. Following and reading them, and sinks.

One process writes RUN_DIR/metrics.jsonl (the hub); sinks are fed from that file. After a resume a step may stand in it
twice: readers take the later line.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

from astracli.config import doors, reading
from astracli.errors import UserError

Record = dict[str, Any]
SINK_GROUP = "astra.sinks"
OVERALL = "overall"
"""Stands for all benchmarks together where figures go by a benchmark's name."""


class Sink(Protocol):
    """Where records go besides the file (tensorboard, wandb, ...). Made by a factory `(run_dir: Path) -> Sink`."""

    def write(self, records: Sequence[Mapping[str, Any]]) -> None:
        """Take records, in order. Called from one thread."""

    def close(self) -> None:
        """Flush. Called once, at the end of the run."""


def open_sinks(names: Sequence[str], run_dir: Path) -> list[Sink]:
    """The sinks of `metrics.sinks`, writing into a run. Raises UserError."""
    return [factory(run_dir) for factory in find_sinks(names)]


def find_sinks(names: Sequence[str]) -> list[Callable[[Path], Sink]]:
    """What makes the sinks: entry points in `astra.sinks`, or `pkg.module:factory`. Raises UserError, also where the
    package that a factory names in `needs` is not installed."""
    installed = {point.name: point for point in doors.points(SINK_GROUP)}
    factories: list[Callable[[Path], Sink]] = []
    for name in names:
        try:
            if name in installed:
                factory = installed[name].load()
            else:
                module, _, attribute = name.partition(":")
                factory = getattr(import_module(module), attribute)
        except (ImportError, AttributeError, ValueError) as error:
            known = ", ".join(sorted(installed)) or "none"
            raise UserError(
                f"metrics.sinks: no sink `{name}` ({error}); installed: {known}",
                f"a sink is an entry point in `{SINK_GROUP}` or `pkg.module:factory`",
            ) from None
        needs = getattr(factory, "needs", None)
        if needs is not None and find_spec(needs) is None:
            what = f"astracli[{needs}]" if factory.__module__.startswith("astracli.") else needs
            raise UserError(f"metrics.sinks: `{needs}` is not usable: it is not installed", f'pip install "{what}"')
        factories.append(factory)
    return factories


def mend(path: Path) -> None:
    """A writer that was killed may leave half a line: end it, so that the next record starts its own."""
    if path.exists() and path.stat().st_size:
        with path.open("rb+") as file:
            file.seek(-1, 2)
            if file.read(1) != b"\n":
                file.write(b"\n")


def append(path: Path, records: Iterable[Record]) -> None:
    """Write records at the end of a file, each with the time at which it was made."""
    lines = [json.dumps({"time": time.time()} | record) + "\n" for record in records]
    with path.open("a", encoding="utf-8") as file:
        file.write("".join(lines))


def parse(lines: Iterable[str | bytes]) -> Iterator[Record]:
    """Records of JSONL lines; a torn or damaged one (a writer was killed) is left out, so is a `step` that is null."""
    for line in lines:
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if isinstance(record, dict) and readable(record):
            if record.get("step", 0) is None:
                del record["step"]
            yield record


def readable(record: Mapping[str, Any]) -> bool:
    """Whether its step, where it has one, is a whole number or null."""
    step = record.get("step")
    return step is None or (isinstance(step, int) and not isinstance(step, bool))


def without_absent(record: Record) -> Record:
    """The record without the mean over groups that arrived during a step in which none did."""
    if record.get("arrived_groups") == 0:
        return {key: value for key, value in record.items() if key != "arrived_reward_mean"}
    return record


def read(path: Path) -> list[Record]:
    """All records of a run, in file order; [] when there is no file."""
    if not path.exists():
        return []
    with reading.opened(path) as file:
        return list(parse(file))


class Tail:
    """Follows a growing metrics.jsonl: `new()` returns the records since the last call."""

    def __init__(self, path: Path, *, from_end: bool = False):
        self._path = path
        self._offset = path.stat().st_size if from_end and path.exists() else 0

    def new(self) -> list[Record]:
        if not self._path.exists():
            return []
        with reading.opened(self._path) as file:
            file.seek(self._offset)
            content = file.read()
        whole = content[: content.rfind(b"\n") + 1]
        self._offset += len(whole)
        return list(parse(whole.splitlines()))


def series(records: Iterable[Mapping[str, Any]], name: str, process: str | None = None) -> list[tuple[int, float]]:
    """[(step, value)] of one metric in the order of steps; of a step seen twice the later value."""
    found: dict[int, float] = {}
    for record in records:
        if name in record and "step" in record and (process is None or record.get("process") == process):
            value = record[name]
            if isinstance(value, int | float):
                found[int(record["step"])] = float(value)
    return sorted(found.items())


def values(records: Iterable[Mapping[str, Any]], name: str, process: str | None = None) -> list[float]:
    """The values of `series`, without the steps."""
    return [value for _, value in series(records, name, process)]


def mean(numbers: Sequence[float]) -> float | None:
    """Arithmetic mean; None of nothing."""
    return sum(numbers) / len(numbers) if numbers else None


def median(numbers: Sequence[float]) -> float | None:
    """Middle value (mean of the two middle ones); None of nothing."""
    return statistics.median(numbers) if numbers else None
