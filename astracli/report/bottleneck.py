"""What limited a run: generation, training or evaluation, by how much, and what to change. Pure.

Shares tell it. The trainer *waits* while it has no batch. An engine is *idle* while it has no prompt to work on: the
hub grants none, because what it would generate could become too stale. It is *held* while it has none because an
evaluation keeps it at an older version. A trainer that waits w of its time could train 1 / (1 - w) times as fast as the
engines let it; engines that are idle i of theirs could generate 1 / (1 - i) times as fast as the trainer lets them.
Engines that spend e of their time on evaluations would make 1 / (1 - e) times as many rollouts without. Seconds of
engines are summed over engines and divided by the summed time of all: a share is that of the average engine.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from math import ceil
from typing import Any, Literal

from astracli.config.recipe import Recipe
from astracli.process.config import Role
from astracli.runs.metrics import Record

LITTLE = 0.05
"""Waiting share of a trainer up to which a run counts as balanced."""
IDLE = 0.1
"""Idle share of the engines up to which it does; above it they wait for the trainer."""
BOTH = 0.25
"""Idle share above which engines whose trainer waits, too, are not what it waits for."""
FASTEST = 20.0
"""Largest factor that is told: shares near 1 are not that exact."""
DROPPED = 0.25
"""Share of dropped groups from which they are told of before engines that are too slow."""
MORE = 4
"""Largest multiple of what there is that is worth proposing."""
FIRST_STEPS = 1
"""Left out: the first batch is waited for while nothing else can be done."""

EVALUATING = 0.5
"""Evaluations limit when without them so much of the trainer's wait would go, or of the engines' idle time."""

Limit = Literal["generation", "training", "time_sharing", "evaluation", "each other", "nothing"]


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
    """Of all engines together, those that `held_s` counts left out."""
    trained_tokens: float
    generated_tokens: float
    """Of rollouts."""
    held_s: float = 0.0
    """Of all engines together: without a prompt because an evaluation held the engine at its version."""
    evaluated_tokens: float = 0.0
    """Generated for evaluations while these steps were due."""
    groups: float = 0.0
    """That arrived for these steps."""
    dropped: float = 0.0
    """Of them, those whose rewards were equal: nothing to learn from."""


@dataclass(frozen=True)
class RunLayout:
    """What could be changed."""

    engines: int
    ranks: int
    gpus: bool
    slots: int
    """Requests that all engines decode at once."""
    allowed: int
    """Requests that admission lets be under way at once: (max_staleness + 1) batches."""
    staleness: int
    concurrency: int
    """Evaluation requests that each engine gets at once."""
    time_sharing: bool
    shared: bool
    """Some GPU has an engine and a trainer."""


@dataclass(frozen=True)
class Bottleneck:
    limit: Limit
    wait_share: float
    idle_share: float | None
    """Of an engine's time, without a prompt and not held."""
    held_share: float | None
    evaluation_share: float | None
    """Of an engine's time: what evaluations took of it."""
    dropped_share: float | None
    """Of the groups that were generated, those dropped for equal rewards."""
    factor: float | None
    """How many times as fast the limiting side would have to be; None when neither side limits."""
    generated_tokens_per_s: float | None
    trained_tokens_per_working_s: float | None
    """Of the trainer at work: without its waiting."""
    words: str
    change: str
    """What to try, "" when nothing is to be changed."""


def judge(seen: Seen, setting: RunLayout) -> Bottleneck | None:
    """The bottleneck of a run; None when no step was seen."""
    if seen.step_s <= 0:
        return None
    wait = min(1.0, seen.wait_s / seen.step_s)
    working = seen.step_s - seen.wait_s
    trained = seen.trained_tokens / working if working > 0 else None
    idle = held = evaluation = generated = None
    if seen.engine_s > 0:
        idle, held = (min(1.0, seconds / seen.engine_s) for seconds in (seen.idle_s, seen.held_s))
        made = seen.evaluated_tokens + seen.generated_tokens
        evaluation = max(held, (1 - idle) * seen.evaluated_tokens / made if made else 0.0)
        generated = setting.engines * seen.generated_tokens / seen.engine_s
    limit, factor = _limit(wait, idle or 0.0, held or 0.0, evaluation or 0.0, setting)
    dropped = seen.dropped / seen.groups if seen.groups else None
    shares = Bottleneck(limit, wait, idle, held, evaluation, dropped, factor, generated, trained, "", "")
    words, change = _words(shares, setting)
    return replace(shares, words=words, change=change)


def _limit(wait: float, idle: float, held: float, evaluation: float, setting: RunLayout) -> tuple[Limit, float | None]:
    if wait <= LITTLE:
        return ("training", min(FASTEST, 1 / max(1e-3, 1 - idle))) if idle > IDLE else ("nothing", None)
    if setting.time_sharing:
        return "time_sharing", None
    if idle + held > BOTH:
        return ("evaluation" if held >= EVALUATING * (idle + held) else "each other"), None
    if evaluation >= EVALUATING * wait:
        return "evaluation", None
    return "generation", min(FASTEST, 1 / max(1e-3, 1 - wait))


def _words(seen: Bottleneck, setting: RunLayout) -> tuple[str, str]:
    """(what was seen, what to change)"""
    engines = "the engine" if setting.engines == 1 else f"the {setting.engines} engines"
    waited = f"the trainer waited {seen.wait_share:.0%} of its time for batches"
    verb = "was" if setting.engines == 1 else "were"
    back = f"{engines} {verb} idle {seen.idle_share:.0%} of the time" if seen.idle_share is not None else ""
    if seen.limit == "nothing":
        return f"balanced: {waited}" + (f", {back}" if back else ""), ""
    if seen.limit == "time_sharing":
        words = f"engine and trainer share a GPU in time: {waited}, and {engines} stood still while it trained"
        return (
            words,
            "a GPU of its own for each (resources.share_gpus=false), or fewer switches: a larger train.batch_groups in "
            "a new run",
        )
    if seen.limit == "evaluation":
        held = f", and held them without rollouts {seen.held_share:.0%}" if seen.held_share else ""
        took = f"evaluations took {seen.evaluation_share:.0%} of the time of {engines}{held}"
        change = "a larger eval.every, or fewer eval.samples"
        if setting.concurrency < (each := setting.slots // setting.engines):
            change += f", or eval.max_concurrency=auto: an engine runs {each} requests at once"
        return f"evaluations limit: {waited}; {took}", change
    if seen.limit == "each other":
        words = f"neither is too slow: {waited}, and {back}"
        if setting.staleness == 0:
            return words, "train.max_staleness over 0 lets them work at the same time"
        return words, "a higher train.max_staleness, or shorter answers: batches wait for their last groups"
    factor = seen.factor
    assert factor is not None
    if seen.limit == "training":
        words = f"training limits: {back}, {waited}; it is {factor:.1f}x too slow for {engines}"
        return words, _faster_training(setting, factor)
    slow = f"{engines} {'is' if setting.engines == 1 else 'are'} {factor:.1f}x too slow"
    if (seen.dropped_share or 0.0) < DROPPED:
        return f"generation limits: {waited}; {slow}", _faster_generation(setting, factor)
    words = (
        f"generation limits: {waited}; {seen.dropped_share:.0%} of the groups were dropped, as all their answers "
        f"earned the same; with those {slow}"
    )
    nearer = "in a new run questions nearer to what the model can do (easier or harder ones, or a [data.curriculum])"
    return words, f"{nearer}, or {_faster_generation(setting, factor)}"


def _faster_generation(setting: RunLayout, factor: float) -> str:
    ways = _more("resources.rollout_gpus" if setting.gpus else "resources.engines", setting.engines, factor, setting)
    if setting.allowed < setting.slots:
        ways.append(
            f"a larger train.max_staleness, or train.batch_groups in a new run: {setting.allowed} requests may be "
            f"under way, the engines have room for {setting.slots}"
        )
    else:
        ways.append("a higher rollout.max_running_requests, if memory allows")
    return ", or ".join(ways)


def _faster_training(setting: RunLayout, factor: float) -> str:
    ways = _more("resources.train_gpus" if setting.gpus else "resources.train_ranks", setting.ranks, factor, setting)
    if setting.engines > 1:
        fewer = max(1, round(setting.engines / factor))
        ways.append(f"{fewer} engine{'' if fewer == 1 else 's'} instead of {setting.engines}")
    ways.append("a larger train.tokens_per_microbatch or fewer train.minibatches")
    return ", or ".join(ways)


def _more(key: str, there: int, factor: float, setting: RunLayout) -> list[str]:
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
    """The bottleneck as summary.json holds it. `plan`: plan.json's document; `first_step`: of this attempt.

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
    held_s = sum(r.get("held_idle_s", 0.0) for r in told)
    return Seen(
        step_s=sum(r["step_s"] for r in steps),
        wait_s=sum(r.get("wait_s", 0.0) for r in steps),
        engine_s=sum(r["interval_s"] for r in told),
        idle_s=sum(r["idle_s"] for r in told) - held_s,
        trained_tokens=sum(r.get("tokens", 0.0) for r in steps),
        generated_tokens=sum(r["rollout_tokens_per_s"] * r["interval_s"] for r in told),
        held_s=held_s,
        evaluated_tokens=evaluated_tokens(records, steps),
        groups=sum(r.get("arrived_groups") or 0.0 for r in steps),
        dropped=sum(r.get("arrived_dropped_groups") or 0.0 for r in steps),
    )


def evaluated_tokens(records: Sequence[Record], steps: Sequence[Record]) -> float:
    """Tokens of evaluations that were generated while these steps were due: of one that began before or ended after,
    the part of its time."""
    if not steps:
        return 0.0
    first, last = min(r["time"] - r["step_s"] for r in steps), max(r["time"] for r in steps)
    tokens = 0.0
    for r in records:
        if r.get("process") == "eval" and r.get("eval_wall_s"):
            begin, end = r["time"] - r["eval_wall_s"], r["time"]
            tokens += r["eval_tokens"] * max(0.0, min(end, last) - max(begin, first)) / (end - begin)
    return tokens


def _setting(recipe: Recipe, plan: Mapping[str, Any]) -> RunLayout:
    processes = plan["processes"]
    engines = sum(process["role"] == Role.ENGINE for process in processes)
    return RunLayout(
        engines=max(1, engines),
        ranks=max(1, sum(process["role"] == Role.TRAINER for process in processes)),
        gpus=any(process["gpus"] for process in processes),
        slots=max(1, engines) * plan["running_requests"],
        allowed=(recipe.effective_staleness + 1) * recipe.batch_sequences,
        staleness=recipe.effective_staleness,
        concurrency=plan["running_requests"] if recipe.eval.max_concurrency == "auto" else recipe.eval.max_concurrency,
        time_sharing=bool(plan["placement"]["time_sharing"]),
        shared=bool(plan["placement"]["shared"]),
    )
