"""The main job as a user runs it: `astra train` on the tiny recipes, several seeds, from import to export.

    python bench/loop/main_job.py [--recipes NAME ...] [--seeds 0 1 2] [--at-least 0.8] [--json]
    python bench/loop/main_job.py --plugin examples/plugins/engine --set rollout.engine=plain    an engine of a stranger

Prints per run: held-out avg@8 before and after, seconds until every process is ready, wall time and CPU seconds of the
whole command, peak memory of all its processes (sum of PSS), parity at staleness 0, and what travelled to the engine.
About two minutes a run on two cores.
"""

from __future__ import annotations

import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from shared import folder, options, show, train

RECIPES = ["qwen3.5-tiny-m2po-delta", "qwen3.5-tiny-m2po-full"]

START = ("planning", "fetching", "start-up")


def cpu_s() -> float:
    """CPU seconds of every process that has ended, of those that this one and its children have started."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def install(plugin: Path, within: Path) -> None:
    """The package in `plugin`, built into a wheel and installed from that, where the runs will find it."""
    source = shutil.copytree(plugin, within / "source")
    pip, quiet = [sys.executable, "-m", "pip"], ["--quiet", "--no-deps", "--no-index"]
    wheels, site = within / "wheels", within / "site"
    subprocess.run([*pip, "wheel", *quiet, "--no-build-isolation", "--wheel-dir", wheels, source], check=True)
    subprocess.run([*pip, "install", *quiet, "--target", site, *wheels.glob("*.whl")], check=True)
    os.environ["PYTHONPATH"] = str(site)


def one(recipe: str, seed: int, folder: Path, settings: list[str]) -> dict[str, Any]:
    run = folder / f"{recipe}-{seed}"
    before = cpu_s()
    wall_s = train(run, [f"seed={seed}", *settings], recipe)
    used_s = cpu_s() - before
    summary = json.loads((run / "summary.json").read_text())
    (benchmark,) = summary["benchmarks"]
    weights = summary["weights"]
    return {
        "recipe": recipe, "seed": seed, "first": benchmark["first"]["avg_at_n"], "last": benchmark["last"]["avg_at_n"],
        "stderr": benchmark["last"]["stderr"], "ready_s": sum(summary["phases_s"][phase] for phase in START),
        "wall_s": wall_s, "cpu_s": used_s, "steps": summary["steps"],
        "step_s_p50": summary["training"]["step_s_p50"], "trainer_wait_share": summary["training"]["wait_share"],
        "peak_gb": summary["memory"]["peak_bytes"] / 1e9, "memory_kind": summary["memory"]["kind"],
        "parity_mean": summary["parity"]["mean_abs"], "parity_max": summary["parity"]["max_abs"],
        "full_mb": weights["full_bytes"] / 1e6,
        "delta_mb": weights["delta_bytes_mean"] / 1e6 if weights.get("delta_bytes_mean") else None,
        "density": weights.get("density_mean"), "pause_ms": 1000 * weights["pause_s_p50"],
        "publish_ms": 1000 * weights["publish_s_p50"], "publish_wait_s": weights["publish_wait_s"],
        "update_parts_s": weights["seconds_p50"], "resyncs": weights["resyncs"],
    }  # fmt: skip


def main() -> None:
    parser = options(
        __doc__, recipes=RECIPES, seeds=[0, 1, 2], at_least={0.0: "exit 1 when a run ends below this avg@8"},
        set="as `astra train --set`", plugin={str: "source of a package that is installed for the runs"},
    )  # fmt: skip
    args = parser.parse_args()
    with folder() as name:
        if args.plugin:
            install(Path(args.plugin), name)
        rows = [one(recipe, seed, name, args.set) for recipe in args.recipes for seed in args.seeds]
    medians = []
    for recipe in args.recipes:
        of = [r for r in rows if r["recipe"] == recipe]
        last, wall_s = (statistics.median(r[figure] for r in of) for figure in ("last", "wall_s"))
        medians.append({"recipe": recipe, "last": last, "lowest": min(r["last"] for r in of), "wall_s": wall_s})
    show(args, {"rows": rows, "medians": medians})
    if any(r["last"] < args.at_least for r in rows):
        sys.exit(f"a run ended below {args.at_least} of the held-out problems")


if __name__ == "__main__":
    main()
