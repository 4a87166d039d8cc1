"""Evaluations of runs by step as one figure: `bench/learning/curves.py OUT.svg LABEL=eval.csv [LABEL=eval.csv ...]`.

Each file is a run directory's `eval/eval.csv`; the band is the standard error. Needs matplotlib. `panels` draws the
figures of the other benches here.
"""

from __future__ import annotations

import csv
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

Band = tuple[Sequence[float], Sequence[float], Sequence[float], Sequence[float]]
"""Steps, and at each the lower end, the middle and the upper end."""


def of_seeds(curves: Sequence[Mapping[int, float]]) -> Band:
    """At the steps that all have: the median of the seeds, in a band from the lowest to the highest."""
    steps = sorted(set.intersection(*(set(curve) for curve in curves))) if curves else []
    values = [[curve[step] for curve in curves] for step in steps]
    return steps, [min(v) for v in values], [statistics.median(v) for v in values], [max(v) for v in values]


def of_file(path: Path) -> Band:
    """avg@n of every benchmark's own lines, one a step, with its standard error to both sides."""
    with path.open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["benchmark"] != "overall"]
    points = {int(r["step"]): (float(r["avg_at_n"]), float(r["stderr"])) for r in rows}
    steps = sorted(points)
    low, middle, high = ([points[step][0] + sign * points[step][1] for step in steps] for sign in (-1, 0, 1))
    return steps, low, middle, high


def panels(shown: Mapping[str, Mapping[str, Band]], out: Path | str, **axis: object) -> None:
    """A panel a title, a line a label; `axis`: settings of every panel."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "astra"
    from matplotlib import pyplot

    width = 4 * len(shown) if len(shown) > 1 else 7
    figure, axes = pyplot.subplots(1, len(shown), figsize=(width, 3.4), squeeze=False, layout="constrained")
    for panel, (title, lines) in zip(axes[0], shown.items(), strict=True):
        for label, (steps, low, middle, high) in lines.items():
            (line,) = panel.plot(steps, middle, marker="o", markersize=2, label=label)
            panel.fill_between(steps, low, high, alpha=0.15, color=line.get_color(), lw=0)
        panel.set(title=title, xlabel="step", **axis)
        panel.grid(alpha=0.3)
    axes[0][-1].legend(fontsize=8)
    figure.savefig(out, metadata={"Date": None})


def main() -> None:
    if len(sys.argv) < 3 or not all("=" in word for word in sys.argv[2:]):
        raise SystemExit(__doc__)
    files = dict(word.rpartition("=")[::2] for word in sys.argv[2:])
    lines = {label: of_file(Path(path)) for label, path in files.items()}
    panels({"held out, avg@n at T 1": lines}, sys.argv[1], ylim=(0, 1))


if __name__ == "__main__":
    main()
