"""LoRA in the trainer: what is trained and what is not, gradients, the reference, checkpoints, ranks, exports."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from training_tools import divided, make_trainer, recipe, sample_groups, save_model, spawn, uneven_groups

from astracli.errors import RunFailed
from astracli.models import registry
from astracli.training import adapter_files, checkpoint, parity
from astracli.training.fsdp import Ranks
from astracli.training.lora_masters import LoraMasters
from astracli.training.step import Trainer

LORA: dict[str, Any] = {"rank": 3, "alpha": 6.0}
PACKED: dict[str, Any] = {"packing": "packed", "tokens_per_microbatch": 40, "learning_rate": 5e-3}
ODD = {"vocab_size": 65, "intermediate_size": 61}


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("model"), **ODD)


def with_lora(model_dir: Path, ranks: Ranks | None = None, **tables: dict[str, Any]) -> Trainer:
    tables = {"lora": LORA, "train": PACKED} | tables
    return make_trainer(model_dir, recipe(**tables), ranks)


def masters_of(trainer: Trainer) -> LoraMasters:
    assert isinstance(trainer.masters, LoraMasters)
    return trainer.masters


def drawn(trainer: Trainer) -> None:
    """Give every factor values as if it had been trained."""
    masters, draw = masters_of(trainer), torch.Generator().manual_seed(3)
    with torch.no_grad():
        for value in masters.values.values():
            value.copy_(0.1 * torch.randn(value.shape, generator=draw))
    masters.publish_to_parameters()


def in_steps(trainer: Trainer, first: int, last: int) -> list[list[float]]:
    names = ("loss", "grad_norm", "entropy", "clip_fraction")
    found = [trainer.train(uneven_groups(step), step, step).metrics for step in range(first, last)]
    return [[metrics[name] for name in names] for metrics in found]


def test_only_adapters_are_trained_and_every_projection_has_one(model_dir: Path) -> None:
    trainer = with_lora(model_dir)
    masters = masters_of(trainer)
    before = masters.wire_full()
    in_steps(trainer, 0, 2)
    after = masters.wire_full()
    changed = {name for name, tensor in before.items() if not torch.equal(tensor, after[name])}
    hybrid = ("in_proj_qkv", "in_proj_z", "in_proj_b", "in_proj_a", "out_proj")
    layers = [("linear_attn", hybrid), ("self_attn", ("q_proj", "k_proj", "v_proj", "o_proj"))]
    expected = {f"model.layers.{i}.{kind}.{n}.weight" for i, (kind, names) in enumerate(layers) for n in names}
    expected |= {f"model.layers.{i}.mlp.{n}_proj.weight" for i in (0, 1) for n in ("gate", "up", "down")}
    assert changed == expected
    factors = {name.replace("lora_A", "lora_B") for name in masters.values}
    assert factors == {name.replace(".weight", ".lora_B") for name in expected}
    shapes = [tuple(before[name].shape) for name in expected]
    total = sum(value.numel() for value in masters.values.values())
    assert total == sum(3 * (outputs + inputs) for outputs, inputs in shapes)
    assert {len(state) for state in masters.adam.adamw.state.values()} == {3}
    assert len(masters.adam.adamw.state) == len(masters.values), "moments of adapters alone"


@pytest.mark.parametrize("family", ["qwen2", "llama", "generic"])
def test_dense_families_too(family: str, tmp_path: Path) -> None:
    """Layers with a bias (qwen2), an untied head (llama), and a family of which nothing is known but its layers."""
    from transformers import AutoConfig, AutoModelForCausalLM

    adapter, like = registry.get(family), registry.get("llama" if family == "generic" else family)
    assert like.tiny_config is not None
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**like.tiny_config()))
    model.save_pretrained(tmp_path)
    chosen = recipe(lora=LORA, train=PACKED | {"parity_tolerance": 100.0}, model={"path": "x", "adapter": family})
    trainer = make_trainer(tmp_path, chosen, adapter=adapter)
    before = trainer.masters.wire_full()
    metrics = trainer.train(uneven_groups(0), 0, 0).metrics
    assert 0 < metrics["rows_gradient_error"] < 1e-4
    trainer.train(uneven_groups(1), 1, 1)
    after = trainer.masters.wire_full()
    changed = {name for name, tensor in before.items() if not torch.equal(tensor, after[name])}
    projections = ("self_attn.q", "self_attn.k", "self_attn.v", "self_attn.o", "mlp.gate", "mlp.up", "mlp.down")
    assert changed == {f"model.layers.{i}.{name}_proj.weight" for i in (0, 1) for name in projections}


def test_no_gradient_of_a_frozen_weight_is_made(model_dir: Path) -> None:
    """Neither kept nor computed: no product of the backward pass has the shape of a matrix of the model."""
    trainer = with_lora(model_dir)
    drawn(trainer)
    made: list[tuple[int, ...]] = []

    class Shapes(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor) and func.overloadpacket.__name__ in ("mm", "addmm", "_linear_pointwise"):
                made.append(tuple(out.shape))
            return out

    micro = divided(trainer, sample_groups(None, 4, seed=1)).minibatches[0][0]
    logprob_N = parity.logprobs(trainer.policy, trainer.adapter, micro, torch.device("cpu"))[0]
    with Shapes():
        logprob_N.sum().backward()
    masters = masters_of(trainer)
    frozen = {tuple(p.shape) for n, p in masters.every.items() if n not in masters.parameters and p.ndim == 2}
    assert made and not frozen & set(made), frozen & set(made)
    assert all(p.grad is None for n, p in masters.every.items())
    assert masters.grads.found().keys() == masters.values.keys()


@pytest.mark.parametrize("compute", [torch.float32, torch.bfloat16])
def test_gradients_are_those_of_the_merged_matrix(model_dir: Path, compute: torch.dtype) -> None:
    """G of the merged matrix by autograd, in a model without adapters: scale * G A^T for B, scale * B^T G for A."""
    trainer = with_lora(model_dir, Ranks(compute=compute))
    drawn(trainer)
    masters = masters_of(trainer)
    plain = make_trainer(model_dir, recipe(train=PACKED))
    with torch.no_grad():
        for name, parameter in plain.masters.every.items():
            parameter.copy_(masters.every[name])
    micro = divided(plain, sample_groups(None, 4, seed=1)).minibatches[0][0]
    for each in (trainer, plain):
        parity.logprobs(each.policy, each.adapter, micro, torch.device("cpu"))[0].sum().backward()
    found, scale = masters.grads.found(), LORA["alpha"] / LORA["rank"]
    error = 1e-4 if compute == torch.float32 else 0.15  # bf16 in every layer, against fp32
    for target in masters.adapters.targets:
        gradient = plain.masters.every[target.name].grad
        assert gradient is not None
        for key, expected in (
            ("lora_A", scale * target.b_OR.detach().T @ gradient),
            ("lora_B", scale * gradient @ target.a_RI.detach().T),
        ):
            mine = found[f"{target.module}.{key}"]
            assert mine.dtype == torch.float32
            assert (mine - expected).norm() < error * expected.norm(), (target.module, key)


@pytest.mark.parametrize("compute", [torch.float32, torch.bfloat16])
def test_the_policy_holds_what_is_published_and_that_is_rounded_once(model_dir: Path, compute: torch.dtype) -> None:
    trainer = with_lora(model_dir, Ranks(compute=compute))
    base = {name: tensor.clone() for name, tensor in masters_of(trainer).wire_full().items()}
    in_steps(trainer, 0, 2)
    masters = masters_of(trainer)
    published = masters.wire_full()
    for target in masters.adapters.targets:
        a, b = (factor.detach().double() for factor in (target.a_RI, target.b_OR))
        exact = base[target.name].double() + 2.0 * b @ a
        got = published[target.name]
        assert got.dtype == torch.bfloat16
        # one rounding: half a unit in the last place, and what fp32 sums lose
        assert ((got.double() - exact).abs() <= 2.0**-8 * exact.abs() + 1e-9).all(), target.name
        held = masters.every[target.name].detach()
        assert torch.equal(held.float(), got.float()), "what passes compute with"
    assert all(torch.equal(masters.wire_shards()[name], tensor) for name, tensor in published.items())


def test_adapters_begin_at_nothing_the_same_for_every_number_of_targets(model_dir: Path) -> None:
    every, some = with_lora(model_dir), with_lora(model_dir, lora=LORA | {"targets": ["q_proj", "in_proj_z"]})
    plain = make_trainer(model_dir, recipe()).masters.wire_full()
    for trainer in (every, some):
        assert all(torch.equal(tensor, plain[name]) for name, tensor in trainer.masters.wire_full().items())
    few, all_of_them = some.masters.values, every.masters.values
    assert {name.rsplit(".", 2)[1] for name in few} == {"q_proj", "in_proj_z"}
    assert all(torch.equal(value, all_of_them[name]) for name, value in few.items())
    a = all_of_them["model.layers.0.mlp.down_proj.lora_A"]
    assert a.abs().max() <= 1 / math.sqrt(61) and a.std() > 0.5 / math.sqrt(61)


def test_the_reference_is_the_policy_without_adapters(model_dir: Path) -> None:
    """KL to the initial model, measured without a second one: what full training's reference gives."""
    chosen = {"kl_coef": 0.01}
    trainer, full = with_lora(model_dir, algorithm=chosen), make_trainer(model_dir, recipe(algorithm=chosen))
    assert trainer.reference is None and full.reference is not None
    drawn(trainer)
    micro = divided(full, uneven_groups(1)).minibatches[0][0]
    own = parity.logprobs(trainer.policy, trainer.adapter, micro, torch.device("cpu"))[0]
    before = trainer.masters.wire_full()
    assert trainer.adapters_off is not None
    with torch.no_grad(), trainer.adapters_off():
        initial = parity.logprobs(trainer.policy, trainer.adapter, micro, torch.device("cpu"))[0]
    expected = parity.logprobs(full.reference, full.adapter, micro, torch.device("cpu"))[0]
    assert torch.allclose(initial, expected, atol=1e-5) and (own - expected).abs().max() > 0.05
    after = trainer.masters.wire_full()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items()), "and on again"
    metrics = trainer.train(uneven_groups(1), 0, 0).metrics
    assert metrics["kl"] > 1e-3


def test_packed_rows_are_proved_and_a_leak_is_seen(model_dir: Path) -> None:
    trainer = with_lora(model_dir)
    drawn(trainer)
    metrics = trainer.train(uneven_groups(0), 0, 0).metrics
    assert 0 < metrics["rows_gradient_error"] < 1e-5 and metrics["rows_max_abs"] < 1e-4
    leaking = with_lora(model_dir, train=PACKED | {"row_boundaries": "ignored"})
    drawn(leaking)
    assert leaking.train(uneven_groups(0), 0, 0).metrics["rows_gradient_error"] > 0.1


def test_a_checkpoint_holds_adapters_alone_and_the_run_goes_on_from_it(model_dir: Path, tmp_path: Path) -> None:
    whole = with_lora(model_dir)
    figures = in_steps(whole, 0, 4)
    first = with_lora(model_dir)
    in_steps(first, 0, 2)
    place = checkpoint.save(tmp_path, 2, first.masters, Ranks(), keep=1)
    count = sum(value.numel() for value in first.masters.values.values())
    assert (place / "rank_0.bin").stat().st_size < 12 * count + 8192
    found = checkpoint.read(place)
    assert found is not None and found.meta["base"]["path"] == str(model_dir)
    second = with_lora(model_dir)
    checkpoint.load(found, second.masters, Ranks())
    second.first_step = False
    assert in_steps(second, 2, 4) == figures[2:]
    expected = whole.masters.wire_full()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in second.masters.wire_full().items())


def test_a_checkpoint_of_another_base_is_refused(model_dir: Path, tmp_path: Path) -> None:
    place = checkpoint.save(tmp_path / "c", 1, with_lora(model_dir).masters, Ranks(), keep=1)
    other = with_lora(save_model(tmp_path / "other", seed=7, **ODD))
    found = checkpoint.read(place)
    assert found is not None
    with pytest.raises(RunFailed, match="are others"):
        checkpoint.load(found, other.masters, Ranks())
    with pytest.raises(RunFailed, match="another model"):
        checkpoint.load(found, make_trainer(model_dir, recipe()).masters, Ranks())


RANKS = """
import json, sys
from pathlib import Path
from safetensors.torch import save_file
from test_lora import LORA, PACKED, in_steps, with_lora
from astracli.training import checkpoint, fsdp
from astracli.weights.publish.publisher import Publisher

model_dir, out = map(Path, sys.argv[1:])
ranks = fsdp.join("cpu")
table = PACKED | {"activation_checkpointing": "full"}
trainer = with_lora(model_dir, ranks, train=table, algorithm={"kl_coef": 0.01})
masters = trainer.masters
publisher = Publisher(out / "weights", rank=ranks.rank, world_size=2, session="test", tied=masters.tied)
publisher.publish(0, masters.wire_shards())
figures = in_steps(trainer, 0, 2)
trainer.to_host()
ranks.barrier()
trainer.to_device()
checkpoint.save(out / "checkpoints", 2, masters, ranks, keep=1)
figures += in_steps(trainer, 2, 3)
publisher.publish(1, masters.wire_shards())
publisher.close()
full = masters.wire_full()
if ranks.first:
    save_file(full, out / "full.safetensors")
ranks.close()
print(json.dumps({"figures": figures, "rows": [len(t.base) for t in masters.adapters.targets]}))
"""


def test_two_ranks_equal_one(model_dir: Path, tmp_path: Path) -> None:
    outputs = [json.loads(text) for text in spawn(RANKS, [str(model_dir), str(tmp_path)], 2)]
    trainer = with_lora(model_dir, algorithm={"kl_coef": 0.01})
    assert outputs[0]["figures"] == outputs[1]["figures"]
    rows = [len(target.base) for target in masters_of(trainer).adapters.targets]
    assert [a + b for a, b in zip(*(each["rows"] for each in outputs), strict=True)] == rows
    for mine, theirs in zip(outputs[0]["figures"], in_steps(trainer, 0, 3), strict=True):
        assert mine == pytest.approx(theirs, abs=1e-5, rel=1e-3)
    got, expected = load_file(tmp_path / "full.safetensors"), trainer.masters.wire_full()
    for name, tensor in expected.items():
        one_ulp = 2.0**-7 * tensor.float().abs().clamp(min=1e-3)
        assert ((got[name].float() - tensor.float()).abs() <= one_ulp).all(), name
    differing = sum(int((got[name] != tensor).sum()) for name, tensor in expected.items())
    assert differing < 0.01 * sum(tensor.numel() for tensor in expected.values())
    # and one rank goes on from what two have left
    found, again = checkpoint.latest(tmp_path / "checkpoints"), with_lora(model_dir, algorithm={"kl_coef": 0.01})
    assert found is not None
    checkpoint.load(found, again.masters, Ranks())
    assert in_steps(again, 2, 3)[0] == pytest.approx(outputs[0]["figures"][2], abs=1e-5, rel=1e-3)


def test_an_adapter_is_written_as_peft_names_it(model_dir: Path, tmp_path: Path) -> None:
    """The key scheme of https://huggingface.co/docs/peft/en/developer_guides/checkpoint."""
    trainer = with_lora(model_dir)
    drawn(trainer)
    out = adapter_files.write(tmp_path / "a", masters_of(trainer).adapters, trainer.recipe.model, step=3)
    document = json.loads((out / "adapter_config.json").read_text())
    assert (document["peft_type"], document["r"], document["lora_alpha"]) == ("LORA", 3, 6)
    assert "in_proj_qkv" in document["target_modules"] and "q_proj" in document["target_modules"]
    tensors = load_file(out / "adapter_model.safetensors")
    name = "base_model.model.model.layers.1.self_attn.k_proj.lora_{}.weight"
    assert tensors[name.format("A")].shape == (3, 32) and tensors[name.format("B")].shape == (32, 3)
    assert len(tensors) == len(trainer.masters.values)


def test_peft_loads_the_adapter_and_merges_what_an_export_holds(model_dir: Path, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft", reason="peft is not installed")
    from transformers import AutoModelForCausalLM

    trainer = with_lora(model_dir)
    drawn(trainer)
    out = adapter_files.write(tmp_path / "a", masters_of(trainer).adapters, trainer.recipe.model, step=3)
    base = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    loaded = peft.PeftModel.from_pretrained(base, out)
    merged = loaded.merge_and_unload().state_dict()
    with torch.no_grad():
        for target in masters_of(trainer).adapters.targets:
            exact = target.base.float() + 2.0 * target.b_OR @ target.a_RI
            # the file's weights are fp32, W is what the engine holds of them
            assert torch.allclose(merged[target.name], exact, atol=4e-3), target.name
            assert (merged[target.name] - target.base.float()).abs().max() > 0.01
