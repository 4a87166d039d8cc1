"""Figures of one evaluation (`eval/results.json`) as aligned text."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

UNGRADED = {
    "prompts_too_long": "their prompt leaves no room in rollout.context_length",
    "timeouts": "grading took longer than data.reward_timeout_s",
    "errors": "grading failed",
}
"""Counts of an evaluation that are no verdicts about the model."""


def result_lines(document: Mapping[str, Any], width: int | None = None) -> list[str]:
    """A table, then by k, then what was not graded. Where the table is wider than `width` columns, a benchmark a
    paragraph."""
    greedy = document.get("greedy") or {}
    rows = [
        ("benchmark", "grader", "items", "avg@n", "95 %", "pass@k", "majority", "greedy", "tokens", "cut", "no answer")
    ]
    by_k, lost = [], []
    for name, found in document["results"].items():
        if name == "overall" and len(document["results"]) == 2:
            continue
        average = f"avg@{found['n']} {found['avg_at_n']:.3f}"
        if found["items"] > 1:  # one item has no spread over items
            average += f" ± {found['stderr']:.3f}"
        interval = f"{found['ci95_low']:.3f}-{found['ci95_high']:.3f}" if "ci95_low" in found else ""
        best = f"{greedy[name]['avg_at_n']:.3f}" if name in greedy else ""
        votes = found.get("majority_at") or {}
        majority = f"maj@{found['n']} {votes[str(found['n'])]:.3f}" if votes else ""
        passed = f"pass@{found['k']} {found['pass_at_k']:.3f}"
        shape = [f"{found['response_tokens_mean']:.1f}"] if "response_tokens_mean" in found else [""]
        shape += [f"{found[key]:.1%}" if key in found else "" for key in ("truncated_fraction", "no_answer_fraction")]
        rows.append(
            (name, found.get("grader", ""), str(found["items"]), average, interval, passed, majority, best, *shape)
        )
        for title, values in (("pass", found.get("pass_at") or {}), ("majority", votes)):
            if len(values) > 1:
                by_k.append(f"{name} {title}@k: " + ", ".join(f"{k} {share:.3f}" for k, share in values.items()))
        lost += [
            f"{name}: {found[key]} samples count as wrong: {why}" for key, why in UNGRADED.items() if found.get(key)
        ]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    table = ["  ".join(cell.ljust(room) for cell, room in zip(row, widths, strict=True)).rstrip() for row in rows]
    if width is None or max(map(len, table)) <= width:
        return table + by_k + lost
    head, *each = rows
    found_lines = [_paragraph(head, row) for row in each]
    return [line for text in [*found_lines, *by_k, *lost] for line in _filled(text, width)]


def _paragraph(head: Sequence[str], row: Sequence[str]) -> str:
    """A row of the table in words: a figure that does not say its own name gets its heading."""
    name, grader, *cells = row
    named = {"items", "95 %", "greedy", "tokens", "cut", "no answer"}
    figures = [
        f"{title} {cell}" if title in named else cell for title, cell in zip(head[2:], cells, strict=True) if cell
    ]
    return f"{name}{f' ({grader})' if grader else ''}: {', '.join(figures)}"


def _filled(text: str, width: int) -> list[str]:
    return textwrap.wrap(text, width, subsequent_indent="  ", break_on_hyphens=False, break_long_words=False)
