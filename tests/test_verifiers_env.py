"""Environments of the `verifiers` package: what trains is what was drawn, its rubric scores, and what cannot be said so
is refused. On the package where it is installed, else on tests/fake_verifiers."""

from __future__ import annotations

import asyncio
import importlib.util
import json
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
from chat_models import ENDS, Lines, tokenizer
from rollout_world import recipe

from astracli.data.problems import Problems
from astracli.data.prompts import Problem
from astracli.envs import registry, verifiers_package
from astracli.envs.attempt import Failure, attempt, score
from astracli.envs.contract import EnvSetup, Episode
from astracli.envs.prompt_tokens import PromptTokens
from astracli.errors import UserError
from astracli.evaluation.episodes import whole
from astracli.launch import inputs
from astracli.models.chat import ChatFormat

if importlib.util.find_spec("verifiers") is None:
    sys.path.append(str(Path(__file__).parent / "fake_verifiers"))


def made(name: str, template: str, **args: Any) -> Any:
    chosen = recipe(rollout={"env": "verifiers"}, env={"args": {"id": name, "args": args}})
    coder = tokenizer(template)
    no_grader: Any = None
    kind: Any = registry.find("verifiers")
    return kind(EnvSetup(chosen, coder, lambda problem: no_grader, PromptTokens(coder, ChatFormat.of(chosen))))


def problem(env: Any, place: int = 0) -> Problem:
    row = list(verifiers_package.rows(env.theirs, "train"))[place]
    return Problem(str(place), row["messages"][-1]["content"], row["answer"], messages=tuple(row["messages"]), row=row)


def play(env: Any, lines: list[str], room: int = 10_000) -> tuple[Any, Lines]:
    policy = Lines(env.tokenizer, lines, room=room)
    episode = asyncio.run(attempt(env, problem(env), policy, 60.0, whole))
    return episode, policy


def check_drawn(episode: Any, policy: Lines) -> None:
    """Every trained token, its log-probability and its context are those of a turn of the policy."""
    assert isinstance(episode, Episode), episode
    assert len(policy.drawn) == len(episode.spans)
    used = 0
    for (context, turn), (first, end) in zip(policy.drawn, episode.spans, strict=True):
        assert context == episode.tokens[:first].tolist()
        assert turn.tokens.tolist() == episode.tokens[first:end].tolist()
        assert turn.logprobs.tolist() == episode.logprobs[used : used + end - first].tolist()
        assert turn.versions.tolist() == episode.versions[used : used + end - first].tolist()
        used += end - first


@pytest.mark.parametrize("template", ["qwen2_5", "qwen3_5", "llama3", "smollm"])
def test_what_trains_is_what_was_drawn(template: str) -> None:
    env, stop = made("vf_environments", template), ENDS.get(template, "<|im_end|>")
    thought = f"<think>\n\nit may be a  </think>\n\n  a {stop}"  # what templates that write history anew cut and trim
    episode, policy = play(env, [thought, f" {stop}", f"b{stop}"])
    check_drawn(episode, policy)
    text = env.text(episode.tokens)
    places = [text.index(part) for part in ("Be brief.", "first?", "it may be a  ", "again 1", "again 2", "b")]
    assert places[:5] == sorted(places[:5]) and text.count("again") == 2
    assert episode.parts == {"turns": 3.0} and episode.finish == "stop"
    other, _ = play(env, [f"a{stop}"] * 3)
    scores: Any = asyncio.run(score(env, problem(env), [episode, other], 60.0))
    assert [one.reward for one in scores] == [1.5, 0.0], "right, and half a point for the longest of the group"
    assert [one.verdict for one in scores] == ["right", "wrong"]
    assert [dict(one.parts) for one in scores] == [
        {"right": 1.0, "longest": 1.0, "num_turns": 3.0}, {"right": 0.0, "longest": 0.0, "num_turns": 3.0}
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("template", "call", "broken"),
    [
        ("qwen2_5", '<tool_call>\n{"name": "add", "arguments": {"a": 2, "b": 40}}\n</tool_call>', "<tool_call>{"),
        (
            "qwen3_5",
            "<tool_call>\n<function=add>\n<parameter=a>\n2\n</parameter>\n<parameter=b>\n40\n</parameter>\n</function>\n</tool_call>",
            "<tool_call>add",
        ),
        ("llama3", '{"name": "add", "parameters": {"a": 2, "b": 40}}', '{"name": "add", '),
    ],
)
def test_tools_are_called_in_the_format_of_the_template(template: str, call: str, broken: str) -> None:
    env, stop = made("vf_environments:with_tool", template), ENDS.get(template, "<|im_end|>")
    assert "add" in env.text(env.prompt(problem(env)))
    lead = "" if template == "llama3" else "I add. "
    episode, policy = play(env, [f"{lead}{call}{stop}", f"{broken}{stop}", f"b{stop}"])
    check_drawn(episode, policy)
    completion = episode.state["completion"]
    assert [one["role"] for one in completion] == ["assistant", "tool", "assistant", "tool", "assistant"]
    assert completion[1]["content"] == "42" and completion[0]["content"] == lead.strip()
    assert completion[3]["content"], "the environment says what it could not read"
    assert "42" in env.text(episode.tokens[episode.spans[0][1] : episode.spans[1][0]])
    assert [one.reward for one in asyncio.run(score(env, problem(env), [episode], 60.0))] == [1.0]  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("how", "reason"),
    [
        ("rewrites", "writes anew message 3 of its chat, of `assistant`"),
        ("forgets", "leaves out message"),
        ("silent", "asks for another turn and says nothing before it"),
        ("error", "the game is broken"),
    ],
)
def test_a_chat_that_does_not_go_on_from_what_was_drawn_fails(how: str, reason: str) -> None:
    failure, policy = play(made("vf_environments", "qwen2_5", how=how), ["a<|im_end|>"] * 3)
    assert isinstance(failure, Failure) and len(policy.drawn) == 1
    assert reason in failure.words


def test_an_episode_ends_where_no_room_is_left() -> None:
    env = made("vf_environments", "qwen2_5")
    begins = len(env.prompt(problem(env)))
    episode, policy = play(env, ["a<|im_end|>"] * 3, room=begins + 4)
    assert isinstance(episode, Episode) and len(policy.drawn) == 2 and not len(policy.drawn[1][1].tokens)
    assert len(episode.tokens) == episode.spans[-1][1], "what was told last is cut"
    assert episode.finish == "length" and episode.parts == {"turns": 1.0}
    failure, _ = play(env, ["a"], room=begins)
    assert isinstance(failure, Failure) and f"prompt of {begins} tokens leaves no room" in failure.words


def test_what_cannot_work_is_refused_before_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="cannot be rendered in parts"):
        made("vf_environments", "tools_last")
    with pytest.raises(UserError, match="cannot be loaded: TypeError"):
        made("vf_environments", "qwen2_5", depth=3)
    with pytest.raises(UserError, match=r"takes `env\.args\.id`"):
        made("", "qwen2_5")
    env = made("vf_environments", "qwen2_5")
    with pytest.raises(UserError, match="does not come from the environment `vf_environments`"):
        env.check(Problem("0", "first?", "b"))
    with pytest.raises(UserError, match="row 7 of `vf_environments`: it has 2 to train"):
        env.check(Problem("0", "?", "", row={verifiers_package.ROW: 7, verifiers_package.SPLIT: "train"}))
    monkeypatch.setitem(sys.modules, "verifiers", None)
    with pytest.raises(UserError, match="needs the package verifiers") as refused:
        made("vf_environments", "qwen2_5")
    assert "astracli[verifiers]" in str(refused.value.hint)


def test_the_first_row_is_looked_at_before_a_start(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(registry, "ask", lambda name, document: asked.append((name, json.loads(document))))
    row = {verifiers_package.ROW: 0, verifiers_package.SPLIT: "train"}
    first = Problem("0", "first?", "b", messages=({"role": "user", "content": "first?"},), row=row)
    chosen = recipe(rollout={"env": "verifiers"})
    inputs.check_envs(chosen, Path("model"), {"": first}, trains=True, evaluates=False)
    ((name, document),) = asked
    assert name == "verifiers" and document["row"] == row


def test_its_rows_become_a_file_that_a_recipe_reads(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = signal.getsignal(signal.SIGTERM)
    verifiers_package.main(["vf_environments", str(tmp_path / "rows.jsonl"), "--args", '{"turns": 2}'])
    assert signal.getsignal(signal.SIGTERM) is before, "the package's own handler is taken away again"
    assert "2 rows in" in capsys.readouterr().out
    second = json.loads((tmp_path / "rows.jsonl").read_text().splitlines()[1])
    assert second["messages"][-1] == {"role": "user", "content": "second?"} and second["answer"] == "d"
    fields = {"question_fields": ["problem"], "answer_fields": ["answer"]}
    read = Problems(tmp_path / "rows.jsonl", split="train", **fields)[1]  # type: ignore[arg-type]
    env = made("vf_environments", "qwen2_5")
    assert read.messages[0]["content"] == "Be brief." and env.row(read)["answer"] == "d"
    with pytest.raises(SystemExit) as ended:
        verifiers_package.main(["no_such_environment", str(tmp_path / "none.jsonl")])
    assert ended.value.code == 2 and "error: the environment `no_such_environment`" in capsys.readouterr().err
    assert not (tmp_path / "none.jsonl").exists()
