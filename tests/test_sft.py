"""Supervised training: which tokens an example trains, the loss of a step by hand, and ranks."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from chat_models import ENDS, tokenizer
from safetensors.torch import load_file
from training_tools import make_trainer, recipe, save_model, spawn

from astracli.adapters.qwen3_5 import ADAPTER
from astracli.config.recipe import Recipe
from astracli.data import arithmetic, datasets, fetch
from astracli.data.examples import Example, ExampleTokens
from astracli.errors import UserError
from astracli.launch import example_inputs
from astracli.models.adapter import load_tokenizer
from astracli.models.chat import ChatFormat
from astracli.rl.batch import pad_rows
from astracli.rl.rows import Row
from astracli.rl.types import Group, Sample, Segment
from astracli.training import packing, random_weights
from astracli.training.batches import group_of
from astracli.training.supervised import Targets, train_on_examples

GOOD = ("qwen3_5", "qwen2_5", "llama3", "smollm")


def asking(**tables: dict[str, Any]) -> Recipe:
    return recipe(**({"sft": {}} | tables))


def examples(tmp_path: Path, rows: Sequence[dict[str, Any]], name: str = "qwen3_5", **tables: Any) -> list[Example]:
    """The rows of a file as examples, by a chat template's name."""
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    table = {"source": str(file)} | tables.pop("data", {})
    chosen = asking(data=table, **tables)
    made = ExampleTokens(chosen, tokenizer(name))
    return [made(problem) for problem in datasets.load(chosen.training_data, file)]


def trained(example: Example, name: str) -> list[str]:
    return [tokenizer(name).decode(ids) for ids, learned in example.parts if learned]


def whole(example: Example) -> list[int]:
    return [*example.prompt, *(token for ids, _ in example.parts for token in ids)]


TALK = [
    {"role": "system", "content": "be brief"},
    {"role": "user", "content": "1+1"},
    {"role": "assistant", "content": "two"},
    {"role": "user", "content": "and 2+2"},
    {"role": "assistant", "content": "four"},
]


@pytest.mark.parametrize("name", GOOD)
def test_assistant_turns_are_trained_with_the_token_that_ends_them(name: str, tmp_path: Path) -> None:
    (one,) = examples(tmp_path, [{"messages": TALK}], name)
    end, coder = ENDS.get(name, "<|im_end|>"), tokenizer(name)
    assert trained(one, name) == [f"two{end}", f"four{end}"]
    chat = ChatFormat()
    assert one.prompt == chat.tokens(coder, TALK[:2]), "asked as a rollout asks"
    (last,) = examples(tmp_path, [{"messages": TALK}], name, sft={"loss_on": "last"})
    assert trained(last, name) == [f"four{end}"]
    assert last.prompt == chat.tokens(coder, TALK[:4])


def test_a_column_of_answers_comes_before_the_rows_own_last_turn_and_shown_examples_are_not_trained(
    tmp_path: Path,
) -> None:
    rows = [
        {"problem": "1+1", "completion": "two <|im_end|>"},
        {"problem": TALK[:4], "completion": [{"role": "assistant", "content": "4"}]},
        {"problem": TALK},
    ]
    shots = [{"question": "0+0", "answer": "zero"}]
    first, second, third = examples(
        tmp_path, rows, data={"few_shot": shots, "template": "say {question}", "system": "sum"}
    )
    assert trained(first, "qwen3_5") == ["two <|im_end|><|im_end|>"]
    letters = first.parts[0][0]
    special = tokenizer("qwen3_5").convert_tokens_to_ids("<|im_end|>")
    assert letters.count(special) == 1 and letters[-1] == special, "markup in an answer is letters"
    said = tokenizer("qwen3_5").decode(first.prompt)
    assert "zero" in said and "say 1+1" in said and "sum" in said
    assert trained(second, "qwen3_5") == ["two<|im_end|>", "4<|im_end|>"]
    assert trained(third, "qwen3_5") == ["two<|im_end|>", "four<|im_end|>"]


def test_a_base_model_without_a_template_learns_its_end_of_sequence(tmp_path: Path) -> None:
    (one,) = examples(tmp_path, [{"problem": "1+1=", "completion": "2"}], "")
    assert tokenizer("").decode(whole(one)) == "1+1=2<|im_end|>" and trained(one, "") == ["2<|im_end|>"]


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"problem": "1+1"}, "there is no column `completion`, and no chat turns that end with one"),
        ({"problem": "1+1", "completion": " "}, "`completion` is empty"),
        ({"problem": TALK[:2]}, "no chat turns that end with one"),
    ],
)
def test_a_row_without_an_answer_is_named_before_a_start(row: dict[str, Any], said: str, tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(each) + "\n" for each in ({"problem": "0", "completion": "0", "id": "a"}, row)))
    chosen = asking(data={"source": str(file)}, model={"path": "astra:tiny"})
    with pytest.raises(UserError, match=said) as raised:
        example_inputs.check(chosen, fetch.bundled("astra:tiny"), {"": file})
    assert "row `1`" in raised.value.message


def test_a_template_that_cannot_be_rendered_in_parts_trains_the_last_turn_alone(tmp_path: Path) -> None:
    numbered = "{% for m in messages %}{{ loop.length }}{{ m.role }}: {{ m.content }}<|im_end|>{% endfor %}"
    with pytest.raises(UserError, match="in parts") as raised:
        examples(tmp_path, [{"messages": TALK}], numbered)
    assert raised.value.hint is not None and "sft.loss_on=last" in raised.value.hint
    (last,) = examples(tmp_path, [{"messages": TALK}], numbered, sft={"loss_on": "last"})
    assert trained(last, numbered) == ["four<|im_end|>"]


def test_examples_that_are_too_long_are_told_before_a_start(tmp_path: Path) -> None:
    chosen = asking(rollout={"context_length": 12, "max_new_tokens": 8}, model={"path": "astra:tiny"})
    with pytest.raises(UserError, match=r"none of the first 64 examples fits into rollout.context_length = 12"):
        example_inputs.check(chosen, fetch.bundled("astra:tiny"), {"": None})


# ---- a step ----------------------------------------------------------------------------------------------------------


def made_up(count: int, seed: int = 0, vocab: int = 64) -> list[Group]:
    """Examples of random tokens with one or two trained turns."""
    draw = np.random.default_rng(seed)
    found = []
    for index in range(count):
        parts = []
        for number in range(draw.integers(1, 3)):
            if number:
                parts.append(Segment(None, draw.integers(2, vocab, 3).astype(np.int32), np.zeros(0, np.float32)))
            size = int(draw.integers(2, 9))
            parts.append(Segment(0, draw.integers(2, vocab, size).astype(np.int32), np.zeros(size, np.float32)))
        prompt = draw.integers(2, vocab, draw.integers(2, 6)).astype(np.int32)
        found.append(Group(index, f"e{index}", prompt, [Sample(0, parts, "stop")]))
    return found


def rows_of(groups: Sequence[Group]) -> list[Row]:
    return [Row(index, group, group.samples[0], 0.0) for index, group in enumerate(groups)]


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("model"))


@torch.no_grad()
def cross_entropy(model: Any, groups: Sequence[Group]) -> float:
    """The mean over all trained tokens, row by row, from the logits."""
    total, count = 0.0, 0
    for row in rows_of(groups):
        ids = torch.from_numpy(row.tokens.astype(np.int64))
        logprobs = model(input_ids=ids[None]).logits[0].float().log_softmax(-1)
        mask = np.concatenate([np.zeros(row.prompt_length, bool), row.sample.loss_mask])
        for place in np.flatnonzero(mask):
            total -= float(logprobs[place - 1, ids[place]])
            count += 1
    return total / count


@pytest.mark.parametrize("way", ["packed", "padded"])
def test_the_loss_is_the_mean_cross_entropy_of_trained_tokens(model_dir: Path, way: str) -> None:
    chosen = asking(train={"minibatches": 1, "batch_groups": 6, "packing": way}, rollout={"temperature": 0.5})
    trainer, groups = make_trainer(model_dir, chosen), made_up(6)
    expected = cross_entropy(trainer.policy.model, groups)
    result = train_on_examples(trainer, groups, 0, None)
    assert result.metrics["loss"] == pytest.approx(expected, abs=1e-5), "the rollout's temperature plays no part"
    assert result.metrics["tokens"] == sum(row.loss_tokens for row in rows_of(groups))
    assert result.metrics["updates"] == 1 and result.metrics["rows_max_abs"] < 1e-4
    assert cross_entropy(trainer.policy.model, groups) < expected


def test_smoothed_labels_are_drawn_for_a_share_of_the_targets_whatever_the_packing() -> None:
    groups = made_up(200)
    rows, targets = rows_of(groups), Targets(0.25, [7, 9], seed=3)
    micro = packing.pack_rows(rows)
    drawn, own = targets.of(micro, 5), micro.target_N
    changed = drawn != own
    assert set(drawn[changed].tolist()) == {7, 9}
    assert np.mean(changed) == pytest.approx(0.25, abs=0.04)
    padded = [targets.of(pad_rows([row], 0), 5) for row in rows]
    assert (np.concatenate(padded) == drawn).all()
    assert not (targets.of(micro, 6) == drawn).all()


def test_the_tokens_of_smoothed_labels_are_those_of_texts_and_the_end() -> None:
    coder = load_tokenizer(fetch.bundled("astra:tiny"))
    found = ExampleTokens(asking(), coder).writable
    assert found == [1, *range(3, len(coder))], "neither <pad> nor <unk>"


SCRIPT = """
import json, sys
from pathlib import Path
from test_sft import asking, made_up
from training_tools import make_trainer
from astracli.training import fsdp
from astracli.training.supervised import Targets, train_on_examples
ranks = fsdp.join("cpu")
trainer = make_trainer(Path(sys.argv[1]), asking(train={"batch_groups": 7}), ranks)
found = [train_on_examples(trainer, made_up(7, step), step, Targets(0.1, [5, 6], 0)).metrics for step in range(2)]
print(json.dumps([[one[name] for name in ("loss", "grad_norm", "tokens", "entropy")] for one in found]))
ranks.close()
"""


def test_two_ranks_train_as_one_does(model_dir: Path) -> None:
    alone = make_trainer(model_dir, asking(train={"batch_groups": 7}))
    each = [train_on_examples(alone, made_up(7, step), step, Targets(0.1, [5, 6], 0)).metrics for step in range(2)]
    expected = [[one[name] for name in ("loss", "grad_norm", "tokens", "entropy")] for one in each]
    first, second = (json.loads(text) for text in spawn(SCRIPT, [str(model_dir)], 2))
    assert first == second
    assert np.array(first) == pytest.approx(np.array(expected), rel=1e-4)


def test_generated_examples_are_the_worked_solutions() -> None:
    coder = load_tokenizer(fetch.bundled("astra:tiny"))
    problem = arithmetic.draw(3, 0)
    one = ExampleTokens(asking(), coder)(replace(problem, messages=({"role": "user", "content": problem.question},)))
    text = f"{problem.question}={arithmetic.worked_text(problem.question)}"
    assert coder.decode(whole(one)) == f"{text}<eos>"
    group = group_of(8, problem, one)
    assert group.samples[0].drawn == len(one.parts[0][0]) and group.lease_id == 8


def test_random_weights_have_the_names_of_the_checkpoint_and_other_values(tmp_path: Path) -> None:
    source = fetch.bundled("astra:tiny")
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        random_weights.write(source, tmp_path / name, ADAPTER, seed)
    a, b, c, own = (load_file(place / "model.safetensors") for place in (*map(tmp_path.joinpath, "abc"), source))
    assert a.keys() == own.keys() and all(a[name].dtype == own[name].dtype for name in own)
    assert all(torch.equal(a[name], b[name]) for name in own)
    assert not torch.equal(a["model.embed_tokens.weight"], c["model.embed_tokens.weight"])
    assert not torch.equal(a["model.embed_tokens.weight"], own["model.embed_tokens.weight"])
    assert (tmp_path / "a" / "tokenizer.json").is_file()
