"""Is the working tree quicker than another commit? Both train the tiny recipe on this machine, in turn.

    python bench/loop/beside_commit.py COMMIT [--rounds 3] [--only job loop] [--json]

    job     `astra train` of the tiny recipe as a user types it, from import to export
    loop    60 steps of 8 prompts x 8 completions of at most 24 tokens, one optimizer step each, no evaluation, no
            checkpoint: trained samples a second from the end of step 5 on

A figure is the median over `--rounds`, the ratio is that of the medians. CPU seconds are those of all processes of the
command: they hold on a machine that others load too. One thread a process.
"""

from __future__ import annotations

import json
import resource
import shutil
import statistics
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from shared import command, folder, options, say, show

from loop.same_as import Tree, checkout, working_tree

FIRST, STEPS, SAMPLES = 5, 60, 64
LOOP = [
    f"train.steps={STEPS}", "train.batch_groups=8", "train.minibatches=1", "train.learning_rate=2e-4",
    "train.schedule='constant'", "train.warmup_steps=0", "rollout.group_size=8", "rollout.max_new_tokens=24",
    "algorithm.drop_equal_groups=false", "eval.every=0", "checkpoint.every=100000",
]  # fmt: skip
PARTS: dict[str, list[str]] = {"job": [], "loop": LOOP}


def cpu_s() -> float:
    """CPU seconds of the children that have ended, and of theirs."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def once(tree: Tree, part: str) -> dict[str, float]:
    """One run of a part in this tree."""
    run = tree.folder / part
    shutil.rmtree(run, ignore_errors=True)
    began, used = time.monotonic(), cpu_s()
    code, _, complained = tree.run(*command("train", run, PARTS[part])[1:])
    if code:
        sys.exit(f"error: `{part}` of {tree.name} ended with {code}:\n{complained[-3000:]}")
    found = {"wall_s": time.monotonic() - began, "cpu_s": cpu_s() - used}
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    ends = {row["step"]: row["time"] for row in rows if "grad_norm" in row}
    if part == "loop":
        found["samples_per_s"] = SAMPLES * (STEPS - FIRST) / (ends[max(ends)] - ends[min(ends) + FIRST - 1])
    return found


def main() -> None:
    parser = options(__doc__, rounds=3, only=list(PARTS))
    parser.add_argument("commit", help="a commit of this repository")
    args = parser.parse_args()
    with folder() as place:
        trees = [
            Tree("new", working_tree(place / "new-tree"), place),
            Tree("old", checkout(args.commit, place / "old-tree"), place),
        ]
        found: dict[str, dict[str, list[dict[str, float]]]] = {part: {"new": [], "old": []} for part in args.only}
        for part in args.only:
            for _ in range(args.rounds):
                for tree in trees:
                    figures = once(tree, part)
                    found[part][tree.name].append(figures)
                    say(figures, part=part, tree=tree.name)
    rows: list[dict[str, Any]] = []
    for part, sides in found.items():
        for name in sides["new"][0]:
            new, old = (statistics.median(one[name] for one in sides[side]) for side in ("new", "old"))
            rows.append({"part": part, "figure": name, "new": new, "old": old, "new_to_old": new / old})
    show(args, {"commit": args.commit, "rounds": args.rounds, "medians": rows})


if __name__ == "__main__":
    main()
