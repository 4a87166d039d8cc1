"""What limited a run and what to change, worked by hand; and what the records of a run come to."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from astracli.config import recipe_io
from astracli.report import bottleneck
from astracli.report.bottleneck import RunLayout, Seen
from astracli.report.summary_table import bottleneck_words

SEEN = Seen(step_s=100.0, wait_s=3.0, engine_s=200.0, idle_s=20.0, trained_tokens=97_000.0, generated_tokens=120_000.0)
SETTING = RunLayout(engines=2, ranks=1, gpus=True, slots=64, allowed=128, staleness=1, concurrency=64,
                    time_sharing=False, shared=False)  # fmt: skip


def judged(setting: RunLayout = SETTING, **seen: float) -> bottleneck.Bottleneck:
    found = bottleneck.judge(replace(SEEN, **seen), setting)
    assert found is not None
    return found


def test_balanced() -> None:
    found = judged()
    assert (found.limit, found.factor, found.change) == ("nothing", None, "")
    # 3 of 100 s waited; 120,000 tokens in 100 s of two engines; 97,000 in the 97 s of work
    assert (found.wait_share, found.idle_share) == (0.03, 0.1)
    assert (found.generated_tokens_per_s, found.trained_tokens_per_working_s) == (1200.0, 1000.0)
    assert found.words == (
        "balanced: the trainer waited 3% of its time for batches, the 2 engines were idle 10% of the time"
    )


def test_generation_limits() -> None:
    # 45 of 100 s waited: the work of 55 s took 100, generation is 100 / 55 = 1.8 times too slow; 2 x 1.8 = 3.6 engines
    found = judged(wait_s=45.0)
    assert found.limit == "generation" and found.factor == pytest.approx(100 / 55)
    assert found.words == (
        "generation limits: the trainer waited 45% of its time for batches; the 2 engines are 1.8x too slow"
    )
    assert found.change == "resources.rollout_gpus=4, or a higher rollout.max_running_requests, if memory allows"
    narrow = judged(replace(SETTING, allowed=32), wait_s=45.0)
    assert narrow.change == (
        "resources.rollout_gpus=4, or a larger train.max_staleness, or train.batch_groups in a new run: 32 requests "
        "may be under way, the engines have room for 64"
    )
    cpu = judged(replace(SETTING, gpus=False, engines=1), wait_s=20.0)
    assert cpu.words.endswith("the engine is 1.2x too slow")
    assert cpu.change.startswith("resources.engines=2 where there are cores for them, or ")


def test_dropped_groups_are_told_of_before_a_slow_engine() -> None:
    found = judged(replace(SETTING, engines=1), wait_s=45.0, groups=100.0, dropped=77.0)
    assert found.limit == "generation" and found.dropped_share == pytest.approx(0.77)
    assert found.words == (
        "generation limits: the trainer waited 45% of its time for batches; 77% of the groups were dropped, as all "
        "their answers earned the same; with those the engine is 1.8x too slow"
    )
    assert found.change.startswith("in a new run questions nearer to what the model can do (")
    few = judged(wait_s=45.0, groups=100.0, dropped=24.0)
    assert few.words == judged(wait_s=45.0).words and few.change == judged(wait_s=45.0).change


def test_training_limits() -> None:
    # idle 120 of 200 engine seconds: 80 s did the work, 2.5 times more was possible
    found = judged(wait_s=1.0, idle_s=120.0)
    assert found.limit == "training" and found.factor == pytest.approx(2.5)
    assert found.words == (
        "training limits: the 2 engines were idle 60% of the time, the trainer waited 1% of its time for batches; "
        "it is 2.5x too slow for the 2 engines"
    )
    assert found.change == (
        "resources.train_gpus=3, or 1 engine instead of 2, or a larger train.tokens_per_microbatch or fewer "
        "train.minibatches"
    )


def test_what_shares_a_gpu_needs_one_of_its_own_before_more_of_the_same() -> None:
    """More engines than training GPUs would lie beside the shared ones, each with the part that a trainer leaves."""
    one = replace(SETTING, engines=1, shared=True)
    slow = judged(one, wait_s=45.0, engine_s=100.0, idle_s=0.0)
    assert slow.change == (
        "resources.share_gpus=false and resources.rollout_gpus=2, which takes 3 GPUs, or a higher "
        "rollout.max_running_requests, if memory allows"
    )
    busy = judged(one, wait_s=1.0, engine_s=100.0, idle_s=60.0)
    assert busy.change.startswith("resources.share_gpus=false and resources.train_gpus=3, which takes 4 GPUs, or a ")
    apart = "resources.share_gpus=false, which takes 2 GPUs, or "
    assert judged(one, wait_s=90.0).change.startswith(apart), "ten engines are not worth proposing, one apart is"
    assert judged(one, wait_s=8.0, idle_s=0.0).change.startswith(apart)


def test_where_a_trainer_has_more_gpus_its_engines_may_have_them_too() -> None:
    wide = replace(SETTING, engines=2, ranks=4, shared=True)
    assert judged(wide, wait_s=45.0).change.startswith("resources.rollout_gpus=4, or a higher ")
    wider = replace(SETTING, engines=4, ranks=2, shared=True)
    assert judged(wider, wait_s=1.0, idle_s=100.0).change.startswith("resources.train_gpus=4, or 2 engines instead of")


def test_shares_near_one_propose_nothing_absurd() -> None:
    found = judged(replace(SETTING, engines=1), idle_s=200.0)
    assert found.factor == 20.0
    assert found.change == "a larger train.tokens_per_microbatch or fewer train.minibatches"
    assert judged(wait_s=99.9).change == "a higher rollout.max_running_requests, if memory allows"


def test_each_waits_for_the_other() -> None:
    found = judged(wait_s=30.0, idle_s=100.0)
    assert found.limit == "each other" and found.factor is None
    assert found.change.startswith("a higher train.max_staleness")
    on_policy = judged(replace(SETTING, staleness=0), wait_s=30.0, idle_s=100.0)
    assert on_policy.change == "train.max_staleness over 0 lets them work at the same time"
    time_sharing = judged(replace(SETTING, time_sharing=True), wait_s=30.0, idle_s=100.0)
    assert time_sharing.limit == "time_sharing" and "share_gpus=false" in time_sharing.change


def test_evaluations_limit_when_without_them_half_of_the_wait_would_go() -> None:
    # 120,000 tokens of rollouts and 60,000 of evaluations: a third of the time that the engines were not idle (0.9)
    found = judged(wait_s=60.0, evaluated_tokens=60_000.0)
    assert found.limit == "evaluation" and found.factor is None
    assert found.evaluation_share == pytest.approx(0.3)
    assert found.words == (
        "evaluations limit: the trainer waited 60% of its time for batches; "
        "evaluations took 30% of the time of the 2 engines"
    )
    assert found.change == "a larger eval.every, or fewer eval.samples"
    narrow = judged(replace(SETTING, concurrency=8), wait_s=60.0, evaluated_tokens=60_000.0)
    assert narrow.change.endswith(", or eval.max_concurrency=auto: an engine runs 32 requests at once")
    assert judged(wait_s=61.0, evaluated_tokens=60_000.0).limit == "generation", "they are the smaller half"
    held = judged(wait_s=60.0, idle_s=20.0, held_s=60.0, evaluated_tokens=60_000.0)
    assert held.words.endswith("took 30% of the time of the 2 engines, and held them without rollouts 30%")


def test_tokens_of_evaluations_while_steps_were_due() -> None:
    steps = [trained(1, 2.0, 0.0), trained(2, 2.0, 0.0)]  # from 100 to 104
    one = {"process": "eval", "version": 1, "eval_wall_s": 3.0, "eval_tokens": 300, "time": 101.5}  # half of it before
    other = {"process": "eval", "version": 2, "eval_wall_s": 1.0, "eval_tokens": 70, "time": 103.0}
    last = {"process": "eval", "version": 3, "eval_wall_s": 11.0, "eval_tokens": 110, "time": 114.0}
    overall = {"process": "eval", "version": 1, "time": 101.5, "benchmark": "overall"}
    assert bottleneck.evaluated_tokens([one, other, last, overall], steps) == pytest.approx(150 + 70 + 10)
    assert bottleneck.evaluated_tokens([one], []) == 0.0


def test_without_a_word_of_the_engines_or_a_step() -> None:
    silent = judged(engine_s=0.0, idle_s=0.0)
    assert silent.limit == "nothing" and silent.idle_share is None and silent.generated_tokens_per_s is None
    assert bottleneck.judge(replace(SEEN, step_s=0.0), SETTING) is None


def trained(step: int, step_s: float, wait_s: float) -> dict[str, Any]:
    """Steps end at 100, 102, 104, ..."""
    times = {"time": 100.0 + 2 * step, "step_s": step_s, "wait_s": wait_s}
    return {"process": "trainer", "step": step, "tokens": 500.0, "arrived_groups": 10.0, **times}


def updated(version: int, interval_s: float, idle_s: float, **more: Any) -> dict[str, Any]:
    told = {"interval_s": interval_s, "idle_s": idle_s, "rollout_tokens_per_s": 300.0}
    return {"process": "rollout", "step": version, "engine": "engine0", **told, **more}


def test_a_run_is_judged_without_its_first_step() -> None:
    """Steps 1 and 2 count: 4 s of which 1 s waited. So do versions 2 and 3: 4 s, 0.2 s idle, 1200 tokens."""
    records = [trained(0, 60.0, 58.0), trained(1, 2.0, 0.6), trained(2, 2.0, 0.4)]
    records += [updated(0, 1.0, 0.0), updated(1, 60.0, 50.0), updated(2, 2.0, 0.1), updated(3, 2.0, 0.1)]
    recipe = recipe_io.load("qwen3.5-tiny-m2po-delta")
    plan = {
        "processes": [{"role": "engine", "gpus": []}, {"role": "trainer", "gpus": []}],
        "placement": {"time_sharing": False, "shared": False},
        "running_requests": 32,
    }
    found = bottleneck.of_run(records, recipe, plan, 0)
    assert found is not None
    assert (found["limit"], found["wait_share"]) == ("generation", pytest.approx(0.25))
    assert found["idle_share"] == pytest.approx(0.05)
    assert found["generated_tokens_per_s"] == pytest.approx(300.0) and found["dropped_share"] == 0.0
    dropped = [record | {"arrived_dropped_groups": 4.0} if "tokens" in record else record for record in records]
    assert bottleneck.of_run(dropped, recipe, plan, 0)["dropped_share"] == pytest.approx(0.4)  # type: ignore[index]
    assert found["trained_tokens_per_working_s"] == pytest.approx(1000 / 3)
    assert bottleneck_words(found).startswith(
        "generation limits: the trainer waited 25% of its time for batches; the engine is 1.3x too slow "
        "(without the first step; tokens/s: generated 300, trained while at work 333); try resources.engines=2 where"
    )
    assert bottleneck.of_run(records[:1], recipe, plan, 0) is None


def test_the_end_of_a_run_for_which_nothing_is_left_to_generate_says_nothing() -> None:
    """With staleness 2, all of 6 steps is granted when step 3 begins: version 4 is the last that engines work up to."""
    recipe = recipe_io.load("qwen3.5-tiny-m2po-delta", ["train.steps=6", "train.max_staleness=2"])
    plan = {
        "processes": [{"role": "engine", "gpus": []}, {"role": "trainer", "gpus": []}],
        "placement": {"time_sharing": False, "shared": False},
        "running_requests": 32,
    }
    records = [trained(step, 2.0, 0.08 if step < 4 else 0.0) for step in range(6)]
    records += [updated(version, 2.0, 0.1 if version < 5 else 2.0) for version in range(7)]
    found = bottleneck.of_run(records, recipe, plan, 0)
    assert found is not None and found["limit"] == "nothing"
    assert (found["wait_share"], found["idle_share"]) == (pytest.approx(0.04), pytest.approx(0.05))
    assert bottleneck.of_run(records[4:6] + records[-2:], recipe, plan, 4) is None, "resumed for its last two steps"


RUNS = {
    # name: (wait, idle, held: shares of every engine's time; evaluation tokens for each of rollouts; what limits)
    "balanced": (0.03, 0.05, 0.0, 0.1, "nothing"),
    "balanced, held beside a trainer that has enough": (0.03, 0.05, 0.6, 4.0, "nothing"),
    "training": (0.01, 0.5, 0.0, 0.1, "training"),
    "generation": (0.5, 0.02, 0.0, 0.1, "generation"),
    "evaluation takes the tokens": (0.54, 0.0, 0.1, 1.86, "evaluation"),
    "evaluation holds the engines": (0.85, 0.02, 0.8, 20.0, "evaluation"),
    "each other": (0.3, 0.5, 0.02, 0.1, "each other"),
    "each other, while a small evaluation runs all the time": (0.3, 0.3, 0.0, 0.05, "each other"),
}


@pytest.mark.parametrize("engines", [1, 2, 4])
@pytest.mark.parametrize("name", RUNS)
def test_the_verdict_is_that_of_the_average_engine(name: str, engines: int) -> None:
    """Ten steps of 2 s; each engine tells its shares of them; one evaluation lasts all the time."""
    wait, idle, held, evaluated, limit = RUNS[name]
    recipe = recipe_io.load("qwen3.5-tiny-m2po-delta", ["train.max_staleness=2", "train.steps=20"])
    records: list[dict[str, Any]] = [trained(step, 2.0, 2.0 * wait) for step in range(12)]
    for engine in range(engines):
        shares = {"held_idle_s": 2.0 * held, "engine": f"engine{engine}"}
        records += [updated(version, 2.0, 2.0 * (idle + held), **shares) for version in range(13)]
    tokens = evaluated * 300.0 * 22.0 * engines  # from 100 to 122, all of it while steps 1 to 11 were due
    records.append({"process": "eval", "version": 1, "time": 122.0, "eval_wall_s": 22.0, "eval_tokens": tokens})
    document = {
        "processes": [{"role": "engine", "gpus": []}] * engines + [{"role": "trainer", "gpus": []}],
        "placement": {"time_sharing": False, "shared": False},
        "running_requests": 32,
    }
    found = bottleneck.of_run(records, recipe, document, 0)
    assert found is not None
    assert (found["limit"], found["wait_share"]) == (limit, pytest.approx(wait))
    assert (found["idle_share"], found["held_share"]) == (pytest.approx(idle), pytest.approx(held))
    time_shared = document | {"placement": {"time_sharing": True, "shared": True}}
    time_sharing = bottleneck.of_run(records, recipe, time_shared, 0)
    assert time_sharing is not None and time_sharing["limit"] == (limit if wait < 0.05 else "time_sharing")
