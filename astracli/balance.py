"""What limited a run, generation or training, by how much, and what to change. Pure.

Two shares tell it. The trainer *waits* while it has no batch. An engine is *idle* while it has no prompt to work on:
the hub grants none, because what it would generate could become too stale. A trainer that waits w of its time could
train 1 / (1 - w) times as fast as the engines let it; engines that are idle i of theirs could generate 1 / (1 - i)
times as fast as the trainer lets them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from math import ceil
from typing import Any, Literal

from astracli.metrics import Record
from astracli.recipe import Recipe

LITTLE = 0.05
"""Waiting share of a trainer up to which a run counts as balanced."""
IDLE = 0.1
"""Idle share of the engines up to which it does; above it they wait for the trainer."""
BOTH = 0.25
"""Idle share above which engines whose trainer waits, too, are not what it waits for."""
FASTEST = 20.0
"""Largest factor that is told: shares near 1 are not that exact."""
MORE = 4
"""Largest multiple of what there is that is worth proposing."""
FIRST_STEPS = 1
"""Left out: the first batch is waited for while nothing else can be done."""

HELD = 0.5
"""Share of the engines' idle time, spent in evaluations, from which these are what the trainer waits for."""

Limit = Literal["generation", "training", "turns", "evaluation", "each other", "nothing"]


@dataclass(frozen=True)
class Seen:
    """What a run did, its first and last steps left out. Seconds."""

    step_s: float
    """Of all steps, waiting included."""
    wait_s: float
    """In which the trainer had no batch."""
    engine_s: float
    """Of all engines together; 0 = no engine has said anything."""
    idle_s: float
    trained_tokens: float
    generated_tokens: float
    held_s: float = 0.0
    """In which an evaluation held an engine at its version while steps were due."""


@dataclass(frozen=True)
class Setting:
    """What could be changed."""

    engines: int
    ranks: int
    gpus: bool
    slots: int
    """Requests that all engines decode at once."""
    allowed: int
    """Requests that admission lets be under way at once: (max_staleness + 1) batches."""
    staleness: int
    turns: bool
    shared: bool
    """Some GPU has an engine and a trainer."""


@dataclass(frozen=True)
class Balance:
    limit: Limit
    wait_share: float
    idle_share: float | None
    factor: float | None
    """How many times as fast the limiting side would have to be; None when none does."""
    generated_tokens_per_s: float | None
    trained_tokens_per_s: float | None
    """Of the trainer at work: without its waiting."""
    words: str
    change: str
    """What to try, "" when nothing is to be changed."""


def judge(seen: Seen, setting: Setting) -> Balance | None:
    """The balance of a run; None when no step was seen."""
    if seen.step_s <= 0:
        return None
    wait = min(1.0, seen.wait_s / seen.step_s)
    idle = min(1.0, seen.idle_s / seen.engine_s) if seen.engine_s > 0 else None
    working = seen.step_s - seen.wait_s
    generated = setting.engines * seen.generated_tokens / seen.engine_s if seen.engine_s > 0 else None
    trained = seen.trained_tokens / working if working > 0 else None
    held = seen.held_s >= HELD * seen.idle_s
    limit, factor = _limit(wait, idle, held, setting)
    words, change = _words(limit, factor, wait, idle, setting)
    return Balance(limit, wait, idle, factor, generated, trained, words, change)


def _limit(wait: float, idle: float | None, held: bool, setting: Setting) -> tuple[Limit, float | None]:
    if wait <= LITTLE:
        if idle is None or idle <= IDLE:
            return "nothing", None
        return "training", min(FASTEST, 1 / max(1e-3, 1 - idle))
    if setting.turns:
        return "turns", None
    if idle is not None and idle > BOTH:
        return "evaluation" if held else "each other", None
    return "generation", min(FASTEST, 1 / max(1e-3, 1 - wait))


def _words(limit: Limit, factor: float | None, wait: float, idle: float | None, setting: Setting) -> tuple[str, str]:
    """(what was seen, what to change)"""
    engines = "the engine" if setting.engines == 1 else f"the {setting.engines} engines"
    waited = f"the trainer waited {wait:.0%} of its time for batches"
    verb = "was" if setting.engines == 1 else "were"
    back = f"{engines} {verb} idle {idle:.0%} of the time" if idle is not None else ""
    if limit == "nothing":
        return f"balanced: {waited}" + (f", {back}" if back else ""), ""
    if limit == "turns":
        words = f"engine and trainer take turns on a GPU: {waited}, and {engines} stood still while it trained"
        return (
            words,
            "a GPU of its own for each (resources.share_gpus=false), or larger train.batch_groups: fewer turns",
        )
    if limit == "evaluation":
        one = "the engine" if setting.engines == 1 else "an engine"
        words = f"evaluations hold up both: {waited}, and {back}, most of it while one held {one} at its version"
        return words, "a larger eval.every, fewer eval.samples, or a higher eval.max_concurrency"
    if limit == "each other":
        words = f"neither is too slow: {waited}, and {back}"
        if setting.staleness == 0:
            return words, "train.max_staleness over 0 lets them work at the same time"
        return words, "a higher train.max_staleness, or shorter answers: batches wait for their last groups"
    assert factor is not None
    if limit == "training":
        words = f"training limits: {back}, {waited}; it is {factor:.1f}x too slow for {engines}"
        return words, _faster_training(setting, factor)
    words = f"generation limits: {waited}; {engines} {'is' if setting.engines == 1 else 'are'} {factor:.1f}x too slow"
    return words, _faster_generation(setting, factor)


def _faster_generation(setting: Setting, factor: float) -> str:
    ways = _more("resources.rollout_gpus" if setting.gpus else "resources.engines", setting.engines, factor, setting)
    if setting.allowed < setting.slots:
        ways.append(
            f"a larger train.batch_groups or train.max_staleness: {setting.allowed} requests may be under way, the "
            f"engines have room for {setting.slots}"
        )
    else:
        ways.append("a higher rollout.max_running_requests, if memory allows")
    return ", or ".join(ways)


def _faster_training(setting: Setting, factor: float) -> str:
    ways = _more("resources.train_gpus" if setting.gpus else "resources.train_ranks", setting.ranks, factor, setting)
    if setting.engines > 1:
        fewer = max(1, round(setting.engines / factor))
        ways.append(f"{fewer} engine{'' if fewer == 1 else 's'} instead of {setting.engines}")
    ways.append("a larger train.tokens_per_microbatch or fewer train.minibatches")
    return ", or ".join(ways)


def _more(key: str, there: int, factor: float, setting: Setting) -> list[str]:
    """`factor` times as many of what there is, where that is worth proposing. On shared GPUs within those of the other
    side, which are there; beyond them a GPU for each, as an engine reserves no more than a trainer leaves anywhere."""
    wanted = ceil(there * factor - 0.1)
    worth = there < wanted <= MORE * there
    if not setting.gpus:
        return [f"{key}={wanted} where there are cores for them"] if worth else []
    if not setting.shared or (worth and wanted <= max(setting.engines, setting.ranks)):
        return [f"{key}={wanted}"] if worth else []
    gpus = setting.engines + setting.ranks + (wanted - there if worth else 0)
    change = f" and {key}={wanted}" if worth else ""
    return [f"resources.share_gpus=false{change}, which takes {gpus} GPUs"]


def of_run(
    records: Sequence[Record], recipe: Recipe, plan: Mapping[str, Any], first_step: int
) -> dict[str, Any] | None:
    """The balance as summary.json holds it. `plan`: plan.json's document; `first_step`: of this attempt.

    At its end a run asks for nothing more: what the last step trains on was admitted `max_staleness` versions before.
    Engines that are idle from there on wait for nobody.
    """
    seen = _seen(records, first_step + FIRST_STEPS, recipe.train.steps - recipe.effective_staleness)
    found = judge(seen, _setting(recipe, plan))
    return asdict(found) if found is not None else None


def _seen(records: Sequence[Record], first: int, end: int) -> Seen:
    """Of the steps from `first` on and before `end`."""
    steps = [r for r in records if r.get("process") == "trainer" and "step_s" in r and first <= r.get("step", 0) < end]
    # an update to version v is told by an engine that generated with v - 1
    told = [r for r in records if "idle_s" in r and first < r.get("step", 0) <= end]
    return Seen(
        step_s=sum(r["step_s"] for r in steps),
        wait_s=sum(r.get("wait_s", 0.0) for r in steps),
        engine_s=sum(r["interval_s"] for r in told),
        idle_s=sum(r["idle_s"] for r in told),
        trained_tokens=sum(r.get("tokens", 0.0) for r in steps),
        generated_tokens=sum(r["rollout_tokens_per_s"] * r["interval_s"] for r in told),
        held_s=_held(records, steps),
    )


def _held(records: Sequence[Record], steps: Sequence[Record]) -> float:
    """Seconds of these steps in which an evaluation ran."""
    if not steps:
        return 0.0
    first, last = min(r["time"] - r["step_s"] for r in steps), max(r["time"] for r in steps)
    spans: dict[int, tuple[float, float]] = {}  # the benchmarks of a version go together
    for r in records:
        if r.get("process") == "eval" and "eval_wall_s" in r:
            begin, end = spans.get(r["version"], (r["time"], r["time"]))
            spans[r["version"]] = (min(begin, r["time"] - r["eval_wall_s"]), max(end, r["time"]))
    return sum(max(0.0, min(end, last) - max(begin, first)) for begin, end in spans.values())


def _setting(recipe: Recipe, plan: Mapping[str, Any]) -> Setting:
    processes = plan["processes"]
    engines = sum(process["role"] == "engine" for process in processes)
    return Setting(
        engines=max(1, engines),
        ranks=max(1, sum(process["role"] == "trainer" for process in processes)),
        gpus=any(process["gpus"] for process in processes),
        slots=max(1, engines) * plan["running_requests"],
        allowed=(recipe.effective_staleness + 1) * recipe.batch_sequences,
        staleness=recipe.effective_staleness,
        turns=bool(plan["placement"]["turns"]),
        shared=bool(plan["placement"]["shared"]),
    )
