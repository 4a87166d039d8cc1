"""Adapters on real tiny models: exact loading, strict names, sizes against measured figures."""

from __future__ import annotations

import json
from importlib import resources
from pathlib import Path
from typing import Any

import pytest
import torch
from hybrid import row, tiny_text
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3_5Config,
    Qwen3_5ForCausalLM,
    Qwen3_5ForConditionalGeneration,
    Qwen3_5TextConfig,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from astracli.adapters import generic, llama, qwen2, qwen3, qwen3_5
from astracli.errors import UserError
from astracli.models.adapter import ModelAdapter

FAMILIES = [
    (qwen3_5.ADAPTER, Qwen3_5TextConfig, Qwen3_5ForCausalLM),
    (qwen3.ADAPTER, Qwen3Config, Qwen3ForCausalLM),
    (qwen2.ADAPTER, Qwen2Config, Qwen2ForCausalLM),
    (llama.ADAPTER, LlamaConfig, LlamaForCausalLM),
]


@pytest.fixture
def multimodal(tmp_path: Path) -> tuple[Path, Any]:
    """A tiny checkpoint in the published layout: vision tower, mtp, several shards, fp32 A_log, the rest bf16."""
    torch.manual_seed(3)
    vision = {
        "depth": 1,
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_heads": 2,
        "out_hidden_size": 32,
        "num_position_embeddings": 16,
        "patch_size": 4,
    }
    config = Qwen3_5Config(
        text_config=qwen3_5.tiny_config(), vision_config=vision, tie_word_embeddings=True, image_token_id=60
    )
    model = Qwen3_5ForConditionalGeneration(config).float().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not name.endswith("A_log"):
                parameter.copy_(parameter.bfloat16().float())
    tensors = {
        name: parameter.detach().clone() if name.endswith("A_log") else parameter.detach().bfloat16()
        for name, parameter in model.named_parameters()
    }
    tensors["mtp.fc.weight"] = torch.zeros(4, 4)
    names = sorted(tensors)
    path = tmp_path / "full"
    path.mkdir()
    config.architectures = ["Qwen3_5ForConditionalGeneration"]
    config.save_pretrained(path)
    shards = {f"model-0000{i + 1}-of-00003.safetensors": names[i::3] for i in range(3)}
    for file, held in shards.items():
        save_file({name: tensors[name] for name in held}, path / file, metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": {name: file for file, held in shards.items() for name in held}}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    return path, model


def test_text_model_out_of_the_multimodal_checkpoint_is_the_same_model(multimodal: tuple[Path, Any]) -> None:
    path, full = multimodal
    model = qwen3_5.ADAPTER.load_for_training(path, attention="sdpa")
    assert type(model).__name__ == "Qwen3_5ForCausalLM"
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert not [name for name, _ in model.named_parameters() if "visual" in name or "mtp" in name]
    a_log = model.model.layers[0].linear_attn.A_log
    assert torch.equal(a_log, full.model.language_model.layers[0].linear_attn.A_log)
    assert not torch.equal(a_log, a_log.bfloat16().float())  # really fp32, never rounded on the way
    assert model.lm_head.weight is model.model.embed_tokens.weight
    ids = row(21)
    with torch.no_grad():
        assert (model(ids).logits - full(ids).logits).abs().max() <= 1e-6


def test_missing_and_left_over_text_tensors_are_refused_by_name(multimodal: tuple[Path, Any]) -> None:
    path, _ = multimodal
    file = next(
        f for f in path.glob("*.safetensors") if "model.language_model.layers.1.linear_attn.dt_bias" in load_file(f)
    )
    tensors = load_file(file)
    tensors["model.language_model.layers.9.stray.weight"] = tensors.pop(
        "model.language_model.layers.1.linear_attn.dt_bias"
    )
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(UserError) as error:
        qwen3_5.ADAPTER.load_for_training(path, attention="sdpa")
    assert "1 missing: model.layers.1.linear_attn.dt_bias" in error.value.message
    assert "1 unexpected: model.layers.9.stray.weight" in error.value.message


def test_an_untied_head_that_the_files_lack_is_refused(tmp_path: Path) -> None:
    tiny_text(tie_word_embeddings=False).save_pretrained(tmp_path)
    assert "lm_head.weight" in qwen3_5.wire_tensors(qwen3_5.load(tmp_path))
    file = tmp_path / "model.safetensors"
    save_file({k: v for k, v in load_file(file).items() if k != "lm_head.weight"}, file, metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"missing: lm_head\.weight"):
        qwen3_5.load(tmp_path)


def test_a_broken_shard_is_named(tmp_path: Path) -> None:
    tiny_text().save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(UserError, match=r"model\.safetensors` is not a whole safetensors file"):
        qwen3_5.load(tmp_path)


@pytest.mark.parametrize(("adapter", "config_class", "model_class"), FAMILIES)
def test_every_family_loads_maps_and_counts_its_tiny_model(
    adapter: ModelAdapter, config_class: Any, model_class: Any, tmp_path: Path
) -> None:
    assert adapter.tiny_config is not None
    torch.manual_seed(0)
    config = config_class.from_dict(adapter.tiny_config())
    source = model_class(config).float().eval()
    source.save_pretrained(tmp_path)
    model = adapter.load_for_training(tmp_path, attention="sdpa")
    ids = row(13)
    with torch.no_grad():
        assert torch.equal(model(ids).logits, source(ids).logits)
    wire = adapter.wire_tensors(model)
    assert {t.name for t in wire.values()} == {name for name, _ in source.named_parameters()}
    shape = adapter.memory_shape(json.loads((tmp_path / "config.json").read_text()))
    assert shape.parameters == sum(p.numel() for p in source.parameters())
    assert len(adapter.block_classes(model)) == 1
    assert adapter.block_classes(model) == {type(model.model.layers[0]).__name__}


def test_wire_map_of_qwen3_5() -> None:
    model = tiny_text()
    wire = qwen3_5.wire_tensors(model)
    assert "lm_head.weight" not in wire
    fp32 = {t.name for t in wire.values() if t.dtype == "float32"}
    assert fp32 == {f"model.layers.{i}.linear_attn.A_log" for i in range(3)}
    assert {t.dtype for t in wire.values()} == {"float32", "bfloat16"}
    assert wire["model.layers.3.self_attn.q_proj.weight"].shape == (2 * 4 * 16, 32)
    model.model.layers[0].extra = torch.nn.Parameter(torch.zeros(2))
    with pytest.raises(UserError, match=r"1 left over: model\.layers\.0\.extra"):
        qwen3_5.wire_tensors(model)


def test_wire_names_are_free_of_wrapper_prefixes() -> None:
    model = tiny_text()
    model.model.layers[1] = torch.compile(model.model.layers[1])
    wire = qwen3_5.wire_tensors(model)
    assert wire["model.layers.1._orig_mod.linear_attn.A_log"].name == "model.layers.1.linear_attn.A_log"


LENGTHS = (37, 90, 5, 70)


def test_sizes_of_qwen3_5_4b() -> None:
    shape = qwen3_5.ADAPTER.memory_shape(qwen3_5.ADAPTER.known_configs["Qwen/Qwen3.5-4B"])
    assert shape.parameters == 4_205_751_296
    assert shape.kv_bytes_per_token == 32 * 1024
    assert round(shape.state_bytes_per_sequence / 2**20, 1) == 49.1
    assert round(shape.flops_per_token / 1e9, 1) == 25.2
    assert round(shape.parameters * 2 / 2**30, 2) == 7.83


def test_sizes_of_published_dense_models() -> None:
    small = qwen3.ADAPTER.memory_shape(qwen3.ADAPTER.known_configs["Qwen/Qwen3-1.7B"])
    big = qwen3.ADAPTER.memory_shape(qwen3.ADAPTER.known_configs["Qwen/Qwen3-8B"])
    llama3 = llama.ADAPTER.memory_shape(llama.ADAPTER.known_configs["meta-llama/Meta-Llama-3-8B-Instruct"])
    assert (small.parameters, big.parameters, llama3.parameters) == (1_720_574_976, 8_190_735_360, 8_030_261_248)
    instruct = (qwen2.KNOWN[f"Qwen/Qwen2.5-{size}-Instruct"] for size in ("0.5B", "1.5B", "3B", "7B"))
    sizes = [qwen2.ADAPTER.memory_shape(config) for config in instruct]
    # the counts that the model cards give: 0.49, 1.54, 3.09 and 7.61 B
    assert [s.parameters for s in sizes] == [494_032_768, 1_543_714_304, 3_085_938_688, 7_615_616_512]
    assert [s.kv_bytes_per_token for s in sizes] == [12_288, 28_672, 36_864, 57_344]
    assert llama3.kv_bytes_per_token == 128 * 1024
    assert llama3.flops_per_token < 6 * (llama3.parameters - 128256 * 4096)  # an untied embedding is a look-up
    assert llama3.state_bytes_per_sequence == 0


def test_every_known_config_is_the_model_that_transformers_builds() -> None:
    for adapter, config_class, model_class in FAMILIES:
        for name, known in adapter.known_configs.items():
            text = {k: v for k, v in known.get("text_config", known).items() if k != "model_type"}
            with torch.device("meta"):
                model = model_class(config_class.from_dict(text))
            assert adapter.memory_shape(known).parameters == sum(p.numel() for p in model.parameters()), name
            adapter.wire_tensors(model)


def test_qwen2_has_biases_on_query_key_and_value_alone() -> None:
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(Qwen2Config.from_dict(qwen2.ADAPTER.tiny_config()))  # type: ignore[misc]
    wire = qwen2.ADAPTER.wire_tensors(model)
    biased = {tensor.name for tensor in wire.values() if tensor.name.endswith("bias")}
    assert biased == {f"model.layers.{i}.self_attn.{x}_proj.bias" for i in range(2) for x in "qkv"}
    assert wire["model.layers.1.self_attn.k_proj.bias"].shape == (2 * 8,)
    model.model.layers[0].self_attn.o_proj.bias = torch.nn.Parameter(torch.zeros(32))
    with pytest.raises(UserError, match=r"1 left over: model\.layers\.0\.self_attn\.o_proj\.bias"):
        qwen2.ADAPTER.wire_tensors(model)


def test_engine_flags_restore_the_interval_that_text_configs_lose() -> None:
    saved = Qwen3_5TextConfig.from_dict(qwen3_5.tiny_config()).to_dict()
    assert "full_attention_interval" not in saved
    flags = qwen3_5.engine_flags(saved)
    assert json.loads(flags["json_model_override_args"]) == {"full_attention_interval": 4}
    assert "json_model_override_args" not in qwen3_5.engine_flags(qwen3_5.ADAPTER.known_configs["Qwen/Qwen3.5-4B"])


def test_text_only_config_is_one_that_sglang_reads() -> None:
    full = {"model_type": "qwen3_5", "tie_word_embeddings": True, "text_config": dict(qwen3_5.tiny_config())}
    del full["text_config"]["full_attention_interval"], full["text_config"]["tie_word_embeddings"]
    text = qwen3_5.ADAPTER.text_only_config(full)
    assert (text["model_type"], text["full_attention_interval"]) == ("qwen3_5_text", 4)
    assert text["tie_word_embeddings"] is True
    assert text["architectures"] == ["Qwen3_5ForCausalLM"]
    assert qwen3_5.ADAPTER.wire_name("model.language_model.norm.weight") == "model.norm.weight"
    assert qwen3_5.ADAPTER.wire_name("model.visual.merger.norm.weight") is None


def test_the_shipped_model_loads() -> None:
    path = Path(str(resources.files("astracli") / "assets" / "tiny"))
    model = qwen3_5.load(path)
    shape = qwen3_5.ADAPTER.memory_shape(json.loads((path / "config.json").read_text()))
    assert shape.parameters == sum(p.numel() for p in model.parameters())
    assert 500_000 < shape.parameters < 1_500_000
    assert len(qwen3_5.wire_tensors(model)) == len(list(model.parameters()))


def test_generic_takes_any_dense_model_and_refuses_a_hybrid(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=2, n_positions=64, attn_pdrop=0.1)
    source = GPT2LMHeadModel(config).eval()
    source.save_pretrained(tmp_path / "gpt2")
    model = generic.load(tmp_path / "gpt2").train()  # train mode: dropout must be off by itself
    ids = row(11)
    with torch.no_grad():
        assert torch.equal(model(ids).logits, source(ids).logits)
    assert {t.name for t in generic.ADAPTER.wire_tensors(model).values()} == {n for n, _ in source.named_parameters()}
    document = json.loads((tmp_path / "gpt2" / "config.json").read_text())
    shape = generic.memory_shape(document)
    assert shape.parameters == sum(p.numel() for p in source.parameters())
    assert shape.kv_bytes_per_token == 2 * 2 * 32 * 2
    tiny_text().save_pretrained(tmp_path / "hybrid")
    with pytest.raises(UserError, match="linear_attention layers"):
        generic.load(tmp_path / "hybrid")


def test_the_saved_text_model_loads_with_plain_transformers(tmp_path: Path, multimodal: tuple[Path, Any]) -> None:
    path, _ = multimodal
    ours = qwen3_5.load(path)
    theirs = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    ids = row(8)
    with torch.no_grad():
        assert torch.equal(ours(ids).logits, theirs.eval()(ids).logits)
