"""From the trainer alone to the whole loop: what each part of a step takes of the tokens/s, and why.

    python bench/loop/waterfall.py RUN [--alone TOKENS_PER_S] [--skip 1] [--json]

RUN is the directory of a training run; its first `--skip` steps are left out, and stand in a line of their own. Tokens
are trained ones (`tokens` of metrics.jsonl). The first line is `--alone`, what `bench/trainer/speed.py` or `ranks.py`
measured without an engine (tokens of whole rows, of all ranks), converted by this run's share of trained tokens; then
each line adds the seconds of one part of a step, so the losses add up to the whole. `at work` is the loop without its
waiting for batches. Its last part shows what the engines did meanwhile.
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from shared import Record, more_options, options, show

from astracli.runs import metrics
from astracli.runs.run_dir import RunDir

PASSES = ("forward_s", "backward_s", "optimizer_s")
PARTS = {
    "score_s": "the pass without gradients: scoring, reference, agreement with the engine",
    "check_s": "joined rows against separate ones",
    "batch_s": "dividing the batch into micro-batches",
    "publish_s": "the version: waiting for the one before, snapshot, and all of it where nothing runs beside",
    "checkpoint_s": "standing still for a checkpoint",
}
OTHERS = "the host between the phases: receiving the batch, samples, metrics"


def fall(records: Sequence[Record], ranks: int, *, alone: float | None = None, skip: int = 1) -> Record:
    """The lines of the waterfall, and what the engines did. Raises ValueError when too few steps are there."""
    every = [r for r in records if r.get("process") == "trainer" and "step_s" in r]
    steps = every[skip:]
    if not steps:
        raise ValueError(f"{len(every)} steps are too few: {skip} are left out")
    count = len(steps)
    seconds = {name: sum(r.get(name, 0.0) for r in steps) / count for name in (*PASSES, *PARTS, "wait_s", "step_s")}
    tokens = sum(r["tokens"] for r in steps) / count
    lines: list[Record] = []
    spent = sum(seconds[name] for name in PASSES)
    if alone is not None:
        rows = sum(r["row_tokens"] for r in steps) / count * ranks
        lines.append(_line("trainer alone", tokens / (alone * tokens / rows), tokens, "measured without an engine"))
    each = ", ".join(f"{name.removesuffix('_s')} {seconds[name]:.2f} s" for name in PASSES)
    why = f"{each}; rows, recomputation and neighbours of this run"
    lines.append(_line("passes and update", spent, tokens, why))
    for name, cause in PARTS.items():
        spent += seconds[name]
        lines.append(_line(name.removesuffix("_s"), spent, tokens, cause))
    working = seconds["step_s"] - seconds["wait_s"]
    lines.append(_line("at work", max(working, spent), tokens, OTHERS))
    lines.append(_line("waiting", seconds["step_s"], tokens, "no batch: the engines had not made it yet"))
    if skip:
        whole, first = sum(r["step_s"] for r in every), sum(r["step_s"] for r in every[:skip])
        mean = sum(r["tokens"] for r in every) / len(every)
        lines.append(_line(f"first {skip}", whole / len(every), mean, f"{first:.1f} s, in which kernels are compiled"))
    before: Record | None = None
    for line in lines:
        line["lost_per_s"] = None if before is None else before["tokens_per_s"] - line["tokens_per_s"]
        line["lost_share"] = None if before is None else line["lost_per_s"] / lines[0]["tokens_per_s"]
        before = line
    return {"waterfall": lines, "engines": _engines(records, steps), "steps": count, "tokens_a_step": tokens}


def _line(what: str, seconds: float, tokens: float, why: str) -> Record:
    """`seconds`: of a step up to here."""
    return {"what": what, "seconds": seconds, "tokens_per_s": tokens / seconds, "why": why}


def _engines(records: Sequence[Record], steps: Sequence[Record]) -> Record:
    """Shares of the engines' time between updates, and their pauses, in the steps that count."""
    first = steps[0]["step"]
    updates = [r for r in records if "interval_s" in r and r.get("step", -1) >= first]
    spent = sum(r["interval_s"] for r in updates)
    if not spent:
        return {}
    held = sum(r.get("held_idle_s", 0.0) for r in updates)
    found = {"idle_share": (sum(r["idle_s"] for r in updates) - held) / spent, "held_share": held / spent}
    for name in ("slots_busy", "rollout_tokens_per_s", "pause_s"):
        if values := [r[name] for r in updates if name in r]:
            found[name] = statistics.fmean(values)
    return found


def of_run(run: Path, *, alone: float | None = None, skip: int = 1) -> Record:
    """Of a run's directory."""
    place = RunDir(run)
    processes: list[Any] = json.loads((run / "plan.json").read_text())["processes"]
    ranks = sum(process["role"] == "trainer" for process in processes)
    return fall(metrics.read(place.metrics_jsonl), ranks, alone=alone, skip=skip)


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("run", type=Path, metavar="RUN")
    more_options(parser, alone={float: "tokens/s of the trainer alone, of whole rows"}, skip=1)
    args = parser.parse_args()
    try:
        found = of_run(args.run, alone=args.alone, skip=args.skip)
    except (OSError, ValueError, KeyError) as error:
        sys.exit(f"`{args.run}`: {error}")
    show(args, found)


if __name__ == "__main__":
    main()
