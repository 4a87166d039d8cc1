"""Samples files, whose lines are the same for rollout, training and evaluation (schema: docs/run-directory.md)."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from astracli.process.atomic import write_atomic
from astracli.rl.batch import Batch
from astracli.rl.types import Group, Sample, Verdict


def sample_line(
    *,
    step: int | None,
    version: int | None,
    problem_id: str,
    problem: str,
    answer: str,
    sample: int,
    completion: str,
    tokens: np.ndarray,
    logprobs: np.ndarray,
    advantage: float | None,
    reward: float,
    verdict: Verdict,
    finish_reason: str,
    benchmark: str | None = None,
    loss_mask: np.ndarray | None = None,
    parts: Mapping[str, float] | None = None,
    notes: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """The line as a JSON object; `benchmark` is there for evaluations only, `parts` and `notes` where a score has any.

    `tokens`: [T]; `logprobs`: [N], of the drawn ones. Where not all are drawn, the line has a `loss_mask`, and null as
    the log-probability of the others.
    """
    known: list[float | None] = [round(float(p), 6) for p in logprobs]
    masked = loss_mask is not None and not loss_mask.all()
    if loss_mask is not None and masked:
        each = iter(known)
        known = [next(each) if drawn else None for drawn in loss_mask]
    return {
        "step": step,
        "version": version,
        **({} if benchmark is None else {"benchmark": benchmark}),
        "problem_id": problem_id,
        "problem": problem,
        "answer": answer,
        "sample": sample,
        "completion": completion,
        "tokens": [int(t) for t in tokens],
        "logprobs": known,
        **({"loss_mask": [int(drawn) for drawn in loss_mask]} if loss_mask is not None and masked else {}),
        "advantage": None if advantage is None else round(advantage, 6),
        "reward": reward,
        **({"parts": dict(parts)} if parts else {}),
        **({"notes": dict(notes)} if notes else {}),
        "verdict": verdict,
        "finish_reason": finish_reason,
    }


def group_line(
    group: Group, sample: Sample, *, step: int | None = None, advantage: float | None = None
) -> dict[str, Any]:
    """A group's sample. `version`: of the sample's oldest drawn token, None without any. With several training sources
    the line names its problem's as `source`."""
    line = sample_line(
        step=step,
        version=sample.oldest_version,
        problem_id=group.problem_id,
        problem=group.problem,
        answer=group.answer,
        sample=sample.index,
        completion=sample.text,
        tokens=sample.tokens,
        logprobs=sample.logprobs,
        advantage=advantage,
        reward=sample.reward,
        verdict=sample.verdict,
        finish_reason=sample.finish_reason,
        loss_mask=sample.loss_mask,
        parts=sample.parts,
        notes=sample.notes,
    )
    return line | ({"source": group.meta["source"]} if "source" in group.meta else {})


def write_samples(directory: Path, batch: Batch, step: int, seed: int, count: int) -> None:
    """`count` samples of the batch, drawn by (seed, step), into step_000012.jsonl; written whole or not at all."""
    if count == 0:
        return
    chosen = random.Random(f"samples:{seed}:{step}").sample(batch.rows, min(count, len(batch.rows)))
    lines = [
        json.dumps(group_line(row.group, row.sample, step=step, advantage=row.advantage), ensure_ascii=False)
        for row in sorted(chosen, key=lambda row: row.index)
    ]
    write_atomic(directory / f"step_{step:06d}.jsonl", "\n".join(lines) + "\n")
