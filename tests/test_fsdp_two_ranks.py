"""Two real ranks over gloo do what one does: the same losses, the same published tensors, the same export; whatever
they divide among them (`train.sharding`).

The model's sizes are odd, so that shards are uneven; one row is so long that its rank has fewer micro-batches.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from safetensors.torch import load_file
from training_tools import make_trainer, recipe, save_model, spawn, uneven_groups

from astracli.adapters.qwen3_5 import ADAPTER
from astracli.config.recipe_train import Sharding
from astracli.training import checkpoint
from astracli.training.fsdp import Ranks, join, shard
from astracli.training.logprob import PolicyModel
from astracli.training.step import Trainer

SCRIPT = """
import json, sys
from pathlib import Path
from safetensors.torch import save_file
from test_fsdp_two_ranks import NAMES
from training_tools import make_trainer, recipe, uneven_groups
from typing import get_args
from torch.distributed.fsdp._fully_shard import _fsdp_param_group
from astracli.config.recipe_train import Sharding
from astracli.training import checkpoint, fsdp, sharded_optimizer
from astracli.weights.publish.publisher import Publisher

model_dir, out = map(Path, sys.argv[1:])
ranks = fsdp.join("cpu")
assert ranks.world_size == 2
assert ranks.broadcast(b"from rank 0" if ranks.first else None) == b"from rank 0"
table = {"activation_checkpointing": "selective", "packing": "packed", "tokens_per_microbatch": 40}
table["learning_rate"] = 1e-4
chosen = recipe(algorithm={"kl_coef": 0.01}, train=table)
calls = []
counted = {"sums": [(sharded_optimizer, "_reduce_scatter"), (_fsdp_param_group, "foreach_reduce")]}
counted["gathers"] = [(sharded_optimizer, "_all_gather"), (_fsdp_param_group, "foreach_all_gather")]
for word, name, where, call in [(w, n, m, getattr(m, n)) for w, places in counted.items() for m, n in places]:
    setattr(where, name, lambda *a, _word=word, _call=call, **more: (calls.append(_word), _call(*a, **more))[1])
found = {}
flat, replicated = ranks.mesh, fsdp.mesh_of("cpu", 2, 2)
for way in [*get_args(Sharding), "replicated"]:
    ranks.sharding, ranks.replicas = ("full", 2) if way == "replicated" else (way, 1)
    ranks.mesh = replicated if way == "replicated" else flat
    trainer = make_trainer(model_dir, chosen, ranks)
    masters = trainer.masters
    held = sum(v.numel() for v in masters.values.values())
    place = out / way
    publisher = Publisher(place / "weights", rank=ranks.rank, world_size=2, session="test", tied=masters.tied)
    publisher.publish(0, masters.wire_shards())
    figures, empty, micros = [], 0, 0
    for step in range(3):
        calls.clear()
        result = trainer.train(uneven_groups(step), step, step)
        counts = {word: calls.count(word) for word in counted}
        micros = sum(map(len, result.batch.minibatches))
        empty += sum(not micro.rows for minibatch in result.batch.minibatches for micro in minibatch)
        trainer.to_host()
        ranks.barrier()
        trainer.to_device()
        metrics = result.metrics
        figures.append([metrics[k] for k in NAMES])
        publisher.publish(step + 1, masters.wire_shards())
        if step == 1:
            checkpoint.save(place / "checkpoints", 2, masters, ranks, keep=1)
    publisher.close()
    full = masters.wire_full()
    if ranks.first:
        save_file(full, place / "full.safetensors")
    found[way] = {"figures": figures, "held": held, "empty": empty, "micros": micros, "calls": counts}
    found[way]["parts"] = sum(name in masters.parts for name in masters.values)
ranks.close()
print(json.dumps(found))
"""


ODD = {"vocab_size": 65, "intermediate_size": 61}
NAMES = ("loss", "grad_norm", "kl", "entropy", "m2_limit", "clip_fraction", "tokens")
LAYERS, MINIBATCHES = 2, 2


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("model"), **ODD)


@pytest.fixture(scope="module")
def out(model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two ranks left behind: `rank0.json`, `rank1.json`, and of each sharding `full.safetensors`, `weights/` and
    `checkpoints/`."""
    directory = tmp_path_factory.mktemp("two")
    for rank, text in enumerate(spawn(SCRIPT, [str(model_dir), str(directory)], 2)):
        (directory / f"rank{rank}.json").write_text(text)
    return directory


@pytest.fixture(scope="module")
def alone(model_dir: Path) -> tuple[list[list[float]], dict[str, torch.Tensor], int]:
    """Of one rank: its figures of three steps, its weights after them, the elements that it trains."""
    trainer = one_rank(model_dir)
    results = [trainer.train(uneven_groups(step), step, step).metrics for step in range(3)]
    figures = [[metrics[name] for name in NAMES] for metrics in results]
    return figures, trainer.masters.wire_full(), sum(v.numel() for v in trainer.masters.values.values())


def one_rank(model_dir: Path) -> Trainer:
    return make_trainer(model_dir, recipe(algorithm={"kl_coef": 0.01}, train={"learning_rate": 1e-4}))


def of_ranks(out: Path, sharding: str) -> list[dict[str, Any]]:
    return [json.loads((out / f"rank{rank}.json").read_text())[sharding] for rank in range(2)]


@pytest.mark.parametrize("sharding", get_args(Sharding))
def test_two_ranks_equal_one(sharding: str, out: Path, alone: Any) -> None:
    outputs = of_ranks(out, sharding)
    figures, expected, total = alone
    assert [o["held"] for o in outputs] == [pytest.approx(total / 2, rel=0.02)] * 2
    assert sum(o["empty"] for o in outputs) > 0, "some rank has to wait for the other's micro-batches"

    assert outputs[0]["figures"] == outputs[1]["figures"]
    for mine, theirs in zip(outputs[0]["figures"], figures, strict=True):
        assert mine[0] == pytest.approx(theirs[0], abs=1e-5)
        assert mine == pytest.approx(theirs, abs=1e-5, rel=1e-3)
    equal_but_for_ulps(load_file(out / sharding / "full.safetensors"), expected)


def test_two_hosts_that_each_hold_everything_equal_one_rank(out: Path, alone: Any) -> None:
    """Each has the whole model, gradients are summed between them; rank 0's host publishes and writes checkpoints."""
    outputs, (figures, expected, total) = of_ranks(out, "replicated"), alone
    assert [o["held"] for o in outputs] == [total, total] and outputs[0]["figures"] == outputs[1]["figures"]
    for mine, theirs in zip(outputs[0]["figures"], figures, strict=True):
        assert mine == pytest.approx(theirs, abs=1e-5, rel=1e-3)
    equal_but_for_ulps(load_file(out / "replicated" / "full.safetensors"), expected)
    saved = out / "replicated" / "checkpoints" / "step_000002"
    kinds = [{one[0] for one in json.loads((saved / f"rank_{n}.json").read_text())["tensors"]} for n in range(2)]
    assert kinds == [{"value", "first", "second", "rng"}, {"rng"}]


def equal_but_for_ulps(got: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert got.keys() == expected.keys()
    elements = differing = 0
    for name, tensor in expected.items():
        assert got[name].dtype == tensor.dtype and got[name].shape == tensor.shape, name
        one_ulp = 2.0**-7 * tensor.float().abs().clamp(min=1e-3)
        assert ((got[name].float() - tensor.float()).abs() <= one_ulp).all(), name
        elements += tensor.numel()
        differing += int((got[name] != tensor).sum())
    assert differing < 0.01 * elements


def test_what_the_ranks_exchange_in_a_step(out: Path) -> None:
    """Counted by hand: two minibatches of two micro-batches, two blocks. FSDP has a group for each block and one for
    embedding and head, the root, which stays gathered from a forward pass to the next backward pass."""
    found = {sharding: of_ranks(out, sharding)[0] for sharding in get_args(Sharding)}
    micros, blocks, groups = 4, LAYERS, LAYERS + 1
    assert {one["micros"] for one in found.values()} == {micros}
    parts = found["optimizer"]["parts"]
    assert parts == 15
    sums = {"optimizer": parts * MINIBATCHES, "gradients": groups * micros}
    sums |= {"parameters": groups * MINIBATCHES, "full": groups * micros}
    assert {sharding: one["calls"]["sums"] for sharding, one in found.items()} == sums

    reference = scoring = micros * blocks + 1
    passes = scoring + (micros - 1) * blocks  # forward: the first micro-batch's scoring pass is its forward pass
    passes += micros * blocks + (micros - 1)  # backward; and the root again, after each backward pass but the last
    gathers = {"optimizer": parts * MINIBATCHES, "gradients": groups * MINIBATCHES}
    gathers |= {"parameters": passes, "full": passes}
    assert {sharding: one["calls"]["gathers"] - reference for sharding, one in found.items()} == gathers


@pytest.mark.parametrize("sharding", ["optimizer", "parameters", "replicated"])
def test_what_two_ranks_publish_is_what_they_hold(sharding: str, out: Path) -> None:
    """The pieces that no one gathered give the gathered tensors, bit for bit, through the receiver's own code."""
    from astracli.weights.format import digest
    from astracli.weights.format.manifest import Manifest

    full = load_file(out / sharding / "full.safetensors")
    raw = (out / sharding / "weights" / "v000003" / "manifest.json").read_bytes()
    manifest = Manifest.from_bytes(raw, "manifest.json")
    assert {t.name for t in manifest.tensors} == set(full)
    assert manifest.frozen_digests.keys() == {"lm_head.weight"}
    for tensor in manifest.tensors:
        bits = digest.bits_of(full[tensor.name].contiguous().view(-1))
        assert tensor.digest == digest.to_hex(digest.digest_bits(bits, 0)), tensor.name


def test_one_rank_goes_on_from_a_checkpoint_of_two_that_divide_the_optimizer(
    model_dir: Path, out: Path, alone: Any
) -> None:
    trainer = one_rank(model_dir)
    found = checkpoint.latest(out / "optimizer" / "checkpoints")
    assert found is not None and found.step == 2
    checkpoint.load(found, trainer.masters, trainer.ranks)
    metrics = trainer.train(uneven_groups(2), 2, 2).metrics
    assert [metrics[name] for name in NAMES] == pytest.approx(alone[0][2], abs=1e-5, rel=1e-3)
    equal_but_for_ulps(trainer.masters.wire_full(), alone[1])


EXACT = """
import json, sys
from pathlib import Path
import torch
from safetensors.torch import save_file
from torch.distributed.fsdp import FSDPModule
from astracli.adapters.qwen3_5 import ADAPTER
from astracli.training import fsdp
from astracli.training.logprob import PolicyModel

model_dir, out = map(Path, sys.argv[1:])
ranks = fsdp.join("cpu")
ranks.compute = torch.bfloat16
for kept in (True, False):
    model = ADAPTER.load_for_training(model_dir, attention="sdpa")
    policy = PolicyModel(model)
    exact = [p for n, p in model.named_parameters() if "A_log" in n] if kept else []
    fsdp.recompute(policy, ADAPTER.block_classes(model), "full")
    fsdp.shard(policy, ADAPTER.block_classes(model), ranks, exact=exact)
    groups = [type(m).__name__ for m in policy.modules() if isinstance(m, FSDPModule)]
    blocks = model.config.num_hidden_layers
    assert groups == ["FSDPPolicyModel", *["FSDPQwen3_5DecoderLayer"] * blocks], "a block is gathered on its own"
    tokens_BL = torch.arange(2, 26)[None] + ranks.rank
    logprob_N, _ = policy(tokens_BL, None, None, torch.arange(23), tokens_BL[0, 1:])
    logprob_N.sum().backward()
    if kept:
        ranks.reduce([p.grad for p in exact])
        norm = ranks.squares(p.grad for p in policy.parameters()) ** 0.5
    grads = {n.replace("_checkpoint_wrapped_module.", ""): p.grad for n, p in policy.model.named_parameters()}
    found = {n: (g.full_tensor() if hasattr(g, "full_tensor") else g).clone() for n, g in grads.items()}
    found["logprob"] = logprob_N.detach().clone()
    save_file(found, out / f"{'exact' if kept else 'rounded'}{ranks.rank}.safetensors")
ranks.close()
print(norm)
"""


def test_what_the_engine_holds_in_fp32_is_not_rounded_by_mixed_precision(model_dir: Path, tmp_path: Path) -> None:
    """Two ranks that compute in bf16 give, bit for bit, what one process gives whose parameters are bf16, but A_log."""
    norms = [float(text) for text in spawn(EXACT, [str(model_dir), str(tmp_path)], 2)]
    logprobs, gradients = [], []
    for rank in range(2):
        model = ADAPTER.load_for_training(model_dir, attention="sdpa")
        for name, parameter in model.named_parameters():
            if "A_log" not in name:
                parameter.data = parameter.data.bfloat16()
        tokens_BL = torch.arange(2, 26)[None] + rank
        logprob_N, _ = PolicyModel(model)(tokens_BL, None, None, torch.arange(23), tokens_BL[0, 1:])
        logprob_N.sum().backward()
        logprobs.append(logprob_N.detach())
        gradients.append({name: parameter.grad.float() for name, parameter in model.named_parameters()})
    expected = {name: (gradients[0][name] + gradients[1][name]) / 2 for name in gradients[0]}
    for rank in range(2):
        found = load_file(tmp_path / f"exact{rank}.safetensors")
        assert torch.equal(found.pop("logprob"), logprobs[rank])
        assert found.keys() == expected.keys()
        for name, gradient in found.items():
            assert gradient.dtype == torch.float32 and torch.equal(gradient, expected[name]), name
        rounded = load_file(tmp_path / f"rounded{rank}.safetensors")
        assert not torch.equal(rounded["logprob"], logprobs[rank]), "the test would see a rounded A_log"
    whole = torch.stack([g.double().square().sum() for g in expected.values()]).sum().sqrt()
    assert norms == [pytest.approx(float(whole), rel=1e-6)] * 2


def test_one_rank_on_a_cpu_is_not_wrapped(model_dir: Path) -> None:
    ranks = join("cpu", {})
    assert ranks == Ranks()
    policy = PolicyModel(ADAPTER.load_for_training(model_dir, attention="sdpa"))
    shard(policy, ["Qwen3_5DecoderLayer"], ranks)
    assert type(policy) is PolicyModel
    assert not torch.distributed.is_initialized()
    assert ranks.broadcast(b"x") == b"x"
    assert ranks.gather(torch.arange(3)).tolist() == [0, 1, 2]
    assert ranks.sum([1.5, 2.0]) == [1.5, 2.0]
