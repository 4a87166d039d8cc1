"""Does a run grow? Memory and descriptors of its processes and the size of its hub, from an early step to its end.

    python bench/loop/memory.py RUN [--since 20] [--window 20] [--asked 10] [--plot FILE.svg]

Reads RUN/metrics.jsonl. `first` and `last` are medians over `--window` steps, from step `--since` on and at the end (of
descriptors the lowest value: a connection is one more for as long as its request runs); `highest` is the largest single
value from `--since` on. Memory is a process's PSS with all that it has started, so what
it shares with other programs of the machine (the pages of torch's libraries) counts less while these run. Exits 1 when
something has grown by more than `--asked` percent. The plot needs matplotlib.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from shared import Record, options, records, show

UNITS = {"memory_bytes": ("memory", "MB", 1e6), "hub_bytes": ("hub", "MB", 1e6), "open_files": ("descriptors", "", 1)}
"""metric -> (what it is, unit, what its values are divided by)"""
TYPICAL: dict[str, Callable[[list[float]], float]] = {"open_files": min}
"""Of the values in a window; the median where nothing else stands here."""
POINTS = 125
"""Of a line in the plot."""


def curves(found: Iterable[Record]) -> dict[tuple[str, str], list[tuple[int, float]]]:
    """(metric, process) -> [(step, value in the unit)], in the order of steps."""
    lines: dict[tuple[str, str], dict[int, float]] = {}
    for record in found:
        for metric, (_, _, divisor) in UNITS.items():
            if metric in record and "of" in record:
                lines.setdefault((metric, record["of"]), {})[record["step"]] = record[metric] / divisor
    return {key: sorted(line.items()) for key, line in lines.items()}


def growth(line: list[tuple[int, float]], since: int, window: int, typical: Callable[[list[float]], float]) -> Record:
    """Figures of one line. Exits when it ends too early to tell."""
    values = [value for step, value in line if step >= since]
    if len(values) < 2 * window:
        sys.exit(f"{len(values)} steps from step {since} on: at least {2 * window} are needed")
    first, last = typical(values[:window]), typical(values[-window:])
    highest = max(values)
    return {
        "first": round(first, 1), "last": round(last, 1), "highest": round(highest, 1),
        "growth_percent": round(100 * (last / first - 1), 1), "highest_percent": round(100 * (highest / first - 1), 1),
        "steps": line[-1][0] + 1,
    }  # fmt: skip


def plot(lines: dict[tuple[str, str], list[tuple[int, float]]], out: Path) -> None:
    """A panel a metric, a line a process."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "astra"
    from matplotlib import pyplot

    metrics = [metric for metric in UNITS if any(metric == key for key, _ in lines)]
    figure, axes = pyplot.subplots(
        1, len(metrics), figsize=(4 * len(metrics), 3.2), squeeze=False, layout="constrained"
    )
    for panel, metric in zip(axes[0], metrics, strict=True):
        what, unit, _ = UNITS[metric]
        for (key, process), line in lines.items():
            if key == metric:
                some = line[:: max(1, len(line) // POINTS)]
                panel.plot([step for step, _ in some], [value for _, value in some], lw=1, label=process)
        panel.set(title=f"{what}, {unit}" if unit else what, xlabel="step", ylim=(0, None))
        panel.grid(alpha=0.3)
    figure.legend(*axes[0][0].get_legend_handles_labels(), loc="outside right upper", fontsize=8)
    figure.savefig(out, metadata={"Date": None})


def main() -> None:
    parser = options(__doc__, since=20, window=20, asked=10.0, plot={"": "draw the lines into this file"})
    parser.add_argument("run", type=Path, help="a run directory")
    args = parser.parse_args()
    lines = curves(records(args.run))
    if not lines:
        sys.exit(f"`{args.run}` has no lines of memory in its metrics.jsonl")
    rows = [
        {
            "what": UNITS[metric][0],
            "of": process,
            "unit": UNITS[metric][1],
            **growth(line, args.since, args.window, TYPICAL.get(metric, statistics.median)),
        }
        for (metric, process), line in lines.items()
    ]
    if args.plot:
        plot(lines, Path(args.plot))
    show(args, {"since": args.since, "window": args.window, "asked_percent": args.asked, "growth": rows})
    sys.exit(1 if any(row["growth_percent"] > args.asked for row in rows) else 0)


if __name__ == "__main__":
    main()
