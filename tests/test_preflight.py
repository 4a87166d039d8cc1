"""What a checkpoint's config and files say that a run could not do rightly: refused before the start, or handled."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from astracli.cli.main import app
from astracli.config import recipe_io
from astracli.data import fetch
from astracli.engines.embedded.plugin import ENGINE
from astracli.errors import UserError
from astracli.launch import inputs, run
from astracli.models import preflight, registry
from astracli.models.adapter import read_config
from astracli.training import setup
from astracli.training.export import export
from astracli.training.fsdp import Ranks

TINY = "qwen3.5-tiny-m2po-delta"
Edit = Callable[[Path], None]


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return Path(shutil.copytree(fetch.bundled("astra:tiny"), tmp_path / "model"))


def config(**values: Any) -> Edit:
    def edit(folder: Path) -> None:
        file = folder / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | values))

    return edit


def tensors(change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> Edit:
    def edit(folder: Path) -> None:
        file = folder / "model.safetensors"
        held = load_file(file)
        save_file(held | change(held), file, metadata={"format": "pt"})

    return edit


def token(name: str, token_id: int) -> Edit:
    """One more token of the tokenizer, in the vocabulary itself."""

    def edit(folder: Path) -> None:
        file = folder / "tokenizer.json"
        document = json.loads(file.read_text())
        document["model"]["vocab"][name] = token_id
        file.write_text(json.dumps(document))

    return edit


def added(name: str, template: bool) -> Edit:
    """A token behind the vocabulary, which the chat template uses or nobody does."""

    def edit(folder: Path) -> None:
        file = folder / "tokenizer.json"
        document = json.loads(file.read_text())
        kind = {"special": True, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
        document["added_tokens"].append({"id": 32, "content": name} | kind)
        file.write_text(json.dumps(document))
        if template:
            (folder / "chat_template.jinja").write_text("{{ messages }}" + name)

    return edit


def sentencepiece_alone(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer.model").write_bytes(b"\x0a\x0e\x0a\x05<unk>\x15\x00\x00\x00\x00\x18\x02")
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "LlamaTokenizer", "unk_token": "<unk>"}')


EMBEDDING = "model.embed_tokens.weight"
REFUSED: dict[str, tuple[Edit, str]] = {
    "quantized": (config(quantization_config={"quant_method": "awq", "bits": 4}), r"is quantized \(awq\)"),
    "quantized, nested": (config(text_config={"quantization_config": {"quant_method": "fp8"}}), r"quantized \(fp8\)"),
    "fp8": (
        tensors(lambda held: {EMBEDDING: held[EMBEDDING].to(torch.float8_e4m3fn)}),
        r"holds quantized tensors \(F8_E4M3\)",
    ),
    "softcap": (config(final_logit_softcapping=30.0), r"caps its logits \(final_logit_softcapping = 30"),
    "positions": (config(max_position_embeddings=32), r"context_length = 64, but .* has 32 positions"),
    "learned positions": (config(max_position_embeddings=None, n_positions=32), r"has 32 positions \(n_positions"),
    "yarn": (
        config(max_position_embeddings=8, rope_parameters={"rope_type": "yarn", "factor": 4.0, "rope_theta": 1.0}),
        "has 32 positions",
    ),
    "dynamic": (
        config(max_position_embeddings=32, rope_parameters={"rope_type": "dynamic", "factor": 4.0}),
        r"32 positions \(its rope is `dynamic`, .* the longest row beside it",
    ),
    "longrope": (
        config(rope_parameters={"rope_type": "longrope", "original_max_position_embeddings": 40}),
        r"40 positions \(its rope is `longrope`",
    ),
    "other head": (
        tensors(lambda held: {"lm_head.weight": held[EMBEDDING] + 1}),
        r"tie_word_embeddings = true, but its `lm_head.weight` is not its `model.embed_tokens.weight`",
    ),
    "head of another dtype": (tensors(lambda held: {"lm_head.weight": held[EMBEDDING].float()}), "`lm_head.weight` is"),
    "left over": (tensors(lambda held: {"model.extra": held[EMBEDDING].clone()}), "1 left over: model.extra"),
    "larger tokenizer": (token("zz", 40), r"ids up to 40, the model has 32 .* 1 token has no row, for example `zz`"),
    "template's token": (added("<turn>", template=True), "for example `<turn>`"),
    "sentencepiece": (sentencepiece_alone, r"has no tokenizer.json, and transformers cannot build one from tokenizer"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_by_what_it_is(checkpoint: Path, name: str) -> None:
    edit, message = REFUSED[name]
    recipe = recipe_io.load(TINY)
    inputs.check_checkpoint(checkpoint, recipe)
    edit(checkpoint)
    with pytest.raises(UserError, match=message) as caught:
        inputs.check_checkpoint(checkpoint, recipe)
    assert caught.value.hint


@pytest.mark.parametrize(
    "edit",
    [
        tensors(lambda held: {"lm_head.weight": held[EMBEDDING].clone()}),
        tensors(lambda held: {"model.layers.3.self_attn.rotary_emb.inv_freq": torch.ones(4)}),
        tensors(lambda held: {"model.layers.3.attention.bias": torch.ones(1, 1, 4, 4, dtype=torch.bool)}),
        added("<pad>", template=False),
        config(max_position_embeddings=16, rope_parameters={"rope_type": "yarn", "factor": 4.0, "rope_theta": 1.0}),
        config(max_position_embeddings=64, rope_parameters={"rope_type": "dynamic", "factor": 4.0}),
        config(quantization_config=None, final_logit_softcapping=None),
    ],
    ids=["same head", "inv_freq", "mask", "unused token", "yarn", "dynamic within", "null"],
)
def test_what_is_computed_rightly_is_taken(checkpoint: Path, edit: Edit) -> None:
    edit(checkpoint)
    inputs.check_checkpoint(checkpoint, recipe_io.load(TINY))


def test_the_hint_of_too_few_positions_is_not_refused(checkpoint: Path) -> None:
    config(max_position_embeddings=16)(checkpoint)
    recipe = recipe_io.load(TINY, [f"model.path={checkpoint}"])
    with pytest.raises(UserError) as caught:
        run.train(recipe, run_dir=checkpoint.parent / "r")
    assert caught.value.hint is not None
    sets = [part.split("=", 1) for part in caught.value.hint.split("`") if part.startswith("--set ")]
    again = recipe_io.load(TINY, [f"model.path={checkpoint}", *(f"{k.removeprefix('--set ')}={v}" for k, v in sets)])
    assert (again.rollout.context_length, again.rollout.max_new_tokens) == (16, 8)
    inputs.check_checkpoint(checkpoint, again)


def test_start_dry_run_and_doctor_say_the_same(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(checkpoint.parent)
    tensors(lambda held: {"lm_head.weight": held[EMBEDDING] + 1})(checkpoint)
    wrong = {
        "model.path": "./model",
        "data.reward": "maths",
        "data.source": "/no/rows.jsonl",
        "launch.host": "192.0.2.1",
        "metrics.sinks": '["wandbb"]',
        "eval.benchmarks": '["/no/benchmark.jsonl"]',
    }
    sets = [part for key, value in wrong.items() for part in ("--set", f"{key}={value}")]
    sets += ["--set", "launch.network=private"]
    dry = CliRunner().invoke(app, ["train", TINY, "--dry-run", "--json", *sets])
    assert dry.exit_code == 2, dry.output
    told = {(entry["message"], entry["hint"]) for entry in json.loads(dry.stdout)["start"]}
    report = CliRunner().invoke(app, ["doctor", TINY, "--no-probe", "--json", *sets])
    assert report.exit_code == 1
    found = {
        (check["value"], check["fix"]) for check in json.loads(report.stdout)["checks"] if check["group"] == "start"
    }
    assert told == found and len(told) == len(wrong)
    for key, value in wrong.items():
        with pytest.raises(UserError) as caught:
            run.train(recipe_io.load(TINY, [f"{key}={value}", "launch.network=private"]), run_dir=Path("r"))
        assert (caught.value.message, caught.value.hint or "") in told
    assert not Path("r").exists()


def tiny(kind: str, folder: Path, **values: Any) -> Any:
    """A random model of a family, saved in fp32, with the tokenizer of `astra:tiny`."""
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = {"vocab_size": 32, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **sizes, **heads, **values)).float()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_((4 * parameter).bfloat16())  # far from uniform: a wrong factor or window shows
    model.save_pretrained(folder)
    for file in fetch.bundled("astra:tiny").glob("*token*"):
        shutil.copyfile(file, folder / file.name)
    return model.eval()


def logprobs(model: Any, prompt: list[int], tokens: np.ndarray) -> torch.Tensor:
    row = torch.tensor([[*prompt, *tokens]])
    with torch.no_grad():
        found = model(row).logits[0].log_softmax(-1)
    return found[len(prompt) - 1 : -1].gather(1, row[0, len(prompt) :, None])[:, 0]


def test_a_factor_on_the_logits_is_trained_with(tmp_path: Path) -> None:
    model = tiny("granite", tmp_path, logits_scaling=0.25, embedding_multiplier=2.0)
    assert preflight.logit_factor(read_config(tmp_path)) == 4.0
    recipe = recipe_io.load(TINY, [f"model.path={tmp_path}", "model.adapter=generic", "algorithm.kl_coef=0"])
    trainer = setup.build_trainer(tmp_path, registry.get("generic"), recipe, Ranks(), attention="sdpa")
    row, at = torch.tensor([[3, 5, 7, 9, 11]]), torch.arange(4)
    found, _ = trainer.policy(row, None, None, at, row[0, 1:])
    assert torch.allclose(found, logprobs(model, [3], row[0, 1:].numpy()), atol=1e-4)
    assert found.std() > 0.5


def test_the_embedded_engine_serves_a_window_as_long_as_its_context(tmp_path: Path) -> None:
    model = tiny("mistral", tmp_path, sliding_window=64)
    prompts = [[3, 5, 7], [9, 11, 4, 6, 8]]
    drawn = ENGINE.sample(registry.get("generic"), tmp_path, prompts, 50)
    for prompt, (tokens, said) in zip(prompts, drawn, strict=True):
        assert torch.allclose(torch.from_numpy(said), logprobs(model, prompt, tokens), atol=1e-4)
    sets = [f"model.path={tmp_path}", "model.adapter=generic", "eval.every=0"]
    assert not run.planned(recipe_io.load(TINY, [*sets, "rollout.context_length=64"]), "train").missing
    plan = run.planned(recipe_io.load(TINY, [*sets, "rollout.context_length=65"]), "train")
    assert any("layers that see the last 64 tokens" in problem.message for problem in plan.problems if problem.blocking)


def test_an_export_keeps_frequencies_that_nobody_trains(checkpoint: Path) -> None:
    name = "model.layers.3.self_attn.rotary_emb.inv_freq"
    trained = load_file(checkpoint / "model.safetensors")
    tensors(lambda held: {name: torch.full((4,), 0.5)})(checkpoint)
    out = export(checkpoint.parent / "out", checkpoint, trained, registry.get("qwen3_5"))
    assert torch.equal(load_file(out / "model.safetensors")[name], torch.full((4,), 0.5))
