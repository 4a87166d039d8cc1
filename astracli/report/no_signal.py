"""Why a run has no signal any more: what was seen, the cause that it points to, and what to do. Pure.

The causes are tried in an order in which one hides the next: rewards that fail say nothing about the model; weights
that an update destroyed draw tokens until they are cut off; a gold that cannot be read makes every answer wrong.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from astracli.config.recipe import Recipe
from astracli.config.recipe_data import DataTable, sets
from astracli.hub.types import NoSignal
from astracli.runs.metrics import series

MOST = 0.5
"""Share of the samples, or of the golds, from which on something is the cause."""
NEARLY_ALL = 0.8
"""Share cut off, or without an answer, from which on that is the cause."""
LOST = 0.25
"""A mean reward under this part of the first steps' was lost in training."""
FIRST_STEPS = 3
USUAL_RATE = 1e-4
"""The largest learning rate that a hint proposes."""
ROOM = 4
"""Times as many tokens that the hint gives answers which are cut off."""


@dataclass(frozen=True)
class Golds:
    """The right answers of some of the dropped prompts."""

    looked: int = 0
    unreadable: int = 0
    example: str = ""


@dataclass(frozen=True)
class Trained:
    """A figure of the trainer at its first and its last step."""

    name: str
    first: float
    last: float
    largest: float


def explain(
    seen: NoSignal,
    recipe: Recipe,
    records: Sequence[dict[str, Any]],
    golds: Golds,
    logs: str,
    examples: Sequence[tuple[str, str, str]] = (),
) -> tuple[str, str]:
    """(message, hint). `records`: metrics.jsonl; `logs`: where the rollout worker's log lies; `examples`: problem,
    right answer and completion of dropped samples."""
    cause, hint = _cause(seen, recipe, golds, logs)
    trained = figures(records)
    head = f"no signal: {seen.groups} groups in a row ({seen.batches} batches' worth) were dropped, {_earned(seen)}"
    lines = [f"{head}: {cause}", *evidence(seen, trained, recipe.train.learning_rate)]
    if golds.unreadable:
        lines.append(
            f"{golds.unreadable} of {golds.looked} golds cannot be read by reward {_rewards(recipe)}, for example "
            f"`{_short(golds.example)}`"
        )
    for problem, answer, completion in examples:
        said = f"`{_short(completion)}`" if completion.strip() else "nothing"
        lines.append(f"for example: problem `{_short(problem)}`, answer `{_short(answer)}`, completion {said}")
    return "\n  ".join(lines), f"{hint}; rollout.max_dropped_batches says how long to go on"


def figures(records: Sequence[dict[str, Any]]) -> list[Trained]:
    """Entropy and gradient norm at the first and the last trained step; [] before there is one."""
    found = []
    for name in ("entropy", "grad_norm"):
        if points := series(records, name, "trainer"):
            every = [value for _, value in points]
            found.append(Trained(name, every[0], every[-1], max(every)))
    return found


def evidence(seen: NoSignal, trained: Sequence[Trained], learning_rate: float) -> list[str]:
    """Lines of what was seen."""
    steps = [f"step {step} {mean:.3g}" for step, mean in seen.rewards]
    now = f"since then {_mean(seen)}" if steps else f"{_mean(seen)}, no step was trained"
    lines = [f"reward, all that arrived: {', '.join([*steps, now])}"]
    shares = (
        ("cut off at the token limit", seen.truncated),
        ("without an answer", seen.no_answer),
        ("in error", seen.errors),
        ("out of time", seen.timeouts),
    )
    each = ", ".join(f"{_share(count, seen.samples):.0%} {words}" for words, count in shares)
    lines.append(f"of these {seen.samples} samples: {each}")
    words = {
        "entropy": "entropy {0.first:.3g} -> {0.last:.3g} nats",
        "grad_norm": "gradient norm {0.first:.3g} -> {0.last:.3g} (largest {0.largest:.3g})",
    }
    told = [words[each.name].format(each) for each in trained]
    return [*lines, ", ".join([*told, f"learning rate {learning_rate:g}"])]


def _cause(seen: NoSignal, recipe: Recipe, golds: Golds, logs: str) -> tuple[str, str]:
    errors, timeouts = _share(seen.errors, seen.samples), _share(seen.timeouts, seen.samples)
    data, rollout = recipe.data, recipe.rollout
    if errors + timeouts >= MOST and errors >= timeouts:
        return f"grading failed for {errors:.0%} of the samples", f"see what data.reward raises, in {logs}, and mend it"
    if errors + timeouts >= MOST:
        seconds = data.reward_timeout_s
        return (
            f"grading took longer than {seconds:g} s for {timeouts:.0%} of the samples",
            f"make the reward faster, or give it more time: `--set data.reward_timeout_s={4 * seconds:g}`",
        )
    if seen.lowest > 0:
        return "the model has learned these problems", "take harder problems"
    early = [mean for _, mean in seen.rewards[:FIRST_STEPS]]
    if early and max(early) > 0 and seen.highest < LOST * max(early):
        rate = recipe.train.learning_rate
        lower = min(rate / 10, USUAL_RATE)
        return (
            f"the reward was {max(early):.3g} and training has destroyed it",
            f"lower train.learning_rate ({rate:g}) in a new run, for example `--set train.learning_rate={lower:g}`",
        )
    if seen.highest <= 0:
        return _nothing(seen, recipe, golds)
    sometimes = f"take problems that are solved sometimes{_finer(rollout.group_size)}"
    return "the reward does not tell the answers to a problem apart", sometimes


def _nothing(seen: NoSignal, recipe: Recipe, golds: Golds) -> tuple[str, str]:
    """Every sample earned nothing, and always did."""
    rollout = recipe.rollout
    if golds.looked and golds.unreadable >= MOST * golds.looked:
        return (
            f"reward {_rewards(recipe)} cannot read the golds of these problems",
            "name the column that holds the bare answer with data.answer_field, or take a reward that knows its form",
        )
    if _share(seen.truncated, seen.samples) >= NEARLY_ALL:
        now, context = rollout.max_new_tokens, rollout.context_length
        room = f"`--set rollout.max_new_tokens={ROOM * now}`"
        if ROOM * now >= context:
            room = f"a larger rollout.context_length ({context}) and rollout.max_new_tokens, or shorter prompts"
        return f"answers are cut off at {now} tokens", f"give them room: {room}"
    if _share(seen.no_answer, seen.samples) >= NEARLY_ALL:
        return (
            f"reward {_rewards(recipe)} finds no answer in them",
            "ask for the form that the reward reads, in data.template (`\\boxed{}` for math_boxed); "
            "`astra runs samples` prints what was generated",
        )
    return (
        "the problems are too hard for this model, or the reward does not take its answers",
        f"look at `astra runs samples`{_finer(rollout.group_size)}, or take easier problems; "
        "`data.reward = probe` tries the machinery out on any weights",
    )


def rewards_of(data: DataTable) -> list[str]:
    """What grades a training source, the first reward first."""
    return [entry.reward for entry in data.rewards] or [data.reward]


def _rewards(recipe: Recipe) -> str:
    names = {name for table in sets(recipe.data).values() for name in rewards_of(table)}
    return " and ".join(f"`{name}`" for name in sorted(names))


def _finer(group_size: int) -> str:
    return f", or draw more samples a prompt than rollout.group_size = {group_size}"


def _earned(seen: NoSignal) -> str:
    if seen.highest <= 0:
        return "every sample earned nothing" if seen.lowest == 0 else "no sample earned more than 0"
    return "every sample was rewarded" if seen.lowest > 0 else "all samples of a group earned the same"


def _mean(seen: NoSignal) -> str:
    return f"{seen.lowest:.3g}" if seen.lowest == seen.highest else f"{seen.lowest:.3g} to {seen.highest:.3g}"


def _share(count: int, samples: int) -> float:
    return count / samples if samples else 0.0


def _short(text: str, length: int = 60) -> str:
    plain = " ".join(text.split())
    return plain if len(plain) <= length else f"{plain[: length - 3]}..."
