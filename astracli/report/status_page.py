"""`astra runs status` as a page for people: what runs, since when, how far, what it waits for, how it ended."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from astracli.plan.types import TRAINING
from astracli.report import run_files
from astracli.report.words import duration, judged
from astracli.runs import changes, metrics, names
from astracli.runs.names import REWARD
from astracli.runs.run_dir import RunDir
from astracli.runs.status import RunStatus

LAST_STEPS = 10
"""Steps whose mean stands beside the newest reward, and whose pace says how long a run still takes."""
NOTES = 5
"""Newest warnings of the run that are shown."""


@dataclass(frozen=True)
class StatusPage:
    rows: list[tuple[str, str]]
    """(what, words)"""
    last_lines: list[str]
    """Of a run that failed, as they were written."""
    hint: str | None


def page(run: RunDir) -> StatusPage:
    """The page of a run. Raises UserError when its status.json is damaged."""
    status = run.status()
    records = [metrics.without_absent(record) for record in metrics.read(run.metrics_jsonl)]
    rows = [("run", f"{run.name}: {run.shown_state()}{_doing(status)}")]
    if status is None:
        return StatusPage([*rows, ("path", str(run.path))], [], None)
    rows += _what(status)
    rows += _progress(status, records)
    rows += _evaluations(run)
    rows += [("from", found)] if (found := run_files.origin(run)) else []
    rows += [("changed", changes.words(line)) for line in changes.read(run)]
    if status.state == "running" and status.alive():
        rows += [("host", f"{name}: {words}") for name, words in status.hosts.items()]
    rows += [("waits", f"{name}: {words}") for name, words in _waits(status)]
    rows += [("warning", words) for words in _notes(run, status)]
    if status.cause and status.state == "failed":
        rows.append(("cause", status.cause))
    rows.append(("path", str(run.path)))
    failed = status.state == "failed"
    return StatusPage(rows, status.last_lines if failed else [], _next(run, status))


def figures(run: RunDir) -> dict[str, Any]:
    """What the page says of the newest step, for `--json`: `{metric: {words, step, value}}`."""
    records = [metrics.without_absent(record) for record in metrics.read(run.metrics_jsonl)]
    found = {}
    for name in (REWARD, "reward_mean", "entropy", "grad_norm", "lr", "step_s", "tokens_per_s"):
        if points := metrics.series(records, name, "trainer"):
            step, value = points[-1]
            found[name] = {"words": names.words(name), "step": step, "value": value}
    return found


def _doing(status: RunStatus | None) -> str:
    said = {
        "starting": "its processes start",
        "resuming": "it goes on from a checkpoint",
        "finishing": "training is done, the last evaluations run",
    }
    return f", {said[status.phase]}" if status and status.state == "running" and status.phase in said else ""


def _what(status: RunStatus) -> list[tuple[str, str]]:
    attempt = f", attempt {status.attempt}" if status.attempt > 1 else ""
    rows = [("what", f"{status.command}, recipe {status.recipe}{attempt}")]
    rows += [("command", status.typed)] if status.typed else []
    began = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(status.started))
    end = status.ended or (time.time() if status.alive() else None)
    took = f", {duration(end - status.started)}" if end else ""
    return [*rows, ("since" if status.state == "running" else "began", f"{began}{took}")]


def _progress(status: RunStatus, records: Sequence[Mapping[str, Any]]) -> list[tuple[str, str]]:
    rows = []
    if status.steps:
        done = f"{status.step} of {status.steps} done"
        newest_s = metrics.values(records, "step_s", "trainer")[-LAST_STEPS:]
        pace = metrics.mean(newest_s)
        if pace is not None:
            done += f", {pace:.2f} s each (mean of the last {len(newest_s)})"
            if status.state == "running" and status.step < status.steps:
                done += f", about {duration(pace * (status.steps - status.step))} left"
        rows.append(("step", done))
    if rewards := metrics.series(records, REWARD, "trainer"):
        newest = rewards[-1][1]
        words = f"{newest:.3g} of all that arrived for the newest step"
        if len(rewards) > 1:
            tail = [value for _, value in rewards[-LAST_STEPS:]]
            words += f"; {rewards[0][1]:.3g} at first, mean of the last {len(tail)} steps {metrics.mean(tail):.3g}"
        rows.append((names.words(REWARD), words))
    if words := _dropped(records):
        rows.append(("dropped", words))
    if parts := _newest(records, "arrived_parts/"):
        rows.append(("parts", ", ".join(f"{name} {value:.3g}" for name, value in parts.items()) + " of the reward"))
    newest_of = {
        name: points[-1][1]
        for name in ("loss", "entropy", "grad_norm", "lr", "staleness_mean", "tokens_per_s")
        if (points := metrics.series(records, name, "trainer"))
    }
    if newest_of:
        rows.append(("training", ", ".join(names.said(name, value) for name, value in newest_of.items())))
    return rows


def _dropped(records: Sequence[Mapping[str, Any]]) -> str:
    """Share of the groups so far whose rewards were equal; "" for none."""
    arrived, dropped = (
        sum(metrics.values(records, name, "trainer")) for name in ("arrived_groups", "arrived_dropped_groups")
    )
    if not dropped:
        return ""
    return f"{dropped / arrived:.0%} of the groups so far, for equal rewards: questions too easy or too hard"


def _newest(records: Sequence[Mapping[str, Any]], prefix: str) -> dict[str, float]:
    """The newest value of each metric with a prefix, by what follows it."""
    found = sorted({key for record in records for key in record if key.startswith(prefix)})
    each = {name.removeprefix(prefix): metrics.values(records, name, "trainer") for name in found}
    return {name: points[-1] for name, points in each.items() if points}


def _evaluations(run: RunDir) -> list[tuple[str, str]]:
    """The last evaluation of each benchmark, and what the first one was."""
    found = []
    trends = run_files.trends(run)
    for trend in trends:
        if trend.benchmark == metrics.OVERALL and len(trends) == 2:
            continue
        before = f"; {trend.first:.3f} at step {trend.first_step}" if trend.first_step != trend.last_step else ""
        score = f"avg@{trend.n} {trend.last:.3f} ± {trend.stderr:.3f} pass@{trend.k} {trend.pass_last:.3f}"
        name = judged(trend.benchmark, vars(trend))
        found.append(("evaluation", f"step {trend.last_step}: {name} {score}{before}"))
    return found


def _waits(status: RunStatus) -> list[tuple[str, str]]:
    if status.state != "running" or not status.alive():
        return []
    return [(name, words) for name, words in status.waits.items() if words not in ("ready", "done")]


def _notes(run: RunDir, status: RunStatus) -> list[str]:
    """The newest lines of the supervisor's own log, without the time."""
    log = run.attempt_logs(status.attempt) / "supervisor.log"
    lines = run_files.last_lines(log, NOTES) if log.is_file() else []
    return [line.split(" ", 2)[-1] for line in lines]


def _next(run: RunDir, status: RunStatus) -> str | None:
    if status.state == "failed":
        return status.hint
    resumable = status.state == "interrupted" or not status.alive()
    if status.command in TRAINING and status.state != "done" and resumable:
        return f"go on with `astra {status.command} --resume {run.path}`"
    return None
