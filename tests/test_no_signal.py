"""A run that has lost its signal ends with what was seen and a hint that follows from it; what begins is said once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hub_tools import fill, finish_step, group, ids, open_store

from astracli.config import recipe_io
from astracli.config.recipe import Recipe
from astracli.hub.types import NoSignal
from astracli.launch import no_signal as ending
from astracli.launch.configs import RunContext
from astracli.launch.inputs import Inputs
from astracli.report import no_signal, run_files
from astracli.report.alerts import FLAT_STEPS, QUIET_STEPS, Alerts
from astracli.report.no_signal import Golds
from astracli.rewards import gold
from astracli.runs import names
from astracli.runs.run_dir import RunDir

TINY = "qwen3.5-tiny-m2po-delta"
RECIPE = recipe_io.load(TINY, ["train.learning_rate=0.5", "rollout.max_new_tokens=15"])


NO_GOLDS = Golds()


def seen(**changes: Any) -> NoSignal:
    known = {"groups": 16, "batches": 2, "samples": 100, "truncated": 1, "no_answer": 2, "errors": 0, "timeouts": 0}
    return NoSignal(**(known | {"lowest": 0.0, "highest": 0.0, "rewards": [], "prompts": []} | changes))


def explained(
    found: NoSignal, golds: Golds = NO_GOLDS, recipe: Recipe = RECIPE, **figures: list[float]
) -> tuple[str, str]:
    steps = range(max(map(len, figures.values()), default=0))
    records = [{"process": "trainer", "step": i} | {name: each[i] for name, each in figures.items()} for i in steps]
    return no_signal.explain(found, recipe, records, golds, "logs/rollout.log")


CAUSES: dict[str, tuple[NoSignal, Golds, str, str]] = {
    "errors": (
        seen(errors=90, truncated=100, rewards=[(0, 0.5)]),
        Golds(),
        "grading failed for 90% of the samples",
        "see what data.reward raises, in logs/rollout.log",
    ),
    "timeouts": (
        seen(errors=10, timeouts=60),
        Golds(),
        "grading took longer than 5 s for 60% of the samples",
        "--set data.reward_timeout_s=20",
    ),
    "too easy": (
        seen(lowest=1.0, highest=1.0),
        Golds(),
        "the model has learned these problems",
        "take harder problems",
    ),
    "exploded": (
        seen(truncated=100, rewards=[(0, 0.4), (1, 0.3), (2, 0.0)]),
        Golds(4, 4, "?"),
        "the reward was 0.4 and training has destroyed it",
        "lower train.learning_rate (0.5) in a new run, for example `--set train.learning_rate=0.0001`",
    ),
    "unparsable golds": (
        seen(truncated=100, no_answer=90),
        Golds(10, 5, "see the book"),
        "reward `math` cannot read the golds of these problems",
        "data.answer_field",
    ),
    "cut off": (
        seen(truncated=80, no_answer=80),
        Golds(10, 4, "x"),
        "answers are cut off at 15 tokens",
        "--set rollout.max_new_tokens=60",
    ),
    "no answer": (seen(no_answer=80), Golds(), "reward `math` finds no answer in them", "data.template"),
    "too hard": (seen(), Golds(10, 0), "too hard for this model", "take easier problems"),
    "equal": (seen(lowest=0.0, highest=1.0), Golds(), "does not tell the answers to a problem apart", "group_size = 8"),
    "equal, penalties": (seen(lowest=-1.0, highest=-1.0), Golds(), "too hard for this model", "astra runs samples"),
}


@pytest.mark.parametrize("name", CAUSES)
def test_the_hint_follows_from_what_was_seen(name: str) -> None:
    found, golds, cause, way = CAUSES[name]
    message, hint = explained(found, golds)
    first, *rest = message.split("\n  ")
    assert first.startswith("no signal: 16 groups in a row (2 batches' worth) were dropped, ") and cause in first
    assert way in hint and "rollout.max_dropped_batches" in hint
    others = [
        other for other, (*_, words, _) in CAUSES.items() if other != name and words != cause and words in message
    ]
    assert not others, "one cause"
    assert f"{found.truncated}% cut off at the token limit, {found.no_answer}% without an answer" in "\n".join(rest)


def test_the_evidence_is_quoted() -> None:
    found = seen(rewards=[(0, 0.47), (1, 0.35), (9, 0.0)], errors=3, timeouts=4)
    message, _ = explained(found, Golds(8, 2, "see\nthe " + "book " * 30), entropy=[0.57, 0.01], grad_norm=[1.2, 88.0])
    assert message.split("\n  ")[1:] == [
        "reward, all that arrived: step 0 0.47, step 1 0.35, step 9 0, since then 0",
        "of these 100 samples: 1% cut off at the token limit, 2% without an answer, 3% in error, 4% out of time",
        "entropy 0.57 -> 0.01 nats, gradient norm 1.2 -> 88 (largest 88), learning rate 0.5",
        "2 of 8 golds cannot be read by reward `math`, for example "
        "`see the book book book book book book book book book book...`",
    ]
    assert "reward, all that arrived: 0, no step was trained" in explained(seen())[0]


def test_the_hint_for_answers_that_are_cut_off_is_not_refused() -> None:
    full = recipe_io.load(TINY, ["rollout.max_new_tokens=16"])
    assert "a larger rollout.context_length (64)" in explained(seen(truncated=100), recipe=full)[1]
    assert recipe_io.load(TINY, ["rollout.max_new_tokens=60"]).rollout.max_new_tokens == 60


def test_from_the_hub_and_the_files_of_a_run(tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(f'{{"problem": "p{i}", "answer": "see page {i} of the book"}}\n' for i in range(8)))
    store = open_store(tmp_path, max_dropped_batches=1, max_staleness=0)
    recipe = recipe_io.load(TINY, [f"data.source={rows}", "data.reward=math"])
    context = RunContext(recipe, None, RunDir(tmp_path), 1, Inputs(tmp_path, {"": rows}, {}))  # type: ignore[arg-type]
    fill(store, 0)
    finish_step(store, 0)
    assert ending.failure(store, context) is None
    for _ in range(4):
        (lease,) = ids(store.lease("w", 1))
        store.put(group(lease, 1, rewards=(0.0, 0.0), verdict="wrong"))
    assert store.batch(1).batch is None
    failed = ending.failure(store, context)
    assert failed is not None and "reward, all that arrived: step 0 0.5, since then 0" in failed.message
    assert "the reward was 0.5 and training has destroyed it" in failed.message
    assert "4 of 4 golds cannot be read by reward `math`, for example `see page " in failed.message
    assert "for example: problem ``, answer ``, completion nothing" in failed.message
    shown = list(run_files.samples(RunDir(tmp_path), outcomes={"wrong"}))
    assert len(shown) == 8 and {sample["version"] for sample in shown} == {1}, "what the hint says to look at is there"


@pytest.mark.parametrize(
    "text", ["42", "1/2", "\\frac{1}{2}", "$x=3$", "(1, 2)", "B", "yes", "\\boxed{7}", "12 apples", "Monday"]
)
def test_golds_that_a_reward_reads(text: str) -> None:
    assert gold.readable("math", text) and gold.readable("my.module:reward", text)


@pytest.mark.parametrize(
    "text", ["", "?", "see the solution above", "3*4=12 apples in all. #### 12", "\\frac{1", "{'a': 1}"]
)
def test_golds_that_no_short_answer_equals(text: str) -> None:
    assert not gold.readable("math", text) and gold.readable("my.module:reward", text)
    assert not gold.readable("number", text)


def step(number: int, **figures: Any) -> dict[str, Any]:
    usual = {"entropy": 1.0, "length_stop_fraction": 0.1, names.REWARD: 0.3 + 0.1 * (number % 2), "arrived_groups": 8}
    return {"process": "trainer", "step": number} | usual | figures


def test_nothing_is_said_of_a_healthy_run() -> None:
    alerts = Alerts()
    assert [line for i in range(100) for line in alerts.feed(step(i, entropy=1.0 - 0.008 * i))] == []
    assert alerts.feed({"process": "rollout", "step": 3, "entropy": 0.0}) == []


@pytest.mark.parametrize(
    ("begins", "words", "figures"),
    [
        (30, "step 30: entropy collapsed, 0.01 nats a token, 1 at first", {"entropy": 0.01}),
        (30, "step 30: every sample is cut off at rollout.max_new_tokens", {"length_stop_fraction": 1.0}),
        (30, f"step {29 + FLAT_STEPS}: the reward is flat, 0.25 to 0.25 in the last 20 steps", {names.REWARD: 0.25}),
    ],
)
def test_what_begins_is_said_once(begins: int, words: str, figures: dict[str, float]) -> None:
    alerts = Alerts()
    said = [line for i in range(90) for line in alerts.feed(step(i, **(figures if i >= begins else {})))]
    assert len(said) == 1 and said[0].startswith(words)
    for i in range(90, 92 + QUIET_STEPS):
        assert alerts.feed(step(i)) == []
    again = [line for i in range(120, 150) for line in alerts.feed(step(i, **figures))]
    assert len(again) == 1, "it went and came back"


@pytest.mark.parametrize(
    ("figures", "said"),
    [
        ({"eval_avg_at_n": 0.02}, True),
        ({"eval_avg_at_n": 0.03}, False),
        ({"eval_avg_at_n": 0.0, "step": 10}, False),
        ({"eval_avg_at_n": 0.0, "benchmark": "overall"}, False),
    ],
)
def test_a_model_that_starts_near_zero_is_told_of(figures: dict[str, Any], said: bool) -> None:
    lines = Alerts().feed({"process": "eval", "step": 0, "benchmark": "gsm8k"} | figures)
    assert (
        lines
        == [
            "before training 2.0% of the answers to `gsm8k` are right: look at the prompt (`--dry-run` of the same "
            "command shows the first one) and at the answers (`astra runs samples`), or take easier questions"
        ]
        * said
    )


def test_supervised_training_may_start_at_zero() -> None:
    record = {"process": "eval", "step": 0, "benchmark": "gsm8k", "eval_avg_at_n": 0.0}
    assert Alerts(by_rewards=False).feed(record) == []


def test_a_reward_that_nothing_arrived_for_is_not_flat() -> None:
    alerts = Alerts()
    records = [step(i, **{names.REWARD: 0.0, "arrived_groups": 0}) for i in range(50)]
    assert [line for record in records for line in alerts.feed(record)] == []


def test_the_last_steps_of_a_run_that_ends_by_its_numbers() -> None:
    history = [
        (i, {names.REWARD: 0.1 * i, "entropy": 2.0 / (i + 1), "grad_norm": 10.0**i, "lr": 1.0}) for i in range(3)
    ]
    assert names.recent(history) == [
        "reward: step 0 0, step 1 0.1, step 2 0.2",
        "entropy: step 0 2, step 1 1, step 2 0.667",
        "gradient norm: step 0 1, step 1 10, step 2 100",
        "learning rate: step 0 1, step 1 1, step 2 1",
    ]
