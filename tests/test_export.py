"""An export loads back with plain transformers, keeps the layout it came from, and fits SGLang's naming rules."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from training_tools import make_trainer, recipe, sample_groups, save_model

from astracli.adapters.qwen3_5 import ADAPTER
from astracli.errors import RunFailed
from astracli.training.export import SHARD_INDEX, export, frozen_tensors
from astracli.training.step import Trainer


@pytest.fixture(scope="module")
def text_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = save_model(tmp_path_factory.mktemp("text"))
    (directory / "tokenizer_config.json").write_text('{"a": 1}')
    (directory / "chat_template.jinja").write_text("{{ messages }}")
    return directory


@pytest.fixture(scope="module")
def full_dir(text_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same text model inside a multimodal checkpoint of two shards, with a vision tower and an mtp head."""
    directory = tmp_path_factory.mktemp("full")
    tensors = load_file(text_dir / "model.safetensors")
    renamed = {name.replace("model.", "model.language_model.", 1): t.bfloat16() for name, t in tensors.items()}
    renamed = {name: t.float() if "A_log" in name else t for name, t in renamed.items()}
    renamed["model.visual.blocks.0.weight"] = torch.arange(6.0).bfloat16().reshape(2, 3)
    renamed["mtp.fc.weight"] = torch.arange(4.0).bfloat16()
    names = sorted(renamed)
    weight_map = {}
    for number, part in enumerate((names[:20], names[20:]), 1):
        file = f"model-{number:05d}-of-00002.safetensors"
        save_file({name: renamed[name] for name in part}, directory / file)
        weight_map |= dict.fromkeys(part, file)
    (directory / SHARD_INDEX).write_text(json.dumps({"metadata": {"total_size": 0}, "weight_map": weight_map}))
    text_config = json.loads((text_dir / "config.json").read_text())
    for key in ("full_attention_interval", "architectures"):
        text_config.pop(key, None)
    (directory / "config.json").write_text(
        json.dumps({"model_type": "qwen3_5", "text_config": text_config, "tie_word_embeddings": True})
    )
    for name in ("tokenizer_config.json", "preprocessor_config.json", "LICENSE"):
        (directory / name).write_text("{}")
    (directory / "notes.bin").write_text("weights of another kind")
    return directory


def trained(model_dir: Path) -> Trainer:
    trainer = make_trainer(model_dir, recipe())
    trainer.train(sample_groups(None, 4, seed=0, version=-1), 0, 0)
    return trainer


def names_of(directory: Path) -> dict[str, tuple[int, ...]]:
    found: dict[str, tuple[int, ...]] = {}
    for file in directory.glob("*.safetensors"):
        with safe_open(file, framework="pt") as source:
            found |= {name: tuple(source.get_slice(name).get_shape()) for name in source.keys()}  # noqa: SIM118
    return found


def logits_of(model: Any) -> torch.Tensor:
    with torch.no_grad():
        result: torch.Tensor = model(input_ids=torch.tensor([[5, 9, 12, 40, 3, 7]])).logits
    return result


def load_plain(directory: Path) -> Any:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    if ADAPTER.prepare_cpu is not None:
        ADAPTER.prepare_cpu(model)
    return model


def test_a_text_model_loads_back_with_the_same_logits(text_dir: Path, tmp_path: Path) -> None:
    trainer = trained(text_dir)
    out = export(tmp_path / "export", text_dir, trainer.masters.wire_full(), ADAPTER)
    assert names_of(out) == names_of(text_dir)
    assert not torch.equal(logits_of(load_plain(out)), logits_of(load_plain(text_dir)))
    assert torch.equal(logits_of(load_plain(out)), logits_of(trainer.policy.model))
    assert (out / "chat_template.jinja").read_text() == "{{ messages }}"


def test_a_multimodal_checkpoint_keeps_its_layout(full_dir: Path, tmp_path: Path) -> None:
    trainer = trained(full_dir)
    out = export(tmp_path / "export", full_dir, trainer.masters.wire_full(), ADAPTER)
    assert names_of(out) == names_of(full_dir)
    index = json.loads((out / SHARD_INDEX).read_text())
    assert index["weight_map"] == json.loads((full_dir / SHARD_INDEX).read_text())["weight_map"]
    before, after = {}, {}
    for file in sorted(full_dir.glob("*.safetensors")):
        before |= load_file(file)
        after |= load_file(out / file.name)
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in after.values())
    for name in ("model.visual.blocks.0.weight", "mtp.fc.weight"):
        assert torch.equal(before[name], after[name])
    text = [n for n in before if n.startswith("model.language_model.") and before[n].ndim == 2]
    assert all(not torch.equal(before[n], after[n]) for n in text)
    assert {n: t.dtype for n, t in before.items()} == {n: t.dtype for n, t in after.items()}
    same = ["LICENSE", "config.json", "preprocessor_config.json", "tokenizer_config.json"]
    assert sorted(p.name for p in out.iterdir() if p.suffix != ".safetensors") == sorted([*same, SHARD_INDEX])
    assert (out / "config.json").read_bytes() == (full_dir / "config.json").read_bytes()
    model = ADAPTER.load_for_training(out, attention="sdpa")
    assert ADAPTER.prepare_cpu is not None
    ADAPTER.prepare_cpu(model)
    assert torch.equal(logits_of(model), logits_of(trainer.policy.model))


def test_text_only_fits_a_text_server(full_dir: Path, tmp_path: Path) -> None:
    trainer = trained(full_dir)
    out = export(tmp_path / "export", full_dir, trainer.masters.wire_full(), ADAPTER, text_only=True)
    names = names_of(out)
    assert all(n.startswith(("model.layers.", "model.embed_tokens.", "model.norm.")) for n in names)
    assert len(names) == len(trainer.masters.values)
    assert "lm_head.weight" not in names
    config = json.loads((out / "config.json").read_text())
    assert config["model_type"] == "qwen3_5_text"
    assert config["architectures"] == ["Qwen3_5ForCausalLM"]
    assert config["full_attention_interval"] == 2
    assert not (out / "preprocessor_config.json").exists()
    assert (out / "tokenizer_config.json").exists()
    model = load_plain(out)
    assert type(model).__name__ == "Qwen3_5ForCausalLM"
    assert torch.equal(logits_of(model), logits_of(trainer.policy.model))


def test_an_export_replaces_an_older_one_whole(text_dir: Path, tmp_path: Path) -> None:
    tensors = trained(text_dir).masters.wire_full()
    out = tmp_path / "export"
    out.mkdir()
    (out / "old.safetensors").write_text("old")
    export(out, text_dir, tensors, ADAPTER)
    assert not (out / "old.safetensors").exists()
    assert [p.name for p in tmp_path.iterdir()] == ["export"]


def test_tensors_that_do_not_fit_are_named(text_dir: Path, tmp_path: Path) -> None:
    tensors = trained(text_dir).masters.wire_full()
    out = tmp_path / "export"
    with pytest.raises(RunFailed, match=r"1 tensors not in the source: model\.layers\.9\.x"):
        export(out, text_dir, tensors | {"model.layers.9.x": torch.zeros(1)}, ADAPTER)
    less = {name: t for name, t in tensors.items() if name != "model.norm.weight"}
    with pytest.raises(RunFailed, match=r"1 tensors not trained: model\.norm\.weight"):
        export(out, text_dir, less, ADAPTER)
    with pytest.raises(RunFailed, match=r"1 tensors of another shape: model\.norm\.weight \[32\] -> \[31\]"):
        export(out, text_dir, tensors | {"model.norm.weight": torch.zeros(31)}, ADAPTER)
    assert list(tmp_path.iterdir()) == []


def test_large_text_exports_are_split(text_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("astracli.training.export.SHARD_BYTES", 20_000)
    trainer = trained(text_dir)
    out = export(tmp_path / "export", text_dir, trainer.masters.wire_full(), ADAPTER, text_only=True)
    assert len(list(out.glob("*.safetensors"))) > 2
    assert torch.equal(logits_of(load_plain(out)), logits_of(trainer.policy.model))


def test_frozen_tensors_are_those_that_are_never_trained(full_dir: Path, text_dir: Path) -> None:
    assert sorted(frozen_tensors(full_dir, ADAPTER)) == ["model.visual.blocks.0.weight", "mtp.fc.weight"]
    assert frozen_tensors(text_dir, ADAPTER) == {}
