"""What a run came to, as one document: RUN_DIR/summary.json, and the source of the summary table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from astracli.config.recipe import Recipe
from astracli.hub.types import EvaluationStatus, HubState
from astracli.plan.types import TRAINING
from astracli.report import bottleneck
from astracli.runs.metrics import OVERALL, Record, mean, median, series, values, without_absent
from astracli.runs.names import REWARD
from astracli.runs.run_dir import paths

UPDATE_PARTS = (
    "snapshot", "digest", "diff", "encode", "write", "transfer", "stage", "decode", "apply", "verify", "readback",
)  # fmt: skip
"""Of a weight update, in the order in which they happen: the first five by the trainer, the rest by each engine."""


def build(
    recipe: Recipe,
    *,
    run_dir: Path,
    state: str,
    attempt: int,
    first_step: int,
    since: float = 0.0,
    phases: Mapping[str, float],
    evaluations_s: Mapping[str, float],
    records: Sequence[Record],
    hub: HubState,
    memory: Mapping[str, Any],
    restarts: Mapping[str, int],
    resumes: Sequence[Mapping[str, Any]] = (),
    notes: Sequence[str] = (),
    changes: Sequence[Mapping[str, Any]] = (),
    source: Mapping[str, Any] | None = None,
    best: Mapping[str, Any] | None = None,
    plan: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """The document.

    `first_step`, `since`: where and when (unix seconds) this attempt began; steps that an earlier attempt trained after
    its last checkpoint do not count. `phases`: seconds of this attempt by phase. `evaluations_s`: by step, from when
    one became due to its result. `records`: all of metrics.jsonl. `resumes`: documents of `restarts.Resume`. `notes`:
    what else the supervisor did to go on. `changes`: lines of changes.jsonl. `source`: from.json, the run whose weights
    this one started from. `best`: the best checkpoint, with `checkpoint.best`. `plan`: plan.json.
    """
    wall_s, training_run = sum(phases.values()), plan is None or plan["command"] in TRAINING
    mine = [record for record in records if record.get("time", since) >= since]
    here = [step for step in _steps(mine) if step >= first_step]
    return {
        "recipe": recipe.name,
        "seed": recipe.seed,
        "state": state,
        "attempt": attempt,
        "steps": first_step + len(here),  # a kill behind a checkpoint may leave its last step without a record
        "steps_planned": recipe.train.steps if training_run else None,
        "steps_this_attempt": len(here),
        "wall_s": wall_s,
        "phases_s": wall_phases(phases, sum(values(mine, "export_s")), "training" if training_run else "running"),
        "evaluations_s": dict(evaluations_s),
        "benchmarks": benchmarks(hub.done_evals()),
        "expected": recipe.expected.model_dump() if recipe.expected else None,
        "prompts": dict(plan.get("prompts", {})) if plan is not None else {},
        "training": training(_since_ready(mine, since + phases.get("starting", 0.0)), first_step),
        "bottleneck": bottleneck.of_run(mine, recipe, plan, first_step)
        if plan and here and recipe.sft is None
        else None,
        "slots_busy": slots_busy(
            mine, first_step + bottleneck.FIRST_STEPS, recipe.train.steps - recipe.effective_staleness
        )
        if recipe.sft is None
        else {},
        "weights": weights(records, recipe.weights.transfer),
        "parity": {"mean_abs": mean(values(records, "parity_mean_abs")), "max_abs": largest(records, "parity_max_abs")},
        "groups": asdict(hub.counts),
        "restarts": {name: count for name, count in restarts.items() if count},
        "resumes": [dict(resume) for resume in resumes],
        "notes": list(notes),
        "changes": [dict(line) for line in changes],
        "from": dict(source) if source else None,
        "best": dict(best) if best else None,
        "memory": dict(memory),
        "paths": paths(run_dir),
    }


def _since_ready(records: Sequence[Record], ready: float) -> list[Record]:
    """The records without what a trainer that was up first waited for the others: that is start-up, and told as such.
    `ready`: when all processes were, unix seconds."""
    found = []
    for record in records:
        if "wait_s" in record and "step_s" in record and "time" in record:
            early = min(record["wait_s"], max(0.0, ready - (record["time"] - record["step_s"])))
            record = record | {"wait_s": record["wait_s"] - early, "step_s": record["step_s"] - early}
        found.append(record)
    return found


def _steps(records: Sequence[Record]) -> list[int]:
    return [step for step, _ in series(records, "train_s") or series(records, "step_s")]


def wall_phases(phases: Mapping[str, float], export_s: float, running: str) -> dict[str, float]:
    """The phases in words; the export, which is the end of `running`, apart."""
    named = {"starting": "start-up", "running": running, "finishing": "last evaluations"}
    found: dict[str, float] = {}
    for phase, seconds in phases.items():
        found[named.get(phase, phase)] = seconds - (export_s if phase == "running" else 0.0)
        if phase == "running" and export_s:
            found["export"] = export_s
    return {name: round(seconds, 2) for name, seconds in found.items()}


def benchmarks(done: Sequence[EvaluationStatus]) -> list[dict[str, Any]]:
    """First and last evaluation of each benchmark, and the difference, None when they are one; `overall` last, and
    only of several."""
    names = list(dict.fromkeys(name for e in done for name in e.results))
    names.sort(key=lambda name: name == OVERALL)
    if len(names) == 2 and names[1] == OVERALL:
        names = names[:1]
    rows = []
    for name in names:
        # overall is compared with a mean of the same benchmarks: a resume may have changed them
        alike = [e for e in done if name != OVERALL or e.results.keys() == done[-1].results.keys()]
        of_name = [{"step": e.step, "due_step": e.due_step, **e.results[name]} for e in alike if name in e.results]
        first, last, more = of_name[0], of_name[-1], len(of_name) > 1
        rows.append(
            {
                "benchmark": name,
                "n": last.get("n"),
                "k": last.get("k"),
                "items": last.get("items"),
                "first": first,
                "last": last,
                "difference_avg_at_n": last["avg_at_n"] - first["avg_at_n"] if more else None,
                "difference_pass_at_k": last["pass_at_k"] - first["pass_at_k"] if more else None,
            }
        )
    return rows


def training(records: Sequence[Record], first_step: int) -> dict[str, Any]:
    """Time and tokens of the steps of this attempt; the trainer's waiting share is wait / (wait + work)."""
    here = [without_absent(r) for r in records if r.get("step", 0) >= first_step]
    step_s, wait_s = values(here, "step_s", "trainer"), values(here, "wait_s", "trainer")
    tokens = sum(values(here, "tokens", "trainer"))
    rewards = values(here, REWARD)
    spent = sum(step_s)
    return {
        "step_s_mean": mean(step_s),
        "step_s_p50": median(step_s),
        "wait_s": sum(wait_s),
        "wait_share": sum(wait_s) / spent if spent else None,
        "tokens": tokens,
        "tokens_per_s": tokens / spent if spent else None,
        "staleness_mean": mean(values(here, "staleness_mean")),
        "loss": [losses[0], losses[-1]] if (losses := values(here, "loss", "trainer")) else None,
        f"{REWARD}_first": rewards[0] if rewards else None,
        f"{REWARD}_last": rewards[-1] if rewards else None,
        "reward_means_by_source": first_and_last(here, BY_SOURCE),
        "reward_parts": first_and_last(here, BY_PART),
        "grad_norm_mean": mean(values(here, "grad_norm")),
        "checkpoint_s": sum(values(here, "checkpoint_s")),
        "export_s": sum(values(here, "export_s")),
    }


BY_SOURCE = "arrived_reward_mean/"
"""Before the name of a training source, among several: the mean reward of its groups that arrived."""
BY_PART = "arrived_parts/"
"""Before the name of a reward, among several, or of a figure that a reward logs: its mean over all that arrived."""


def first_and_last(records: Sequence[Record], prefix: str) -> dict[str, list[float]]:
    """First and last value of each metric with a prefix, by what follows it."""
    names = sorted({key for record in records for key in record if key.startswith(prefix)})
    found = {name.removeprefix(prefix): values(records, name) for name in names}
    return {name: [points[0], points[-1]] for name, points in found.items() if points}


def slots_busy(records: Sequence[Record], first: int, end: int) -> dict[str, float]:
    """By engine, the share of its slots that had a request of the rollout worker, weighted by time.

    Of a training run from step `first` on and before `end`, like the bottleneck; of `astra rollout`, without steps,
    all of it.
    """
    spans: dict[str, list[tuple[float, float]]] = {}
    for r in records:
        # an update to version v is told by an engine that generated with v - 1
        if "slots_busy" in r and ("step" not in r or first < r["step"] <= end):
            spans.setdefault(r["engine"], []).append((r["slots_busy"], r["interval_s"]))
    return {
        engine: sum(share * seconds for share, seconds in told) / sum(seconds for _, seconds in told)
        for engine, told in sorted(spans.items())
    }


def weights(records: Sequence[Record], transfer: str) -> dict[str, Any]:
    """Bytes of a version in full and as a delta, changed share, and where the seconds of an update go."""
    full, delta = median(values(records, "full_bytes")), mean([b for b in values(records, "delta_bytes") if b])
    return {
        "transfer": transfer,
        "full_bytes": full,
        "delta_bytes_mean": delta,
        "ratio": full / delta if full and delta else None,
        "density_mean": mean(values(records, "delta_density")) if delta else None,
        "bytes_per_changed_p50": median(
            [float(r["bytes_per_changed"]) for r in records if r.get("delta_bytes") and "bytes_per_changed" in r]
        ),
        "publish_s_p50": median(values(records, "publish_s")),
        "publish_wait_s": sum(values(records, "publish_wait_s")),
        "seconds_p50": {
            name: seconds for name in UPDATE_PARTS if (seconds := median(every_value(records, f"{name}_s"))) is not None
        },
        "pause_s_p50": median(every_value(records, "pause_s")),
        "resyncs": sum(every_value(records, "resyncs")),
    }


def every_value(records: Sequence[Record], name: str) -> list[float]:
    """All values of a metric, also several of one step (one per engine)."""
    return [float(r[name]) for r in records if isinstance(r.get(name), int | float)]


def largest(records: Sequence[Record], name: str) -> float | None:
    return max(values(records, name), default=None)
