"""The summary table of a run, from its summary document: what it reached, what it took, where everything is."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from astracli.process.console import plain_values
from astracli.report.live import stderr_console
from astracli.report.words import duration, evaluated, judged, size
from astracli.runs import changes
from astracli.runs.names import REWARD


def print_summary(summary: Mapping[str, Any], console: Console | None = None, *, wrap: bool | None = None) -> None:
    """The summary table: benchmarks first and last, expected figures, time, weights, parity, memory, places. `wrap`
    breaks long rows between words; None does so on a terminal, whose other readers get a line a row."""
    console, summary = console or stderr_console(), plain_values(summary)
    if summary["benchmarks"]:
        console.print(benchmark_table(summary))
    room = console.width - KEY if console.is_terminal or wrap else 0
    for key, words in summary_rows(summary):
        # a word that is longer than the room, a path, stays whole
        lines = textwrap.wrap(words, max(20, room), break_on_hyphens=False, break_long_words=False) if room else [words]
        for number, line in enumerate(lines or [""]):
            console.print(Text.assemble((f"{'' if number else key:<{KEY}}", "bold"), line), soft_wrap=True)


FIGURE = len("0.352 ± 0.020")
NAME = 20
"""Columns that the name of a benchmark keeps on a narrow terminal."""
KEY = 13
"""Columns of the names of rows."""


def benchmark_table(summary: Mapping[str, Any]) -> Table:
    table = Table(box=None, padding=(0, 2), pad_edge=False)
    rows = summary["benchmarks"]
    first, last = rows[0]["first"]["step"], rows[0]["last"]["step"]
    sides = ("first", "last") if first != last else ("first",)  # of an interrupted run there may be one
    steps = tuple(evaluated(row["step"], row["due_step"]) for row in (rows[0]["first"], rows[0]["last"]))
    for heading in ("benchmark", "figure", *steps, "difference")[: 5 if len(sides) > 1 else 3]:
        words = heading in ("benchmark", "figure")
        # figures and a short name stay whole; what graded, or a heading such as `step 13 (due at 10)`, may break
        named = min(NAME, max((len(row["benchmark"]) for row in rows), default=0))
        least = {"benchmark": named, "difference": len(heading)}.get(heading, FIGURE)
        table.add_column(
            heading, justify="left" if words else "right", min_width=None if heading == "figure" else least,
            no_wrap=heading == "figure", overflow="fold",
        )  # fmt: skip
    for row in rows:
        spread = [f"{row[side]['avg_at_n']:.3f} ± {row[side]['stderr']:.3f}" for side in sides]
        passes = [f"{row[side]['pass_at_k']:.3f}" for side in sides]
        for name, figure, values, change in (
            (judged(row["benchmark"], row["last"]), f"avg@{row['n']}", spread, row["difference_avg_at_n"]),
            ("", f"pass@{row['k']}", passes, row["difference_pass_at_k"]),
        ):
            table.add_row(name, figure, *values, *([f"{change:+.3f}"] if len(sides) > 1 and change is not None else []))
    expected = summary.get("expected")
    if expected and len(sides) > 1:
        for label, a, b in (
            ("avg@n", "avg_at_n_first", "avg_at_n_last"),
            ("pass@k", "pass_at_k_first", "pass_at_k_last"),
        ):
            low, high = expected.get(a), expected.get(b)
            if low is not None or high is not None:
                change = f"{high - low:+.3f}" if low is not None and high is not None else ""
                table.add_row("expected", label, *("" if v is None else f"{v:.3f}" for v in (low, high)), change)
    return table


MOST_PARTS = 8
"""Parts of the reward that the table names; metrics.jsonl has all."""


def reward_rows(training: Mapping[str, Any], attempt: str) -> list[tuple[str, str]]:
    """Reward of all that arrived at the first and the last step of this attempt, with its parts and by source."""

    def words(found: Mapping[str, Sequence[float]]) -> str:
        each = [f"{name} {first:.3f} -> {last:.3f}" for name, (first, last) in found.items()]
        more = f", and {len(each) - MOST_PARTS} more" if len(each) > MOST_PARTS else ""
        return ", ".join(each[:MOST_PARTS]) + more

    rows = []
    first, last = (training.get(f"{REWARD}_{end}") for end in ("first", "last"))
    if first is not None and last is not None:
        rows.append(("reward", f"{first:.3f} -> {last:.3f}, of all that arrived, first and last step{attempt}"))
    if parts := training.get("reward_parts"):
        rows.append(("parts", f"of the reward: {words(parts)}"))
    if sources := training.get("reward_means_by_source"):
        rows.append(("sources", f"reward: {words(sources)}"))
    return rows


def dropped_words(groups: Mapping[str, Any]) -> str:
    """Share of the finished groups that were dropped because their rewards were equal; "" for none."""
    dropped, kept = groups.get("dropped", 0), groups.get("consumed_groups", 0) + groups.get("waiting", 0)
    if not dropped:
        return ""
    share = dropped / (dropped + kept + groups.get("expired", 0))
    return f"{share:.0%} of the groups ({dropped:,}), for equal rewards: questions too easy or too hard for the model"


def summary_rows(summary: Mapping[str, Any]) -> list[tuple[str, str]]:
    """(name, words) rows of the summary table."""
    training, weights, parity, memory = (summary[key] for key in ("training", "weights", "parity", "memory"))
    phases = ", ".join(f"{name} {duration(seconds)}" for name, seconds in summary["phases_s"].items() if seconds >= 0.5)
    attempt = f" in attempt {summary['attempt']}" if summary["attempt"] > 1 else ""  # of a resumed run, this one's time
    facts = [("wall time", f"{duration(summary['wall_s'])}{attempt}{': ' if phases else ''}{phases}")]
    expected = summary.get("expected")
    if expected:
        steps = f", {expected['steps']} steps" if expected.get("steps") else ""
        facts.insert(0, ("expected", f"{expected['source']} ({expected['machine']}{steps})"))
    done = f"{summary['steps']} of {summary['steps_planned']}"
    if training["step_s_mean"] is not None:
        done += f", {summary['steps_this_attempt']}{attempt}" if attempt else ""
        done += f", {training['step_s_mean']:.2f} s each"
        done += " (the first included)"
        if training["wait_share"] is not None and not summary.get("bottleneck"):  # which says it without the first
            done += f", the trainer waited {training['wait_share']:.0%} of it"
    if summary["steps_planned"] is not None:
        facts.append(("steps", done))
    if found := summary.get("bottleneck"):
        facts.append(("bottleneck", bottleneck_words(found)))
    if busy := summary.get("slots_busy"):
        each = ", ".join(f"{name} {share:.0%}" for name, share in busy.items())
        facts.append(("slots busy", f"{each}, with rollouts, over time"))
    if prompts := summary.get("prompts"):
        facts.append(("prompts", "; ".join(f"{what} {how}" for what, how in prompts.items())))
    if words := dropped_words(summary.get("groups") or {}):
        facts.append(("dropped", words))
    if skipped := (summary.get("groups") or {}).get("skipped"):
        facts.append(("left out", left_out_words(skipped)))
    facts += reward_rows(training, attempt)
    if (losses := training.get("loss")) and not training.get(f"{REWARD}_first"):
        facts.append(("loss", f"{losses[0]:.4f} -> {losses[1]:.4f}, first and last step{attempt}"))
    if training["tokens"]:
        rate = f"{training['tokens_per_s'] or 0:,.0f} a second"
        facts.append(("tokens", f"{training['tokens']:,.0f} trained{attempt}, {rate}"))
    if weights["full_bytes"]:
        facts.append(("weights", weight_words(weights)))
        if weights.get("seconds_p50"):
            facts.append(("an update", update_words(weights)))
    if parity["mean_abs"] is not None:
        most = f", largest {parity['max_abs']:.1e}" if parity["max_abs"] is not None else ""
        facts.append(("parity", f"mean |trainer - engine| log-probability {parity['mean_abs']:.1e}{most}"))
    if memory.get("peak_bytes"):
        each = ", ".join(f"{name} {size(used)}" for name, used in sorted(memory["peak_bytes_by_process"].items()))
        what = (
            "sum of PSS"
            if memory["kind"] == "pss"
            else "sum of RSS: shared pages count more than once, PSS is unavailable"
        )
        facts.append(("peak memory", f"{size(memory['peak_bytes'])} ({what}): {each}"))
    if restarts := summary.get("restarts"):
        each = ", ".join(f"{name} {count}" for name, count in restarts.items())
        counted = "; the bottleneck counts the time that they took" if summary.get("bottleneck") else ""
        facts.append(("restarts", each + counted))
    if resumes := summary.get("resumes"):
        facts.append(("resumes", resume_words(resumes)))
    if source := summary.get("from"):
        facts.append(("from", origin_words(source)))
    facts += [("changed", changes.words(line)) for line in summary.get("changes", ())]
    if chosen := summary.get("best"):
        facts.append(("best", best_words(chosen, summary["paths"]["run"])))
    facts += [("note", words) for words in summary.get("notes", ())]
    facts += [(name, place) for name, place in summary["paths"].items()]
    return facts


def origin_words(source: Mapping[str, Any]) -> str:
    """The run whose weights a run started from, from its `from.json`."""
    moments = "with its optimizer state" if source["optimizer"] else "with a fresh optimizer"
    return f"{source['run']}, step {source['step']}, from its {source['kind']}, {moments}"


def best_words(found: Mapping[str, Any], run: str) -> str:
    """The checkpoint that `checkpoint.best` keeps: its step and score, and what it is the best of."""
    text = f"step {found['step']}, {found['benchmark']} avg@{found['n']} {found['avg_at_n']:.3f} ± "
    text += f"{found['stderr']:.3f}, the best of {found['among']} evaluated"
    start = found["start"]
    if start is not None and start["avg_at_n"] > found["avg_at_n"]:
        text += f"; the model that the run started from scored {start['avg_at_n']:.3f}"
    return f"{text}; `astra runs export {run} --best`"


def left_out_words(prompts: int) -> str:
    """Prompts that were skipped, and why."""
    limits = "data.max_prompt_tokens, rollout.context_length"
    return f"{prompts:,} times a prompt was left out: too long ({limits}), or all its episodes failed"


def resume_words(resumes: Sequence[Mapping[str, Any]]) -> str:
    """How often the run went on from a checkpoint by itself, where, what for, and what that cost."""
    each = [
        f"at step {found['at_step']} from step {found['from_step']} ({found['cause']}), "
        f"{duration(found['seconds'] or 0.0)} until it was there again"
        for found in resumes
    ]
    return f"{len(each)}: " + "; ".join(each)


def bottleneck_words(found: Mapping[str, Any]) -> str:
    """What limited the run, both rates, and what to change."""
    rates = [
        f"{name} {found[key]:,.0f}"
        for name, key in (
            ("generated", "generated_tokens_per_s"),
            ("trained while at work", "trained_tokens_per_working_s"),
        )
        if found[key]
    ]
    seen = found["words"] + (f" (without the first step; tokens/s: {', '.join(rates)})" if rates else "")
    return f"{seen}; try {found['change']}" if found["change"] else seen


def weight_words(weights: Mapping[str, Any]) -> str:
    words = [f"full {size(weights['full_bytes'])}"]
    if weights["delta_bytes_mean"]:
        what = "adapter" if weights["density_mean"] is None else "delta"
        words.append(f"mean {what} {size(weights['delta_bytes_mean'])} ({weights['ratio']:.1f}x smaller)")
    if weights["density_mean"] is not None:
        words.append(f"{weights['density_mean']:.1%} of the values change in a version")
    if weights.get("bytes_per_changed_p50"):
        words.append(f"{weights['bytes_per_changed_p50']:.2f} bytes per changed value")
    if weights["pause_s_p50"] is not None:
        words.append(f"median engine pause {weights['pause_s_p50'] * 1000:.0f} ms")
    if weights["resyncs"]:
        words.append(f"{weights['resyncs']:.0f} resyncs")
    return ", ".join(words)


def update_words(weights: Mapping[str, Any]) -> str:
    """Median milliseconds of each part of a weight update, and how long the trainer stood still for publishing."""
    parts = [f"{name} {1000 * seconds:.1f}" for name, seconds in weights["seconds_p50"].items()]
    waited = weights.get("publish_wait_s") or 0.0
    return f"median ms: {', '.join(parts)}" + (
        f"; the trainer waited {waited:.1f} s to publish" if waited > 0.05 else ""
    )
