"""Some of a step's samples as JSONL, for people: what was asked, what was said, what it was worth."""

from __future__ import annotations

import json
import os
import random
from pathlib import Path
from typing import Any

from astracli.rl.batch import Batch, Row


def write_samples(directory: Path, batch: Batch, step: int, seed: int, count: int) -> Path | None:
    """`count` samples of the batch, drawn by (seed, step), into step_000012.jsonl; written whole or not at all."""
    if count == 0:
        return None
    directory.mkdir(parents=True, exist_ok=True)
    chosen = random.Random(f"samples:{seed}:{step}").sample(batch.rows, min(count, len(batch.rows)))
    path = directory / f"step_{step:06d}.jsonl"
    working = path.with_suffix(".tmp")
    lines = [json.dumps(document(row, step), ensure_ascii=False) for row in sorted(chosen, key=lambda r: r.index)]
    working.write_text("\n".join(lines) + "\n", encoding="utf-8")
    os.replace(working, path)
    return path


def document(row: Row, step: int) -> dict[str, Any]:
    """One line. `version` is the oldest that a token of the sample was drawn under."""
    return {
        "step": step,
        "version": int(row.versions.min()),
        "problem_id": row.group.problem_id,
        "problem": row.group.problem,
        "answer": row.group.answer,
        "completion": row.sample.text,
        "tokens": [int(t) for t in row.sample.tokens],
        "logprobs": [round(float(p), 6) for p in row.logprobs],
        "advantage": round(row.advantage, 6),
        "reward": row.sample.reward,
        "verdict": row.sample.verdict,
        "finish_reason": row.sample.finish_reason,
    }
