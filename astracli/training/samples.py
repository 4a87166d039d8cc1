"""Some of a step's samples as JSONL, for people: prompt, completion, reward and advantage."""

from __future__ import annotations

import json
import random
from pathlib import Path

from astracli.rl.batch import Batch
from astracli.rl.sample_log import group_line
from astracli.runs.run_dir import write_atomic


def write_samples(directory: Path, batch: Batch, step: int, seed: int, count: int) -> None:
    """`count` samples of the batch, drawn by (seed, step), into step_000012.jsonl; written whole or not at all."""
    if count == 0:
        return
    chosen = random.Random(f"samples:{seed}:{step}").sample(batch.rows, min(count, len(batch.rows)))
    lines = [
        json.dumps(group_line(row.group, row.sample, step=step, advantage=row.advantage), ensure_ascii=False)
        for row in sorted(chosen, key=lambda r: r.index)
    ]
    write_atomic(directory / f"step_{step:06d}.jsonl", "\n".join(lines) + "\n")
