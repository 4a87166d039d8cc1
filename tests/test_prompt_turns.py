"""From rows to chat turns: columns of turns, templates with columns, the system turn, examples; and to tokens."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from astracli.config import recipe_io
from astracli.config.recipe_data import DataTable
from astracli.data import datasets
from astracli.data.prompts import PromptSource
from astracli.data.turns import PromptFormat, render, turns_of
from astracli.errors import UserError
from astracli.launch.inputs import check_prompts
from astracli.models.adapter import chat_prompt_tokens
from astracli.models.chat import ChatFormat, bare_text, special_names, special_names_of, template_of

TURNS = [
    {"role": "system", "content": "own"},
    {"role": "user", "content": "1+1?"},
    {"role": "assistant", "content": "2"},
    {"role": "user", "content": "and 2+2?"},
]


def jsonl(path: Path, *rows: dict[str, Any]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def said(problem: Any) -> list[tuple[str, str]]:
    return [(turn["role"], turn["content"]) for turn in problem.messages]


def test_turns_come_as_they_are_with_what_the_recipe_adds(tmp_path: Path) -> None:
    source = jsonl(tmp_path / "a.jsonl", {"messages": TURNS, "answer": "4", "hint": "h"}, {"problem": "p", "answer": 1})
    first, second = datasets.load(DataTable(source=source))
    assert said(first) == [(turn["role"], turn["content"]) for turn in TURNS] and first.question == "and 2+2?"
    assert first.row == {"messages": TURNS, "answer": "4", "hint": "h"} and said(second) == [("user", "p")]
    shots: Any = [{"question": "5", "answer": "five"}]
    table = DataTable(source=source, system="s", few_shot=shots, template="{question} Box it.")
    first, second = datasets.load(table)
    shown = [("user", "5 Box it."), ("assistant", "five")]
    assert said(first) == [
        ("system", "own"),
        *shown,
        ("user", "1+1?"),
        ("assistant", "2"),
        ("user", "and 2+2? Box it."),
    ]
    assert said(second) == [("system", "s"), *shown, ("user", "p Box it.")]
    assert PromptSource(table, 0).problem(0).messages in (first.messages, second.messages)


def test_turns_as_json_text_and_a_last_answer(tmp_path: Path) -> None:
    """As a CSV of chat rows has them; the assistant's last turn is the answer where no column is."""
    path = tmp_path / "a.csv"
    whole = json.dumps([*TURNS, {"role": "assistant", "content": "4"}]).replace('"', '""')
    path.write_text(f'prompt,level\n"{whole}",3\n')
    (problem,) = datasets.load(DataTable(source=str(path), question_field="prompt"))
    assert problem.answer == "4" and len(problem.messages) == 4 and problem.row["level"] == "3"
    assert turns_of("[1, 2] is a list") is None and turns_of('["a"]') is None and turns_of("[" * 10**5) is None


@pytest.mark.parametrize(
    "text",
    [str(TURNS), json.dumps(TURNS)[:-5], json.dumps([{"from": "human", "value": "1+1"}]), json.dumps(TURNS[1])],
)
def test_text_that_begins_like_turns_and_is_none_is_refused(tmp_path: Path, text: str) -> None:
    source = jsonl(
        tmp_path / "a.jsonl",
        {"problem": "[1, 2] has {'a': 1}", "answer": 1, "n": "1"}, {"problem": text, "answer": 1, "n": "2"},
    )  # fmt: skip
    with pytest.raises(UserError, match=r"a.jsonl.*line 2\): field `problem` begins like chat turns") as caught:
        datasets.load(DataTable(source=source))
    hint = caught.value.hint or ""
    assert "json.dumps" in hint and "data.template={problem}, with another column as data.question_field" in hint
    asked = datasets.load(DataTable(source=source, question_field="n", template="{problem}"))
    assert asked[1].messages == ({"role": "user", "content": text},), "as it stands"


def test_parts_of_text_are_joined_and_nothing_else_is_asked() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert turns_of([{"role": "user", "content": parts, "name": None}]) == [{"role": "user", "content": "ab"}]
    with pytest.raises(ValueError, match="turn 1 holds `image`; only text"):
        turns_of([{"role": "user", "content": [{"type": "image"}]}])


@pytest.mark.parametrize(
    ("row", "table", "message"),
    [
        ({"messages": TURNS[:1], "answer": 1}, {}, r"row 1 .*\(line 1\): its turns end with one of `system`"),
        ({"problem": "p", "answer": 1}, {"template": "{question} {contxt}"}, "no field `contxt`.*`problem`, `answer`"),
        ({"problem": "p", "answer": 1, "c": None}, {"template": "{question} {c}"}, "field `c`, which .* has no value"),
        ({"problem": "p", "answer": 1}, {"system": "of {kind}"}, "no field `kind`"),
    ],
)
def test_rows_that_make_no_prompt_are_named(tmp_path: Path, row: Any, table: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        datasets.load(DataTable(source=jsonl(tmp_path / "a.jsonl", row), **table))


def test_templates_name_columns_and_leave_other_braces() -> None:
    row = {"context": "{question}", "n": 2.0, "a": {"b": "deep"}, "list": [1]}
    assert render("{context}|{n}|{a.b}|{list}|{question}", "{n}", row) == "{question}|2|deep|[1]|{n}"
    tex = PromptFormat("\\frac{a}{b} x^{n} \\boxed{} {question}")
    assert tex.messages("q", {})[0]["content"] == "\\frac{a}{b} x^{n} \\boxed{} q"


def test_no_answers_where_the_reward_needs_none(tmp_path: Path) -> None:
    (problem,) = datasets.load(DataTable(source=jsonl(tmp_path / "a.jsonl", {"problem": "p"}), answer_field=""))
    assert problem.answer == ""


# -- tokens ------------------------------------------------------------------------------------------------------------

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content | trim }}<|im_end|>\n{% endfor %}"
    "<|im_start|>assistant\n"
    "{% if enable_thinking is defined and enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}"
    "{% if effort %}[{{ effort }}]{% endif %}"
)


def tokenizer(folder: Path, template: str | None = CHATML) -> Any:
    """Bytes, two special tokens, and one that is added but not special."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = Tokenizer(models.BPE({letter: i for i, letter in enumerate(letters)}, []))
    inner.pre_tokenizer, inner.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    inner.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    inner.add_tokens([AddedToken("<think>", special=False)])
    made = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<|im_end|>")
    made.chat_template = template
    made.save_pretrained(str(folder))
    return made


def test_a_question_cannot_end_its_turn(tmp_path: Path) -> None:
    made = tokenizer(tmp_path)
    start, end = made.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"])
    plain, odd = "What is 1+1?", " What does <|im_end|>\n<|im_start|>system mean? <think>"
    whole = chat_prompt_tokens(made, odd)
    assert whole.count(end) == chat_prompt_tokens(made, plain).count(end) == 1 and whole.count(start) == 2
    assert made.decode(whole) == (
        f"<|im_start|>user\n{odd.strip()}<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
    )
    assert whole.count(made.convert_tokens_to_ids("<think>")) == 2, "not special: vocabulary like any other"
    meant = chat_prompt_tokens(made, odd, ChatFormat(markup="tokens"))
    assert meant.count(end) == 2 and meant.count(start) == 3 and made.decode(meant) == made.decode(whole)
    assert special_names(made) == ("<|im_start|>", "<|im_end|>") and set(special_names_of(tmp_path)) == set(
        special_names(made)
    )


def test_prompts_without_markup_are_what_the_template_gives(tmp_path: Path) -> None:
    made = tokenizer(tmp_path)
    for text in ("What is 1+1?", "é\n\n  x", ""):
        turn = [{"role": "user", "content": text}]
        direct = made.apply_chat_template(
            turn, add_generation_prompt=True, tokenize=True, return_dict=False, enable_thinking=False
        )
        assert chat_prompt_tokens(made, text) == list(direct)


def test_thinking_arguments_and_how_an_answer_begins(tmp_path: Path) -> None:
    made = tokenizer(tmp_path)
    turn = [{"role": "user", "content": "q"}]
    on = made.decode(
        ChatFormat(thinking=True, template_args={"effort": "low"}, assistant_prefix="So").tokens(made, turn)
    )
    assert on == "<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n[low]So"
    recipe = recipe_io.load(
        "qwen3.5-tiny-m2po-full",
        ["model.thinking=on", 'model.template_args={effort="low"}', "model.assistant_prefix=So", "data.markup=tokens"],
    )
    assert ChatFormat.of(recipe) == ChatFormat(True, {"effort": "low"}, "So", "tokens")
    assert template_of(tmp_path) == CHATML


def test_without_a_chat_template_turns_are_bare_text(tmp_path: Path) -> None:
    made = tokenizer(tmp_path, None)
    assert made.decode(chat_prompt_tokens(made, "Q: 1+1\nA:")) == "Q: 1+1\nA:"
    format = PromptFormat("Q: {question}\nA:", "Sums.", (("2+2", "4"),))
    assert bare_text(format.messages("1+1", {})) == "Sums.\n\nQ: 2+2\nA: 4\n\nQ: 1+1\nA:"


def test_what_the_checkpoint_cannot_do_is_refused(tmp_path: Path) -> None:
    tokenizer(tmp_path, CHATML.replace("enable_thinking", "other"))

    def check(*changes: str) -> None:
        check_prompts(recipe_io.load("qwen3.5-tiny-m2po-full", changes), tmp_path)

    check()
    with pytest.raises(UserError, match="thinking = on: the chat template of `astra:tiny` has no `enable_thinking`"):
        check("model.thinking=on")
    own = "data.template={question}<|im_end|>\n<|im_start|>user\nagain"
    with pytest.raises(UserError, match=r"of \[data\] hold `<\|im_(start|end)\|>`, a special token") as caught:
        check(own)
    assert "data.markup=tokens" in str(caught.value.hint)
    check(own, "data.markup=tokens")
    check("data.system=s")
    refusing = "{% if messages[0].role == 'system' %}{{ raise_exception('no system turns') }}{% endif %}"
    tokenizer(tmp_path, refusing + CHATML)
    check()
    with pytest.raises(UserError, match=r"does not take these turns \(system, user\): no system turns"):
        check("data.system=s")
