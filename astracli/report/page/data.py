"""What a report shows of a run, as one JSON-ready document: head, curves, time, weights, configuration, machine.

Everything comes from the files of the run directory; what a run never wrote is left out, nothing is made up.
"""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from astracli.evaluation.passk import interval
from astracli.process.atomic import write_atomic
from astracli.report import run_files
from astracli.report.words import judged
from astracli.runs import documents, metrics
from astracli.runs.metrics import Record
from astracli.runs.names import REWARD
from astracli.runs.run_dir import RunDir

MACHINE_FILE = "machine.json"
DIGITS = 5
"""Significant digits of a figure in the page."""

CURVES: tuple[tuple[str, str, tuple[tuple[str, str], ...]], ...] = (
    ("Reward", "share", ((REWARD, "reward, all that arrived"), ("reward_mean", "reward of the trained batch"))),
    ("Rewards that failed", "samples", (("reward_errors", "errors"), ("arrived_timeouts", "timeouts"))),
    ("KL to the initial model", "nats", (("kl", "k3 estimate"),)),
    ("Staleness", "versions", (("staleness_mean", "mean"), ("staleness_max", "largest"))),
    ("Ratio policy / behaviour", "", (("ratio_mean", "mean"),)),
    ("Clipped tokens", "share", (("clip_fraction", "share"),)),
    ("Entropy", "nats", (("entropy", "mean"),)),
    ("Completion length", "tokens", (("completion_tokens_mean", "mean"),)),
    ("Cut off at the token limit", "share", (("length_stop_fraction", "share"),)),
    ("Gradient norm", "", (("grad_norm", "mean"), ("grad_norm_max", "largest"))),
    ("Loss", "", (("loss", "loss"),)),
    ("Trainer against engine", "|log p|", (("parity_mean_abs", "mean"), ("parity_max_abs", "largest"))),
    ("M2PO cap", "|log ratio|", (("m2_limit", "cap"),)),
    ("Learning rate", "", (("lr", "rate"),)),
    ("Trained tokens a second", "tokens/s", (("tokens_per_s", "trainer"),)),
    ("Rows filled with tokens", "share", (("packed_fraction", "trainer"),)),
    ("Changed weights", "share", (("delta_density", "of the published values"),)),
    ("Size of a version", "bytes", (("delta_bytes", "delta"), ("full_bytes", "full"))),
)
"""(title, unit, ((metric, its name in the legend), ...)): the curves over steps, in the order of the page.
Behind the first come named rewards and figures (`parts/NAME`)."""
PHASES = ("wait_s", "score_s", "forward_s", "backward_s", "optimizer_s", "publish_s", "checkpoint_s")
"""Phases of a trainer step in the order in which they happen."""


def document(run: RunDir) -> dict[str, Any]:
    """The whole page but its samples. Raises UserError when a file of the run is damaged."""
    records = [metrics.without_absent(record) for record in metrics.read(run.metrics_jsonl)]
    status = run.status()
    summary = run_files.summary(run) or {}
    return {
        "run": run_files.row(run)
        | {"cause": status.cause if status else None, "last_lines": status.last_lines if status else []},
        "summary": {
            key: summary[key] for key in ("groups", "memory", "restarts", "resumes", "expected") if summary.get(key)
        },
        "tiles": tiles(run, records, summary),
        "curves": curves(records) + usage(records),
        "evals": evaluations(run),
        "phases": step_phases(records),
        "wall": summary.get("phases_s") or {},
        "weights": weight_updates(records),
        "transfer": summary.get("weights") or {},
        "recipe": documents.document(run.recipe_json),
        "machine": machine_rows(run),
    }


USAGE = (
    ("Memory of each process and GPU", "bytes", "memory_bytes"),
    ("Open descriptors", "", "open_files"),
    ("Size of the hub", "bytes", "hub_bytes"),
)
"""(title, unit, metric): a line a process, in a run that leaks nothing flat after its first steps."""


def usage(records: Sequence[Record]) -> list[dict[str, Any]]:
    """Curves as in `curves`, of what `launch/usage.py` writes."""
    found = []
    for title, unit, name in USAGE:
        processes = list(dict.fromkeys(str(r["of"]) for r in records if name in r and "of" in r))
        lines = [
            {"name": process, "metric": name, "points": [[step, _short(v)] for step, v in points]}
            for process in processes
            if (points := metrics.series([r for r in records if r.get("of") == process], name))
        ]
        if lines:
            found.append({"title": title, "unit": unit, "lines": lines})
    return found


def curves(records: Sequence[Record]) -> list[dict[str, Any]]:
    """[{title, unit, lines: [{name, metric, points: [[step, value]]}]}], without those that no process wrote."""
    found = []
    named = sorted({name for record in records for name in record if name.startswith("parts/")})
    own = tuple((name, "", ((name, "trained batch"), (f"arrived_{name}", "all that arrived"))) for name in named)
    for title, unit, lines in (*CURVES[:1], *own, *CURVES[1:]):
        drawn = [
            {"name": words, "metric": name, "points": [[step, _short(value)] for step, value in points]}
            for name, words in lines
            if (points := [p for p in metrics.series(records, name, "trainer") if math.isfinite(p[1])])
        ]
        if drawn:
            found.append({"title": title, "unit": unit, "lines": drawn})
    return found


def evaluations(run: RunDir) -> list[dict[str, Any]]:
    """[{benchmark, grader, n, k, items, late, points: [{step, avg, low, high, pass}]}] from `eval/eval.csv`.

    Intervals are 95 %. `late`: the steps that stand for an earlier one at which the evaluation became due, in words.
    """
    rows = run_files.eval_rows(run)
    if len(rows) == 2:
        rows.pop(metrics.OVERALL, None)
    return [
        {
            "benchmark": name,
            "grader": each[-1].get("grader") or "",
            "n": int(each[-1]["n"]),
            "k": int(each[-1]["k"]),
            "items": int(each[-1]["items"]),
            "late": ", ".join(
                f"{row['step']} (due at {row['due_step']})"
                for row in each
                if row.get("due_step") not in (None, "", row["step"])
            ),
            "points": [_evaluation(row) for row in each],
        }
        for name, each in rows.items()
    ]


def _evaluation(row: Mapping[str, str]) -> dict[str, float]:
    average = float(row["avg_at_n"])
    low, high = interval(average, float(row["stderr"]), int(row["items"]))
    return {
        "step": int(row["step"]),
        "avg": average,
        "low": _short(low),
        "high": _short(high),
        "pass": float(row["pass_at_k"]),
    }


def step_phases(records: Sequence[Record]) -> dict[str, Any]:
    """Seconds of each trainer step by phase: {names, steps, seconds[phase][step]}; `other` is the rest of `step_s`."""
    total = dict(metrics.series(records, "step_s", "trainer"))
    if not total:
        return {}
    steps = sorted(total)
    parts = {name: dict(metrics.series(records, name, "trainer")) for name in PHASES}
    parts = {name: values for name, values in parts.items() if any(values.values())}
    seconds = [[_short(values.get(step, 0.0)) for step in steps] for values in parts.values()]
    rest = [_short(max(0.0, total[step] - sum(each[i] for each in seconds))) for i, step in enumerate(steps)]
    return {
        "names": [name.removesuffix("_s") for name in parts] + ["other"],
        "steps": steps,
        "seconds": [*seconds, rest],
    }


def weight_updates(records: Sequence[Record]) -> dict[str, Any]:
    """Every weight update that an engine reported: {lines: [{name, points}] of pauses, count, bytes, kinds}."""
    updates = [r for r in records if isinstance(r.get("pause_s"), int | float) and "step" in r]
    engines: dict[str, list[list[float]]] = defaultdict(list)
    kinds: dict[str, int] = defaultdict(int)
    for update in updates:
        engines[str(update.get("engine", "engine"))].append([int(update["step"]), _short(1000 * update["pause_s"])])
        kinds[str(update.get("kind", "?"))] += 1
    return {
        "lines": [{"name": name, "points": sorted(points)} for name, points in sorted(engines.items())],
        "count": len(updates),
        "bytes": sum(int(update.get("fetched_bytes") or 0) for update in updates),
        "kinds": dict(kinds),
        "pause_ms_p50": metrics.median([1000 * update["pause_s"] for update in updates]),
        "pause_ms_max": max((1000 * update["pause_s"] for update in updates), default=None),
    }


def tiles(run: RunDir, records: Sequence[Record], summary: Mapping[str, Any]) -> list[dict[str, str]]:
    """The figures at the head of the page: {label, value, note}."""
    from astracli.report.words import duration, size

    trends = run_files.trends(run)
    found = [
        {
            "label": f"{judged(trend.benchmark, vars(trend))} avg@{trend.n}",
            "value": f"{trend.last:.3f}",
            "note": (f"{trend.difference:+.3f} from {trend.first:.3f} " if trend.last_step != trend.first_step else "")
            + f"at step {trend.first_step}"
            + (f", graded by {trend.grader}" if trend.grader else ""),
        }
        for trend in trends
        if trend.benchmark != "overall" or len(trends) > 2
    ]
    row = run_files.row(run)
    if row["step"] is not None:
        mean = metrics.mean(metrics.values(records, "step_s", "trainer"))
        note = f"{mean:.2f} s each" if mean is not None else ""
        found.append({"label": "steps", "value": f"{row['step']} of {row['steps']}", "note": note})
    if summary.get("wall_s"):
        wait = (summary.get("training") or {}).get("wait_share")
        note = f"trainer waited {wait:.0%}" if wait is not None else ""
        found.append({"label": "wall time", "value": duration(summary["wall_s"]), "note": note})
    updates = weight_updates(records)
    if updates["count"]:
        pause = f"pause p50 {updates['pause_ms_p50']:.0f} ms" if updates["pause_ms_p50"] is not None else ""
        found.append({"label": f"weights, {updates['count']} updates", "value": size(updates["bytes"]), "note": pause})
    parity = metrics.mean(metrics.values(records, "parity_mean_abs"))
    if parity is not None:
        found.append({"label": "trainer - engine, mean |log p|", "value": f"{parity:.1e}", "note": ""})
    return found


def write_machine(run: RunDir) -> None:
    """Keep what this machine is with the run, for a report that is made somewhere else."""
    from astracli.machine import read

    write_atomic(run.path / MACHINE_FILE, json.dumps(read.probe().document(), indent=2) + "\n")


def machine_rows(run: RunDir) -> list[list[str]]:
    """[[what, value]] of the machine and the versions; says so when the run kept none. No environment variables."""
    path: Path = run.path / MACHINE_FILE
    if not path.is_file():
        return [["machine", "not recorded by this run"]]
    facts = documents.document(path)
    rows = [[key, _text(value)] for key, value in facts["system"].items() if value is not None]
    rows.append(["python", facts["python"]["version"]])
    rows += [[f"GPU {gpu.get('index', i)}", _text(gpu)] for i, gpu in enumerate(facts["gpus"])]
    if facts["torch_cuda"]:
        rows.append(["torch built for CUDA", facts["torch_cuda"]])
    rows += [[name, found["version"]] for name, found in facts["packages"].items() if found and found.get("version")]
    return rows


def _text(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_text(item)}" for key, item in value.items() if item is not None)
    return ", ".join(map(_text, value)) if isinstance(value, list) else str(value)


def _short(value: float) -> float:
    return float(f"{value:.{DIGITS}g}")
