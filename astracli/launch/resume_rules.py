"""Which keys of a recipe may change when a run is resumed, and why the others may not: decided here alone.

A resumed run goes on from stored state: masters and moments in the checkpoint, groups and batches in the hub, a place
in the order of the problems. A key may change when that state keeps its meaning. Where it does not, the way is a new
run from the weights of the old one (`astra train --from RUN`), or from the beginning.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from pathlib import Path

from astracli.config import doors, recipe_clusters

OF_THE_MODEL = ("model.path", "model.revision", "model.adapter")
MODEL = "the checkpoint holds the weights of the run's own model"
PLACE = "the run goes on at its place in the order of its problems"
GRADED = "groups that are generated already were asked and graded with it, and keep their reward"
KEY = re.compile(r"(?<![\w./-])[a-z]\w*(?:\.[a-z]\w*)+(?![\w/-]|\.\w)")
"""What may be a recipe's key in a text: `train.steps`, and no file name or address."""
MAY_NOT: dict[str, str] = {
    "seed": "order of the problems and all draws follow from it",
    **dict.fromkeys(OF_THE_MODEL, MODEL),
    "model.": GRADED,
    "data.": GRADED,
    **dict.fromkeys(
        (
            "data.source", "data.mix", "data.holdout", "data.config", "data.split", "data.revision", "data.levels",
            "data.question_field", "data.answer_field", "data.curriculum.", "data.decontaminate",
        ),
        PLACE,
    ),
    "rollout.env": "groups that are generated already were made by the run's own environment",
    "env.": "groups that are generated already were made by the run's own environment",
    "rollout.engine": "groups that are generated already hold the log-probabilities of the run's own engine",
    "rollout.group_size": "groups that are generated already have the run's own size",
    "rollout.temperature": "groups that are generated already were drawn with it; the trainer divides by it",
    "rollout.stop": "groups that are generated already were drawn with it",
    "rollout.top_p": "groups that are generated already were drawn with it",
    "train.batch_groups": "batches that the hub has fixed already have the run's own size",
    "train.betas": "the moments in the checkpoint were made with them",
    "train.row_boundaries": "an ablation is a run of its own",
    "lora": "the checkpoint holds either all weights or adapters",
    "lora.": "the checkpoint holds adapters of this shape, and their moments",
    "sft": "a run is either one of supervised training or of reinforcement learning",
    "sft.": "the run would be trained on other examples, or another loss",
    "algorithm.": "the run would be trained on two objectives, and its figures before and after would not compare",
    "launch.deterministic": "the run began in the other mode: its bytes would be those of neither",
}  # fmt: skip
"""Key, or table with a dot at its end -> why it stays as it is. The longest that fits decides."""
MAY: frozenset[str] = frozenset(
    {
        "description", "expected.",
        "model.made_by",
        "data.path", "data.max_prompt_tokens", "data.reward_timeout_s", "data.reward_workers", "data.reward_start_s",
        "data.reward_concurrency", "data.reward_memory_gib", "data.max_reward_errors", "data.code.memory_gib",
        "data.code.file_mb", "data.code.processes",
        "rollout.max_new_tokens", "rollout.context_length", "rollout.max_running_requests", "rollout.running_ceiling.",
        "rollout.max_dropped_batches", "rollout.env_timeout_s", "rollout.refill_requests", "rollout.prefix_cache",
        "env.tool_timeout_s", "env.tool_memory_gib", "env.tool_processes", "env.tool_concurrency",
        "train.", "weights.", "eval.", "checkpoint.", "resources.", "launch.", "metrics.",
    }
)  # fmt: skip
"""Keys and tables that may change: how long, how fast, where and how the run goes on, its limits, and what it says."""
OTHER = "it decides what the run learns from"


def refusal(key: str) -> str | None:
    """Why a dotted key may not change on a resume; None when it may."""
    brought = [f"rollout.{name}." for name in doors.names("astra.engines")]
    brought += [f"{name}." for name in doors.names(recipe_clusters.GROUP)]
    found = _longest(key, {*MAY, *MAY_NOT, *brought})
    return MAY_NOT.get(found) if found is not None else OTHER


def _longest(key: str, entries: Collection[str]) -> str | None:
    """The most special entry that stands for a key: itself, or a table that it is in."""
    fits = [entry for entry in entries if key == entry.rstrip(".") or (entry.endswith(".") and key.startswith(entry))]
    return max(fits, key=len, default=None)


def asks_anew(changes: Collection[str]) -> bool:
    """Whether answers of an evaluation that has not ended were drawn under other settings than these changed keys."""
    drawn = {"rollout.max_new_tokens", "rollout.context_length"}
    how = {"eval.every", "eval.max_concurrency", "eval.pass_k", "eval.slot_share"}
    return any(key in drawn or (key.startswith("eval.") and key not in how) for key in changes)


def by_from(key: str) -> bool:
    """Whether a new run that starts from the weights of this one (`--from`) may have another value."""
    return key not in OF_THE_MODEL


def keys_in(text: str) -> list[str]:
    """The recipe's keys that a text names, in its order."""
    from astracli.config.schema import at

    slots = {key: at(key.split(".")) for key in KEY.findall(text)}
    return [key for key, slot in slots.items() if slot is not None and slot.table is None]


def completed(hint: str | None, said: str, run: Path, *, weights: bool) -> str | None:
    """The hint of a run that failed, so that it recommends nothing which a resume then refuses: where it, or a hint
    inside the message `said`, names keys that may not change, the command that starts a new run with another value.
    `weights`: the run has a checkpoint that the new run can start from."""
    inner = [line for line in said.splitlines() if line.strip().startswith("hint: ")]
    named = [key for text in (*inner, hint or "") for key in keys_in(text)]
    fixed = [key for key in dict.fromkeys(named) if refusal(key) is not None]
    if not fixed:
        return hint
    begin = f"--from {run}" if weights and all(map(by_from, fixed)) else f"--recipe {run / 'recipe.json'}"
    sets = " ".join(f"--set {key}=..." for key in fixed)
    keys = " and ".join(f"`{key}`" for key in fixed)
    way = f"another value of {keys} takes a new run, --resume refuses it: `astra train {begin} {sets}`"
    return f"{hint}; {way}" if hint else way
