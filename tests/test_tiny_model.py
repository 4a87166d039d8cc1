"""The shipped tiny model is what the README says: a small hybrid that plain transformers loads, unsure but able."""

from __future__ import annotations

import json
from importlib.resources import files
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from astracli.data import arithmetic
from astracli.models.adapter import chat_prompt_tokens, load_tokenizer
from astracli.rewards.grader import grade_math

TINY = Path(str(files("astracli") / "assets" / "tiny"))


@torch.inference_mode()
def share_right(*, samples: int, temperature: float) -> float:
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    model = AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32).eval()
    items = arithmetic.held_out()[::2]
    assert len(items) == 128
    right = 0
    for length in sorted({len(p.question) for p in items}):
        same = [p for p in items if len(p.question) == length]
        ids = torch.tensor([chat_prompt_tokens(tokenizer, p.question) for p in same]).repeat_interleave(samples, 0)
        sampling = {"do_sample": True, "temperature": temperature, "top_k": 0} if temperature else {"do_sample": False}
        out = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=24, **sampling)
        texts = tokenizer.batch_decode(out[:, ids.shape[1] :], skip_special_tokens=True)
        right += sum(grade_math(same[i // samples].answer, text) == "right" for i, text in enumerate(texts))
    return right / (len(items) * samples)


def test_sampling_is_weak_and_greedy_is_clearly_better() -> None:
    sampled, greedy = share_right(samples=2, temperature=1.0), share_right(samples=1, temperature=0.0)
    assert 0.25 <= sampled <= 0.45, f"avg@2 at temperature 1: {sampled:.3f}"
    assert greedy >= sampled + 0.3, f"greedy {greedy:.3f}, sampled {sampled:.3f}"


def test_it_is_small_and_shaped_like_the_published_hybrid() -> None:
    assert sum(f.stat().st_size for f in TINY.iterdir()) < 3_000_000
    config = json.loads((TINY / "config.json").read_text())
    assert config["model_type"] == "qwen3_5_text"
    assert config["layer_types"] == ["linear_attention"] * 3 + ["full_attention"]
    assert config["full_attention_interval"] == 4, "engines ask for it; transformers does not write it"
    model = AutoModelForCausalLM.from_pretrained(TINY, dtype="auto")
    assert 0.5e6 < sum(p.numel() for p in model.parameters()) < 1.5e6


@pytest.mark.parametrize("question", ["37+45", "82-45", "907+186", "500-123"])
def test_text_survives_the_tokenizer(question: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    text = arithmetic.worked_text(question)
    tokens = tokenizer(text)["input_ids"]
    assert tokenizer.decode(tokens) == text
    assert tokenizer.unk_token_id not in tokens
    assert len(tokens) < 24, "a whole solution fits the recipe's completion"
    assert tokenizer.decode(chat_prompt_tokens(tokenizer, question)) == question + "="


def test_a_process_without_a_model_reads_the_same_tokenizer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, quick = AutoTokenizer.from_pretrained(TINY), load_tokenizer(TINY)
    assert type(quick) is type(whole) and quick.init_kwargs == whole.init_kwargs
    assert quick("3+44=")["input_ids"] == whole("3+44=")["input_ids"] and quick.chat_template == whole.chat_template
    monkeypatch.setattr(AutoTokenizer, "from_pretrained", lambda path, **_: path)
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "LlamaTokenizer"}')
    assert load_tokenizer(tmp_path) == str(tmp_path), "a family's own class is AutoTokenizer's to find"
