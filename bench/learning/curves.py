"""Evaluations of runs by step as one figure: `bench/learning/curves.py OUT.svg LABEL=eval.csv [LABEL=eval.csv ...]`.

Each file is a run directory's `eval/eval.csv`; the band is the standard error. Needs matplotlib.
"""

from __future__ import annotations

import csv
import sys
from pathlib import Path


def points(path: Path) -> list[tuple[int, float, float]]:
    """(step, avg@n, its standard error) of every benchmark's own lines, one a step."""
    with path.open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["benchmark"] != "overall"]
    return sorted({int(r["step"]): (int(r["step"]), float(r["avg_at_n"]), float(r["stderr"])) for r in rows}.values())


def main() -> None:
    if len(sys.argv) < 3 or not all("=" in word for word in sys.argv[2:]):
        raise SystemExit(__doc__)
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "astra"
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 3.2), layout="constrained")
    for word in sys.argv[2:]:
        label, _, path = word.rpartition("=")
        steps, means, errors = zip(*points(Path(path)), strict=True)
        (line,) = axes.plot(steps, means, marker="o", markersize=3, label=label)
        low, high = ([m + sign * e for m, e in zip(means, errors, strict=True)] for sign in (-1, 1))
        axes.fill_between(steps, low, high, alpha=0.2, color=line.get_color())
    axes.set(xlabel="step", ylabel="held out, avg@n at T 1", ylim=(0, 1))
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right")
    figure.savefig(sys.argv[1], metadata={"Date": None})


if __name__ == "__main__":
    main()
