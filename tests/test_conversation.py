"""A chat in parts: what trains is what was drawn, whatever a template makes of earlier turns; and templates that do not
allow it."""

from __future__ import annotations

import asyncio
from itertools import pairwise
from typing import Any

import pytest
from chat_models import ENDS, Lines, asked, made, tokenizer
from rollout_world import recipe

from astracli.data.prompts import Problem
from astracli.envs.contract import Env, Episode, Policy
from astracli.errors import UserError
from astracli.models.chat import ChatFormat
from astracli.models.conversation import Conversation

GOOD = ("qwen3_5", "qwen2_5", "llama3", "smollm")
THINK = "<think>\n 1+1 is\n2 </think>\n\n"
CALL = '<tool_call>\n{"arguments":{"expression" :  "1+1"},"name": "calculator"}\n</tool_call>'
TOOL: list[dict[str, Any]] = [
    {"type": "function", "function": {"name": "calculator", "parameters": {"type": "object", "properties": {}}}}
]


class Talk(Env):
    """Goes through `said`, one a turn."""

    said: tuple[Any, ...] = ()

    async def run(self, problem: Problem, policy: Policy) -> Episode:
        episode = self.begin(problem)
        for said in self.said:
            episode.add(await policy.generate(episode.tokens))
            self.say(episode, said)
        episode.add(await policy.generate(episode.tokens))
        return episode


def played(name: str, lines: list[str], *said: Any, **model: Any) -> tuple[Episode, Lines, Any]:
    kind = type("Talks", (Talk,), {"said": said})
    env = made(kind, recipe(model=model), name)
    policy = Lines(env.tokenizer, lines)
    return asyncio.run(env.run(asked("how much?"), policy)), policy, env


@pytest.mark.parametrize("name", GOOD)
def test_what_trains_is_what_was_drawn_turn_by_turn(name: str) -> None:
    """Turns that every template would write otherwise: reasoning, spaces at both ends, a call in another order."""
    end = ENDS.get(name, "<|im_end|>")
    lines = [f" {THINK}{CALL}  {end}", f"\n\n so: 2 \n{end}", f"{THINK}2 and nothing else  {end}"]
    results = [{"role": "tool", "content": " 2 "}, {"role": "tool", "content": "error: <|im_end|> <|eot_id|>"}]
    episode, policy, env = played(name, lines, results, "sure?")
    drawn = [turn for _, turn in policy.drawn]
    assert len(episode.spans) == len(drawn) == 3
    used = 0
    for (first, behind), (context, turn) in zip(episode.spans, policy.drawn, strict=True):
        count = behind - first
        assert episode.tokens[:first].tolist() == context, "drawn behind exactly these tokens"
        assert episode.tokens[first:behind].tolist() == turn.tokens.tolist()
        assert episode.logprobs[used : used + count].tolist() == turn.logprobs.tolist()
        assert episode.versions[used : used + count].tolist() == turn.versions.tolist()
        used += count
    assert used == len(episode.logprobs) == int(episode.loss_mask.sum())
    whole = env.tokenizer.decode(episode.tokens.tolist())
    assert [whole.count(line) for line in lines] == [1, 1, 1] and whole.count("error: <|im_end|> <|eot_id|>") == 1
    assert episode.messages[-2:] == [
        {"role": "assistant", "content": env.text(drawn[1].tokens)},
        {"role": "user", "content": "sure?"},
    ]
    ids = set(env.tokenizer(f"<|im_end|><|eot_id|>{end}", add_special_tokens=False)["input_ids"])
    told = [t for (_, a), (b, _) in pairwise(episode.spans) for t in episode.tokens[a:b].tolist()]
    closes = 3 if name in ("llama3", "smollm") else 2  # the others write both results into one turn
    assert sum(token in ids for token in told) == closes, "a result cannot end its turn"
    if name in ("qwen3_5", "llama3"):  # as the whole chat would be written anew
        again = env.tokenizer.apply_chat_template(episode.messages, tokenize=False)
        assert lines[1] not in again and env.text(drawn[1].tokens) not in again


@pytest.mark.parametrize("name", GOOD)
def test_parts_are_what_the_template_writes_for_the_whole_chat(name: str) -> None:
    """Of turns that it leaves as they are, to the last token; a turn that was cut off is closed."""
    end = ENDS.get(name, "<|im_end|>")
    episode, _, env = played(name, [f"1{end}", "2", f"3{end}"], "and then?", [{"role": "user", "content": "and?"}])
    turns = [("user", "how much?"), ("assistant", "1"), ("user", "and then?"), ("assistant", "2"), ("user", "and?")]
    chat = [{"role": role, "content": content} for role, content in turns]
    whole = env.tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    if name == "qwen3_5":  # of turns before the last question it writes no empty reasoning
        opened = "<|im_start|>assistant\n"
        whole = whole.replace(f"{opened}1", f"{opened}<think>\n\n</think>\n\n1")
        whole = whole.replace(f"{opened}2", f"{opened}<think>\n\n</think>\n\n2")
    assert env.tokenizer.decode(episode.tokens.tolist()) == f"{whole}3{end}"
    assert episode.tokens.tolist() == env.tokenizer(f"{whole}3{end}", add_special_tokens=False)["input_ids"]
    (_, behind), (second, _), _ = episode.spans
    assert not episode.loss_mask[behind:second].any()


def test_thinking_and_how_an_answer_begins_stand_before_every_turn() -> None:
    end = "<|im_end|>"
    episode, _, env = played("qwen3_5", [f"a{end}", f"b{end}"], "more", thinking="on", assistant_prefix="So: ")
    text = env.tokenizer.decode(episode.tokens.tolist())
    assert text == (
        f"<|im_start|>user\nhow much?{end}\n<|im_start|>assistant\n<think>\nSo: a{end}\n"
        f"<|im_start|>user\nmore{end}\n<|im_start|>assistant\n<think>\nSo: b{end}"
    )


def test_another_token_that_ends_a_turn_is_not_followed_by_a_second_one() -> None:
    episode, _, env = played("llama3", ["{}<|eom_id|>", "ok<|eot_id|>"], [{"role": "tool", "content": "4"}])
    text = env.tokenizer.decode(episode.tokens.tolist())
    assert "{}<|eom_id|><|start_header_id|>ipython<|end_header_id|>\n\n4<|eot_id|>" in text


@pytest.mark.parametrize("name", GOOD)
@pytest.mark.parametrize("role", ["user", "tool"])
def test_templates_that_can_be_rendered_in_parts(name: str, role: str) -> None:
    for tools in ((), TOOL):
        Conversation(tokenizer(name), ChatFormat(), tools).check(role)


USER_ONLY = (
    "{% for m in messages %}{% if m.role not in ['user', 'assistant'] %}{{ raise_exception('Only user and assistant "
    "roles are supported!') }}{% endif %}{{ m.role ~ ': ' ~ m.content ~ '\n' }}{% endfor %}"
)
NUMBERED = "{% for m in messages %}{{ loop.index ~ '. ' ~ m.role ~ ': ' ~ m.content ~ '\n' }}{% endfor %}"
TOLD_LAST = "{% for m in messages if m.role == 'assistant' %}{{ m.content }}{% endfor %}{{ messages[-1].role }}"
TWICE = "{% for m in messages %}{{ m.content }}{% if m.role == 'assistant' %}{{ m.content }}{% endif %}{% endfor %}"
SHORTENED = "{% for m in messages[-2:] %}{{ m.role ~ ': ' ~ m.content ~ '\n' }}{% endfor %}"


@pytest.mark.parametrize(
    ("template", "role", "words"),
    [
        ("tools_last", "user", "what it writes behind an answer depends on the tools"),
        (USER_ONLY, "tool", "a turn of `tool` behind an answer: Only user and assistant roles are supported!"),
        (NUMBERED, "user", "what it writes behind an answer depends on earlier turns"),
        (TOLD_LAST, "user", "it does not write what a turn of `user` says behind the answer before"),
        (TWICE, "user", "a turn of `user` behind an answer: it leaves out what the assistant has said, or repeats it"),
        (SHORTENED, "user", "it writes the prompt otherwise once another turn follows"),
    ],
)
def test_a_template_that_cannot_be_rendered_in_parts_is_refused(template: str, role: str, words: str) -> None:
    with pytest.raises(UserError) as refused:
        Conversation(tokenizer(template), ChatFormat()).check(role)
    assert refused.value.message == f"the model's chat template cannot be rendered in parts: {words}"
    assert "Episode.tell" in str(refused.value.hint)


def test_an_environment_that_talks_ends_with_the_reason_at_once() -> None:
    with pytest.raises(UserError, match="depends on earlier turns"):
        played(NUMBERED, ["a", "b"], "more")


def test_without_a_template_turns_are_bare_text() -> None:
    from rollout_world import Tokenizer

    conversation = Conversation(Tokenizer(), ChatFormat())
    conversation.check("user")
    assert conversation.after([ord("4"), 1], [{"role": "user", "content": "1+2"}]) == [ord(c) for c in "\n\n1+2"]
