"""Episodes with tools: what is called is answered, under budgets, as tokens that are not trained."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any, Literal

import pytest
import warm_child
from chat_models import ENDS, Lines, asked, made, tokenizer
from rollout_world import recipe

from astracli.config import recipe_io
from astracli.envs import registry
from astracli.envs.contract import Episode
from astracli.envs.tool_env import ToolEnv
from astracli.errors import UserError

CALLS = {
    "qwen3_5": "<tool_call>\n<function=calculator>\n<parameter=expression>\n12*34\n</parameter>\n</function>\n"
    "</tool_call>",
    "qwen2_5": '<tool_call>\n{"name": "calculator", "arguments": {"expression": "12*34"}}\n</tool_call>',
    "llama3": '{"name": "calculator", "parameters": {"expression": "12*34"}}',
}
TOLD = {
    "qwen3_5": "\n<|im_start|>user\n<tool_response>\n{}\n</tool_response><|im_end|>\n<|im_start|>assistant\n<think>\n\n"
    "</think>\n\n",
    "qwen2_5": "\n<|im_start|>user\n<tool_response>\n{}\n</tool_response><|im_end|>\n<|im_start|>assistant\n",
    "llama3": "<|start_header_id|>ipython<|end_header_id|>\n\n{}<|eot_id|><|start_header_id|>assistant<|end_header_id|>"
    "\n\n",
}


def chosen(new_tokens: int = 4000, thinking: str = "off", **env: Any) -> Any:
    rollout = {"env": "tools", "max_new_tokens": new_tokens, "context_length": 9000}
    return recipe(model={"thinking": thinking}, rollout=rollout, env={"tools": ["calculator", "python"]} | env)


def played(name: str, lines: list[str], room: int = 10_000, **env: Any) -> tuple[Episode, Lines, ToolEnv]:
    tool_env: Any = made(ToolEnv, chosen(**env), name)
    policy = Lines(tool_env.tokenizer, lines, room=room)
    try:
        return asyncio.run(tool_env.run(asked("how much?"), policy)), policy, tool_env
    finally:
        tool_env.close()


def told(episode: Episode, env: ToolEnv) -> list[str]:
    """What stands between the turns."""
    edges = [b for _, b in episode.spans], [a for a, _ in episode.spans[1:]]
    return [env.tokenizer.decode(episode.tokens[b:a].tolist()) for b, a in zip(*edges, strict=False)]


@pytest.mark.parametrize("name", CALLS)
def test_a_call_is_answered_in_the_models_own_words(name: str) -> None:
    end = ENDS.get(name, "<|im_end|>")
    episode, policy, env = played(name, [f"{CALLS[name]}{end}", f"It is 408.{end}"])
    prompt = env.tokenizer.decode(policy.drawn[0][0])
    assert '"name": "calculator"' in prompt and "Runs a Python program" in prompt, "the model is told of its tools"
    assert told(episode, env) == [TOLD[name].format("408")]
    assert env.text(episode.answer) == "It is 408."
    between = len(episode.tokens) - len(policy.drawn[0][0]) - int(episode.loss_mask.sum())
    assert episode.parts == {"turns": 2, "tool_calls": 1, "tool_errors": 0, "tool_tokens": between}
    drawn = [turn.tokens.tolist() for _, turn in policy.drawn]
    assert drawn == [episode.tokens[a:b].tolist() for a, b in episode.spans]


def test_what_is_no_call_is_answered_as_such() -> None:
    end = "<|im_end|>"
    call = "<tool_call>\n{}\n</tool_call>"
    lines = [
        f"{call.format('{bad')}{end}",
        call.format('{"name": "calc", "arguments": {}}') + end,
        call.format('{"name": "calculator", "arguments": {"x": 1}}') + end,
        call.format('{"name": "calculator", "arguments": {"expression": "1/0"}}') + end,
        f"{call.format('{bad')}{call.format(CALLS['qwen2_5'][12:-13])}{end}",
        f"I give up{end}",
    ]
    episode, _, env = played("qwen2_5", lines)
    found = [text.split("<tool_response>\n")[1].split("\n</tool_response>")[0] for text in told(episode, env)]
    assert [text.split("(")[0].strip() for text in found] == [
        "error: the call is no JSON: Expecting property name enclosed in double quotes: line 2 column 2",
        "error: there is no tool `calc`; there is: calculator, python",
        "error: `expression`: Field required; `x`: Extra inputs are not permitted",
        "error: ZeroDivisionError: division by zero",
        "error: the call is no JSON: Expecting property name enclosed in double quotes: line 2 column 2",
    ]
    assert told(episode, env)[-1].count("<tool_response>") == 2 and "408" in told(episode, env)[-1]
    assert episode.parts["turns"] == 6 and episode.parts["tool_calls"] == 6 and episode.parts["tool_errors"] == 5


def test_what_a_model_thinks_of_calling_is_not_called() -> None:
    """Its chat template opens the reasoning, so that the turn does not say where it begins."""
    end, call = "<|im_end|>", CALLS["qwen3_5"]
    env: Any = made(ToolEnv, chosen(thinking="on"), "qwen3_5")
    for line, calls in {f"I could {call} but{end}": 0, f"so: </think>\n\n{call}{end}": 1}.items():
        policy = Lines(env.tokenizer, [line, f"</think>408{end}"])
        assert asyncio.run(env.run(asked("how much?"), policy)).parts["tool_calls"] == calls
    env.close()


def test_budgets_of_turns_and_tokens() -> None:
    end = "<|im_end|>"
    line = CALLS["qwen2_5"] + end
    episode, policy, _ = played("qwen2_5", [line] * 9, max_turns=3)
    assert len(policy.drawn) == 3 and episode.parts["tool_calls"] == 2, "what the last turn calls is not run"
    assert episode.loss_mask[-1]
    episode, policy, _ = played("qwen2_5", [line] * 9, max_turn_tokens=5)
    assert len(policy.drawn) == 1 and episode.finish == "length" and len(policy.drawn[0][1].tokens) == 5
    long = '<tool_call>\n{"name": "python", "arguments": {"code": "print(10**300)"}}\n</tool_call>' + end
    episode, _, env = played("qwen2_5", [long, f"ok{end}"], max_tool_tokens=20)
    (result,) = told(episode, env)
    assert "\n[282 more tokens are cut off]\n</tool_response>" in result and "1" + 20 * "0" not in result
    tool_env: Any = made(ToolEnv, chosen(len(policy.drawn[0][1].tokens) + 120), "qwen2_5")
    policy = Lines(tool_env.tokenizer, [long, "x"])
    episode = asyncio.run(tool_env.run(asked("how much?"), policy))
    tool_env.close()
    assert episode.finish == "length" and len(policy.drawn) == 1 and episode.loss_mask[-1], "no room for the result"


def test_blocks_of_code_need_no_template_for_tools() -> None:
    end = "<|im_end|>"
    lines = [f"So:\n```python\nprint(6*7)\n```{end}", f"42{end}"]
    episode, _, env = played("smollm", lines, format="code", tools=["python"])
    assert told(episode, env) == ["\n<|im_start|>user\n```output\n42\n```<|im_end|>\n<|im_start|>assistant\n"]


def refused(name: str, question: str = "how much?", **env: Any) -> str:
    with pytest.raises(UserError) as error:
        made(ToolEnv, chosen(**env), name).check(asked(question))
    assert error.value.hint
    return error.value.message


def test_what_cannot_work_is_refused_before_the_start() -> None:
    assert "has no tools" in refused("qwen2_5", tools=[])
    assert "writes no calls of tools in a format that is known" in refused("smollm")
    words = "the model is not told of the tool `calculator`: its chat template takes no tools"
    assert refused("smollm", format="hermes") == words
    made(ToolEnv, chosen(format="hermes"), "smollm").check(asked("use calculator or python"))
    assert "takes the tool `python` and no other, not `calculator`, `python`" in refused("qwen2_5", format="code")
    counted = "{{ tools }}{% for m in messages %}{{ loop.index ~ m.role ~ m.content }}{% endfor %}"
    words = "cannot be rendered in parts: what it writes behind an answer depends on earlier turns"
    assert words in refused(counted, format="hermes")
    with pytest.raises(UserError, match=r'env.tools is for an environment .* rollout.env = "single_turn"'):
        recipe_io.load("qwen3.5-tiny-m2po-delta", ['env.tools=["python"]'])


Kind = Literal["env_good", "env_bad"]


def test_an_environment_is_made_with_the_recipe_and_the_checkpoint_before_a_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a process of its own: with its tools, its chat template and the first problem."""
    monkeypatch.chdir(tmp_path)
    tokenizer("smollm").save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "config.json").write_text('{"model_type": "llama"}')
    (tmp_path / "env_bad.py").write_text(
        "from astracli.envs.contract import Env\nclass Bad(Env):\n    def __init__(self, setup):\n        {}['board']\n"
    )
    messages = [{"role": "user", "content": "how much?"}]
    with pytest.raises(UserError, match="writes no calls of tools in a format that is known"):
        registry.check("tools", chosen(), tmp_path / "model", messages)
    monkeypatch.setattr(registry, "subprocess", warm_child.ENVIRONMENTS_HERE)  # each process would import torch
    with pytest.raises(UserError, match=r"the process of the tools .* did not start: its process ended"):
        little = chosen(format="code", tools=["python"], tool_memory_gib=0.01)
        registry.check("tools", little, tmp_path / "model", messages)
    with pytest.raises(UserError, match=r"`env_bad:Bad` cannot be made: KeyError: 'board' \(.*env_bad.py, line 4\)"):
        registry.check("env_bad:Bad", chosen(), tmp_path / "model", messages)
    registry.check("tools", chosen(format="code", tools=["python"]), tmp_path / "model", messages)
