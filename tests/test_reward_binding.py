"""What a reward is called with: parameters by name, TRL's and verl's signatures, and what is refused."""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest

from astracli.errors import UserError
from astracli.rewards import scores, trl
from astracli.rewards.binding import Binding, bind
from astracli.rewards.types import GradeItem, NoScoreError

ROW = {"problem": "1+1", "solution": "2", "level": 3, "answer": "of the row"}
TURNS = ({"role": "system", "content": "Be brief."}, {"role": "user", "content": "1+1"})
GROUP = [GradeItem("1+1", "2", text, [5, len(text)], TURNS, ROW) for text in ("2", "two", "3")]
CHAT_ROW = {"prompt": [{"role": "user", "content": "1+1"}], "solution": "2"}
CHAT = [GradeItem("1+1", "2", text, None, TURNS, CHAT_ROW) for text in ("2", "3")]


def bound(function: Callable[..., Any], columns: list[str] | None = None) -> Binding:
    return bind("m:f", function, list(ROW) if columns is None else columns, "the data")


def test_names_and_columns() -> None:
    seen: dict[str, Any] = {}

    def reward(problem, answer, completion, messages, tokens, row, group, level, absent="default"):  # type: ignore[no-untyped-def]
        seen.update(locals())
        return 1.0

    binding = bound(reward)
    assert binding.style == "one" and not binding.grouped and binding.sees_group
    assert binding.needs == ["tokens", "messages", "row"]
    binding.call(GROUP, 1)
    del seen["seen"]
    assert seen == {
        "problem": "1+1", "answer": "2", "completion": "two", "messages": [dict(t) for t in TURNS], "tokens": [5, 3],
        "row": ROW, "group": ["2", "two", "3"], "level": 3, "absent": "default",
    }  # fmt: skip


def test_everything_goes_into_keywords_and_known_names_win() -> None:
    def reward(completion: str, **rest: Any) -> dict[str, Any]:
        return rest

    found = bound(reward).call(GROUP, 0)
    assert (
        found["answer"] == "2"
        and found["level"] == 3
        and found["solution"] == "2"
        and found["group"] == ["2", "two", "3"]
    )


def test_a_plain_item_has_a_user_turn() -> None:
    assert bound(lambda messages: messages).call([GradeItem("1+1", "2", "x")], 0) == [
        {"role": "user", "content": "1+1"}
    ]
    assert bound(lambda completion: completion).needs == []


@pytest.mark.parametrize("names", ["p, a, c", "prob, ans, comp", "problem, a, c", "p, a, c, /", "x, y, z, /"])
def test_short_names_in_this_order_are_taken_by_position(names: str) -> None:
    function = eval(f"lambda {names}: ({names.replace(', /', '')})")
    assert bound(function, []).call(GROUP, 0) == ("1+1", "2", "2")


@pytest.mark.parametrize(
    "function, message, hint",
    [
        (lambda problem, anser, completion: 1, "`anser`, which is no column of the data", "did you mean `answer`"),
        (lambda prompt, response, label: 1, "the parameter `prompt`, which", "bound by name"),
        (lambda completions, ground_truth: 1, "of the data (columns: `problem`, `solution`, `level`", ""),
        (lambda solution_str, truth: 1, "the parameter `truth`", "data_source, solution_str, ground_truth, extra_info"),
        (lambda solution_strs, level: 1, "the parameter `level`", "solution_strs"),
        (lambda completions, trainer_state: 1, "the parameter `trainer_state`: the state of", "trainer_state=None"),
        (lambda environments, **rest: 1, "the parameter `environments`: TRL's environments", "rollout.env"),
        (lambda completion, other, /: 1, "parameters without names", "leave the `/` out"),
    ],
)  # fmt: skip
def test_a_name_that_is_no_column_is_refused(function: Callable[..., Any], message: str, hint: str) -> None:
    with pytest.raises(UserError) as refused:
        bound(function)
    assert message in refused.value.message and hint in str(refused.value.hint)


def test_a_row_without_the_column_is_an_error_of_that_sample() -> None:
    binding = bind("m:f", lambda completion, level: 1, None, "the data")
    with pytest.raises(NoScoreError, match="no column `level`; its columns: solution"):
        binding.call([GradeItem("", "", "", row={"solution": 1})], 0)


def test_trl() -> None:
    seen: dict[str, Any] = {}

    def reward(prompts, completions, solution, **columns):  # type: ignore[no-untyped-def]
        seen.update(prompts=prompts, completions=completions, solution=solution, columns=columns)
        return [1.0, None, 0]

    binding = bound(reward)
    assert binding.style == "trl" and binding.grouped and binding.sees_group
    returned = binding.call(GROUP)
    assert seen["prompts"] == ["1+1"] * 3 and seen["completions"] == ["2", "two", "3"] and seen["solution"] == ["2"] * 3
    assert seen["columns"]["level"] == [3, 3, 3]
    assert seen["columns"]["completion_ids"] == seen["columns"]["completions_ids"] == [[5, 1], [5, 3], [5, 1]]
    assert callable(seen["columns"]["log_metric"]) and callable(seen["columns"]["log_extra"])
    assert [(s.reward, s.state) for s in scores.many(binding, returned, 3)] == [
        (1, "scored"),
        (0, "absent"),
        (0, "scored"),
    ]
    binding.call(CHAT)
    assert seen["prompts"] == [[dict(t) for t in TURNS]] * 2
    assert seen["completions"] == [[{"role": "assistant", "content": "2"}], [{"role": "assistant", "content": "3"}]]
    assert "prompt" not in seen["columns"], "TRL does not hand the column of the prompt over"


@pytest.mark.parametrize("names", ["completion_ids, **rest", "completions, trainer_state=None, log_metric=None"])
def test_trl_is_known_by_its_names(names: str) -> None:
    binding = bound(eval(f"lambda {names}: ({names.split(',')[0]})"))
    assert binding.style == "trl" and len(binding.call(GROUP)) == 3


def test_turns_that_a_csv_file_holds_as_text_are_turns() -> None:
    text = '[{"role": "user", "content": "1+1"}]'
    for column, asked in (("messages", ()), ("talk", ("talk",)), ("talk", ())):
        items = [GradeItem("1+1", "2", "3", None, TURNS, {column: text})]
        binding = bind("m:f", lambda completions: completions, [column], "the data", asked)
        chat = column == "messages" or bool(asked)
        assert binding.call(items) == [[{"role": "assistant", "content": "3"}] if chat else "3"]
    assert not trl.is_chat(GradeItem("", "", "", row={"prompt": "[a list, [", "messages": ["text"]}))


def test_trl_logs_figures_of_the_group_and_columns_of_its_samples() -> None:
    def reward(completions, log_extra, log_metric):  # type: ignore[no-untyped-def]
        log_metric("half/right", 0.5)
        log_metric("half/right", 1.0)
        log_extra("read", [f"<{text}>" for text in completions])
        log_extra("length", [len(text) for text in completions])
        log_extra("nothing", [None] * len(completions))
        return [{"reward": 1.0, "own": 2.0}, None, 0.5]

    log = trl.Log(3)
    found = scores.many(bound(reward), bound(reward).call(GROUP, log=log), 3, log)
    assert [s.logged for s in found] == [
        {"own": 2.0, "half/right": 0.75, "length": 1.0},
        {"half/right": 0.75, "length": 3.0},
        {"half/right": 0.75, "length": 1.0},
    ]
    assert [s.notes for s in found] == [{"read": "<2>"}, {"read": "<two>"}, {"read": "<3>"}]
    assert [(s.reward, s.state) for s in found] == [(1.0, "scored"), (0.0, "absent"), (0.5, "scored")]
    with pytest.raises(ValueError, match="one value a completion: `read` has 2 for 3"):
        log.extra("read", ["a", "b"])
    with pytest.raises(TypeError, match="takes a number, and `x` is a str"):
        log.metric("x", "much")  # type: ignore[arg-type]


def test_trl_gets_the_column_and_else_the_answer() -> None:
    binding = bound(lambda completions, answer: answer)
    assert binding.call(GROUP) == ["of the row"] * 3
    assert binding.call([GradeItem("1+1", "2", "x")]) == ["2"]


def test_verl() -> None:
    def compute_score(data_source, solution_str, ground_truth, extra_info=None):  # type: ignore[no-untyped-def]
        return data_source, solution_str, ground_truth, extra_info

    binding = bound(compute_score)
    assert binding.style == "verl" and not binding.grouped
    assert binding.call(GROUP, 1) == ("", "two", "2", ROW)
    row = {"data_source": "gsm8k", "reward_model": {"style": "rule", "ground_truth": "7"}, "extra_info": {"index": 4}}
    assert binding.call([GradeItem("", "", "x", row=row)], 0) == ("gsm8k", "x", "7", {"index": 4})
    batched = bound(
        lambda data_sources, solution_strs, ground_truths, extra_infos: list(
            zip(solution_strs, ground_truths, strict=True)
        )
    )
    assert batched.grouped and batched.call(GROUP) == [("2", "2"), ("two", "2"), ("3", "2")]


def test_async_is_seen() -> None:
    class Judge:
        async def __call__(self, completion: str) -> float:
            return 1.0

    async def judge(completion: str) -> float:
        return 1.0

    assert bound(judge).concurrent and bound(Judge()).concurrent and not bound(lambda completion: 1).concurrent


@pytest.mark.parametrize(
    "returned, reward, logged, notes",
    [
        (1, 1.0, {}, {}),
        (True, 1.0, {}, {}),
        (np.float32(0.25), 0.25, {}, {}),
        ({"reward": 0.5, "words": 3, "ok": True, "nan": float("nan"), "x": None}, 0.5, {"words": 3.0, "ok": 1.0}, {}),
        (
            {"reward": 0.5, "why": "no box", "read": [1, "2"], "long": "x" * 5000, "n" * 200: np.float64(2)},
            0.5,
            {"n" * 100: 2.0},
            {"why": "no box", "read": "[1, '2']", "long": "x" * 1000},
        ),
    ],
)
def test_scores(returned: Any, reward: float, logged: Mapping[str, float], notes: Mapping[str, str]) -> None:
    found = scores.one(bound(lambda completion: 1), returned)
    assert (found.reward, found.state, found.logged, found.notes) == (reward, "scored", logged, notes)


@pytest.mark.parametrize(
    "returned, message",
    [
        (None, "returned None, not a number"),
        ("0.5", "returned a str, not a number"),
        ([1.0], "returned a list, not a number"),
        (float("inf"), "the reward is inf"),
        (10**400, "an integer that is too large"),
        ({"score": 1}, "a mapping without `reward`: `score`"),
        ({"reward": None}, "returned None"),
        ((x for x in ()), "returned a generator"),
    ],
)
def test_what_is_no_score(returned: Any, message: str) -> None:
    with pytest.raises(NoScoreError, match=message):
        scores.one(bound(lambda completion: 1), returned)


@pytest.mark.parametrize(
    "returned, message", [(0.5, "it is a list"), ("abc", "it is a list"), ([1.0], "1 scores for 3")]
)
def test_what_is_no_list_of_scores(returned: Any, message: str) -> None:
    with pytest.raises(NoScoreError, match=message):
        scores.many(bound(lambda completions: 1), returned, 3)


def test_verl_trains_on_score() -> None:
    binding = bound(lambda solution_str: 1)
    found = scores.one(binding, {"score": 0.25, "acc": 1.0, "pred": "7"})
    assert (found.reward, found.logged) == (0.25, {"acc": 1.0})


def test_an_error_is_told_by_its_own_frames_and_bounded() -> None:
    try:
        exec(compile("def f():\n    raise ValueError('z' * 10_000_000)\nf()", "mine.py", "exec"))
    except ValueError as error:
        found = scores.failed(error)
    assert found.state == "error" and 'File "mine.py", line 2, in f' in found.detail
    assert "ValueError: zzz" in found.detail and len(found.detail) < 5000
    assert scores.printable("a\x1b]0;x\x07\ud800\tü\n") == "a\\x1b]0;x\\x07\\ud800\tü\n"
