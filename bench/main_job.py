"""The main job as a user runs it: `astra train` on the tiny recipes, several seeds, from import to export.

    python bench/main_job.py [--recipes NAME ...] [--seeds 0 1 2] [--at-least 0.8] [--json]
    python bench/main_job.py --plugin examples/plugins/engine --set rollout.engine=plain      an engine of somebody else

Prints per run: held-out avg@8 before and after, wall time of the whole command, peak memory of all its processes (sum
of PSS each second), parity at staleness 0, and what travelled to the engine. About two minutes a run on two cores.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

RECIPES = ["qwen3.5-tiny-m2po-delta", "qwen3.5-tiny-m2po-full"]


def installed(plugin: Path, folder: Path) -> Path:
    """A place for PYTHONPATH with the package in `plugin`, built into a wheel and installed from that."""
    source = shutil.copytree(plugin, folder / "source")
    pip, wheels = [sys.executable, "-m", "pip"], folder / "wheels"
    built = ["wheel", "--quiet", "--no-deps", "--no-index", "--no-build-isolation", "--wheel-dir", wheels, source]
    subprocess.run([*pip, *map(str, built)], check=True)
    (wheel,) = wheels.glob("*.whl")
    subprocess.run(
        [*pip, "install", "--quiet", "--no-deps", "--no-index", "--target", folder / "site", wheel], check=True
    )
    return folder / "site"


def one(recipe: str, seed: int, folder: Path, settings: list[str], site: Path | None) -> dict[str, Any]:
    run = folder / f"{recipe}-{seed}"
    command = [sys.executable, "-m", "astracli", "train", "--recipe", recipe, "--run-dir", str(run)]
    began = time.monotonic()
    for setting in [f"seed={seed}", *settings]:
        command += ["--set", setting]
    env = os.environ if site is None else {**os.environ, "PYTHONPATH": str(site)}
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, env=env)
    wall_s = time.monotonic() - began
    if done.returncode:
        sys.exit(f"{' '.join(command)} ended with {done.returncode}:\n{done.stderr}")
    summary = json.loads((run / "summary.json").read_text())
    (benchmark,) = summary["benchmarks"]
    weights = summary["weights"]
    return {
        "recipe": recipe,
        "seed": seed,
        "first": benchmark["first"]["avg_at_n"],
        "last": benchmark["last"]["avg_at_n"],
        "stderr": benchmark["last"]["stderr"],
        "wall_s": wall_s,
        "steps": summary["steps"],
        "step_s_p50": summary["training"]["step_s_p50"],
        "trainer_wait_share": summary["training"]["wait_share"],
        "peak_gb": summary["memory"]["peak_bytes"] / 1e9,
        "memory_kind": summary["memory"]["kind"],
        "parity_mean": summary["parity"]["mean_abs"],
        "parity_max": summary["parity"]["max_abs"],
        "full_mb": weights["full_bytes"] / 1e6,
        "delta_mb": weights["delta_bytes_mean"] / 1e6 if weights.get("delta_bytes_mean") else None,
        "density": weights.get("density_mean"),
        "pause_ms": 1000 * weights["pause_s_p50"],
        "publish_ms": 1000 * weights["publish_s_p50"],
        "publish_wait_s": weights["publish_wait_s"],
        "update_parts_s": weights["seconds_p50"],
        "resyncs": weights["resyncs"],
    }


def table(rows: list[dict[str, Any]]) -> None:
    print(
        f"{'recipe':26} {'seed':>4} {'avg@8 first':>11} {'last':>6} {'wall s':>7} {'step s':>7} {'waits':>6} "
        f"{'peak GB':>8} {'parity':>8} {'full MB':>8} {'delta MB':>9} {'density':>8} {'pause ms':>9}"
    )
    for r in rows:
        delta = f"{r['delta_mb']:.3f}" if r["delta_mb"] else "-"
        density = f"{r['density']:.3f}" if r["delta_mb"] else "-"
        print(
            f"{r['recipe']:26} {r['seed']:4d} {r['first']:11.3f} {r['last']:6.3f} {r['wall_s']:7.1f} "
            f"{r['step_s_p50']:7.2f} {r['trainer_wait_share']:6.2f} {r['peak_gb']:8.2f} {r['parity_mean']:8.1e} "
            f"{r['full_mb']:8.2f} {delta:>9} {density:>8} {r['pause_ms']:9.1f}"
        )
    for recipe in dict.fromkeys(r["recipe"] for r in rows):
        of = [r for r in rows if r["recipe"] == recipe]
        last, wall = statistics.median(r["last"] for r in of), statistics.median(r["wall_s"] for r in of)
        print(f"{recipe}: median avg@8 {last:.3f}, lowest {min(r['last'] for r in of):.3f}, median wall {wall:.1f} s")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipes", nargs="+", default=RECIPES)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--at-least", type=float, default=0.0, help="exit 1 when a run ends below this avg@8")
    parser.add_argument("--set", action="append", default=[], help="a.b=c, as `astra train --set`")
    parser.add_argument("--plugin", type=Path, help="source of a package that the runs find installed")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        site = installed(args.plugin, Path(folder)) if args.plugin else None
        rows = [one(recipe, seed, Path(folder), args.set, site) for recipe in args.recipes for seed in args.seeds]
    if args.json:
        print(json.dumps(rows))
    else:
        table(rows)
    if any(r["last"] < args.at_least for r in rows):
        sys.exit(f"a run ended below {args.at_least} of the held-out problems")


if __name__ == "__main__":
    main()
