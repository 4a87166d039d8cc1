"""One rank that stores its parameters in bf16 does, bit for bit, what FSDP2 on a mesh of one did, with fewer operators.

On a GPU this is how one rank trains; here it is told to compute in bf16 on a CPU (`Ranks.compute`).
"""

from __future__ import annotations

import json
import weakref
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from training_tools import divided, make_trainer, recipe, save_model, spawn, uneven_groups

from astracli.adapters.qwen3_5 import ADAPTER
from astracli.process.layout import RESIDENT, Split
from astracli.training import checkpoint, parity, setup
from astracli.training.fsdp import Ranks
from astracli.training.gradients import Gradients
from astracli.training.step import Trainer

ODD = {"vocab_size": 65, "intermediate_size": 61}
TRAIN: dict[str, Any] = {
    "packing": "packed", "tokens_per_microbatch": 40, "learning_rate": 3e-4, "parity_tolerance": 100.0,
    "activation_checkpointing": "selective",
}  # fmt: skip
NAMES = ("loss", "grad_norm", "kl", "entropy", "m2_limit", "tokens")

SHARDED = """
import json, sys
from pathlib import Path
import torch
from safetensors.torch import save_file
from test_single_rank import NAMES, TRAIN, chosen, count_operators, rows_error
from training_tools import make_trainer, uneven_groups
from astracli.training import checkpoint, fsdp

device, wrapped, model_dir, out, resume, sharding = json.loads(sys.argv[1])
out = Path(out)
out.mkdir(exist_ok=True)
ranks = fsdp.join(device, wrapped=wrapped, sharding=sharding)
ranks.compute = torch.bfloat16
trainer = make_trainer(Path(model_dir), chosen(), ranks)
if sharding == "optimizer":  # as on a GPU
    trainer.masters.grads.by_products(trainer.policy.model)
if resume:
    checkpoint.load(checkpoint.latest(Path(resume)), trainer.masters, ranks)
alone = ranks.world_size == 1
found = {"rows": rows_error(trainer) if alone else None, "figures": []}
trainer.first_step = False
for step in range(2 if resume else 0, 3):
    metrics = trainer.train(uneven_groups(step), step, step).metrics
    found["figures"].append([metrics[name] for name in NAMES])
    if step == 1:
        checkpoint.save(out / "checkpoints", 2, trainer.masters, ranks, keep=1)
full = trainer.masters.wire_full()
if ranks.first:
    save_file(full, out / "full.safetensors")
if alone:
    with trainer.masters.split_masters.whole():
        save_file(trainer.masters.values, out / "masters.safetensors")
    found["operators"] = count_operators(trainer)
ranks.close()
print(json.dumps(found))
"""


def chosen(**train: Any) -> Any:
    return recipe(algorithm={"kl_coef": 0.01}, train=TRAIN | train)


def rows_error(trainer: Trainer) -> float:
    """The start-up check's figure: how far bf16 rounds the gradient of packed rows from that of separate ones."""
    rows = parity.spread(divided(trainer, uneven_groups(0)).rows, 80)
    packed = replace(trainer.row_check, packed=True)
    error = packed.gradient_error(rows, same_shape=trainer.ranks.device.type != "cpu")
    assert not trainer.masters.grads.found()
    return error


def count_operators(trainer: Trainer) -> int:
    """Those that compute or copy in forward and backward of one micro-batch, the second of a minibatch."""
    from torch.utils._python_dispatch import TorchDispatchMode

    count = 0

    class Counting(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            nonlocal count
            view = any(r.alias_info is not None and not r.alias_info.is_write for r in func._schema.returns)
            count += not (view or func.name().startswith(("profiler::", "aten::empty")))
            return func(*args, **(kwargs or {}))

    micros = [m for minibatch in divided(trainer, uneven_groups(0)).minibatches for m in minibatch if m.rows]
    for micro in micros[:2]:
        count = 0
        with Counting():
            parity.logprobs(trainer.policy, trainer.adapter, micro, trainer.ranks.device)[0].sum().backward()
    trainer.masters.grads.clear()
    return count


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("model"), std=0.05, **ODD)


def lowered(model_dir: Path, split: Split = RESIDENT, **train: Any) -> Trainer:
    ranks = Ranks(compute=torch.bfloat16)
    trainer = setup.build_trainer(model_dir, ADAPTER, chosen(**train), ranks, attention="sdpa", split=split)
    trainer.first_step = False  # a CPU's tolerance is that of fp32
    return trainer


def figures(trainer: Trainer, first: int = 0, last: int = 3) -> list[list[float]]:
    steps = [trainer.train(uneven_groups(step), step, step).metrics for step in range(first, last)]
    return [[metrics[name] for name in NAMES] for metrics in steps]


@dataclass(frozen=True)
class Learnt:
    """A trainer after three steps."""

    trainer: Trainer
    rows: float
    figures: list[list[float]]
    checkpoints: Path
    """That of two steps."""


@pytest.fixture(scope="module")
def learnt(model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Learnt:
    trainer, place = lowered(model_dir), tmp_path_factory.mktemp("checkpoints")
    rows, found = rows_error(trainer), figures(trainer, 0, 2)
    checkpoint.save(place, 2, trainer.masters, trainer.ranks, keep=1)
    return Learnt(trainer, rows, found + figures(trainer, 2, 3), place)


def sharded(
    world_size: int,
    model_dir: Path,
    out: Path,
    resume: Path | None = None,
    device: str = "cpu",
    wrapped: bool = True,
    sharding: str = "full",
) -> dict[str, Any]:
    told = json.dumps([device, wrapped, str(model_dir), str(out), str(resume) if resume else None, sharding])
    # the last line: TileLang prints what it compiles
    found: dict[str, Any] = json.loads(spawn(SHARDED, [told], world_size)[0].strip().splitlines()[-1])
    return found


def test_it_is_bit_for_bit_what_fsdp_on_a_mesh_of_one_gives(model_dir: Path, tmp_path: Path, learnt: Learnt) -> None:
    theirs, trainer = sharded(1, model_dir, tmp_path), learnt.trainer
    assert learnt.rows == theirs["rows"] > 0
    assert learnt.figures == theirs["figures"]
    masters = load_file(tmp_path / "masters.safetensors")
    moved = []
    with trainer.masters.split_masters.whole():
        for name, value in trainer.masters.values.items():
            assert value.dtype == torch.float32
            moved.append((value.view(torch.int32) - masters[name].view(torch.int32)).abs().flatten())
    apart = torch.cat(moved)
    # splitting moves a master half-way between two bf16 numbers, one in 65,536, by its last place: here in six updates
    assert apart.max() <= 2 and 0 < (apart > 0).sum() < 3 * 6 * len(apart) / 2**16
    full = load_file(tmp_path / "full.safetensors")
    for name, tensor in trainer.masters.wire_full().items():
        assert tensor.dtype == full[name].dtype and torch.equal(tensor, full[name]), name
    mine = count_operators(trainer)
    cast = sum(tensor.dtype == torch.bfloat16 for tensor in full.values())
    print(f"operators of a micro-batch, {cast} bf16 parameters: {theirs['operators']} with FSDP2, {mine} without")
    assert theirs["operators"] - mine >= 4 * cast, "cast and copied, in forward and backward"


def test_two_sharded_ranks_learn_the_same_and_checkpoints_go_both_ways(
    model_dir: Path, tmp_path: Path, learnt: Learnt
) -> None:
    """To bf16's rounding: two ranks divide the rows otherwise. The first two divide only the optimizer: split masters
    of a part, and weight gradients that products add up. The other two are FSDP's."""
    two = sharded(2, model_dir, tmp_path / "two", sharding="optimizer")
    one, mine = learnt.trainer, learnt.figures
    for step, tolerance in enumerate((0.01, 0.05, 0.05)):
        assert mine[step] == pytest.approx(two["figures"][step], rel=tolerance, abs=2e-3), step

    other = lowered(model_dir)
    found = checkpoint.latest(tmp_path / "two" / "checkpoints")
    assert found is not None
    checkpoint.load(found, other.masters, other.ranks)
    assert figures(other, 2, 3)[0] == pytest.approx(two["figures"][2], rel=0.01, abs=2e-3)
    resumed = sharded(2, model_dir, tmp_path / "again", learnt.checkpoints)
    assert resumed["figures"][0] == pytest.approx(mine[2], rel=0.01, abs=2e-3)

    full = load_file(tmp_path / "two" / "full.safetensors")
    start = make_trainer(model_dir, chosen()).masters.wire_full()
    apart = moved = 0.0
    for name, tensor in one.masters.wire_full().items():
        apart += float((tensor.float() - full[name].float()).double().square().sum())
        moved += float((tensor.float() - start[name].float()).double().square().sum())
    assert 0 < apart < 0.01 * moved


def test_it_learns_what_fp32_learns(model_dir: Path, learnt: Learnt) -> None:
    exact = make_trainer(model_dir, chosen())
    for step, (mine, theirs) in enumerate(zip(learnt.figures, figures(exact), strict=True)):
        assert mine == pytest.approx(theirs, rel=0.1, abs=5e-3), step
        assert mine != theirs, "this is bf16"


def test_gradients_add_up_in_fp32_and_leave_nothing_in_bf16() -> None:
    """1 and 255 times 2^-9: a bf16 sum would stay at 1, whose last place is 2^-7."""
    parameter = torch.nn.Parameter(torch.ones(3, dtype=torch.bfloat16))
    gradients = Gradients({"w": parameter}, accumulate=True)
    assert gradients.found() == {}
    for micro in range(256):
        (parameter * (1.0 if micro == 0 else 2.0**-9)).sum().backward()
        assert parameter.grad is None
    found = gradients.found()["w"]
    assert found.dtype == torch.float32 and found.tolist() == [1 + 255 / 512] * 3
    gone = weakref.ref(found)
    del found
    gradients.clear()
    assert gone() is None and gradients.found() == {}


def test_what_the_engine_holds_in_fp32_stays_fp32_beside_its_master(model_dir: Path) -> None:
    trainer = lowered(model_dir, minibatches=1)
    masters = trainer.masters
    figures(trainer, 0, 1)
    kinds = {p.dtype for n, p in masters.parameters.items() if "A_log" not in n}
    assert kinds == {torch.bfloat16}
    before = {name: tensor.clone() for name, tensor in published(masters).items()}
    held = sum(value.untyped_storage().nbytes() for value in masters.values.values())
    assert held == 4 * sum(value.numel() for name, value in masters.values.items() if "A_log" in name)
    with masters.split_masters.whole():
        for name, value in masters.values.items():
            parameter = masters.parameters[name]
            assert value.dtype == torch.float32 and value.data_ptr() != parameter.data_ptr()
            assert torch.equal(parameter, value.to(parameter.dtype)), "the parameter is the rounded master"
            assert ("A_log" in name) == (parameter.dtype == torch.float32)
    shown, more = published(masters), masters.wire_shards(copy=False)
    figures(trainer, 1, 2)
    assert any(not torch.equal(before[name], tensor) for name, tensor in published(masters).items())
    for name, tensor in before.items():
        assert torch.equal(shown[name], tensor) and torch.equal(more[name], tensor), "a copy, not the parameter"


def published(masters: Any) -> dict[str, torch.Tensor]:
    return dict(masters.wire_shards())


@pytest.mark.parametrize("split", [RESIDENT, Split("host", 0.6)])
def test_away_it_holds_nothing_and_learns_the_same(model_dir: Path, split: Split) -> None:
    stays, leaves = lowered(model_dir), lowered(model_dir, split)
    for step in range(3):
        leaves.to_host()
        leaves.to_host()
        held = [*leaves.masters.values.values(), *leaves.masters.parameters.values()]
        held += [s[k] for s in leaves.masters.adam.adamw.state.values() for k in ("exp_avg", "exp_avg_sq")]
        assert sum(tensor.untyped_storage().nbytes() for tensor in held) == 0
        sizes = {name: value.numel() for name, value in leaves.masters.values.items()}
        exact = sum(size for name, size in sizes.items() if "A_log" in name)
        moments = sum(size for name, size in sizes.items() if name not in leaves.masters.adam.away) if step else 0
        assert leaves.masters._away.nbytes == 4 * sum(sizes.values()) + 4 * exact + 8 * moments
        leaves.to_device()
        leaves.to_device()
        assert figures(stays, step, step + 1) == figures(leaves, step, step + 1)
    with stays.masters.split_masters.whole(), leaves.masters.split_masters.whole():
        for name, value in stays.masters.values.items():
            assert value.abs().sum() > 0 or "bias" in name, name
            assert torch.equal(value, leaves.masters.values[name]), name


def test_originals_in_fp32_go_as_their_masters_are_made(model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU 4 bytes a parameter at 4B are 16 GiB, beside an engine that has taken its part."""
    from torch.utils._python_dispatch import TorchDispatchMode

    originals: list[int] = []

    class AtEveryClone(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func is torch.ops.aten.clone.default and any(args[0].data_ptr() == p.data_ptr() for p in parameters):
                originals.append(sum(p.dtype == torch.float32 and "A_log" not in n for n, p in named.items()))
            return func(*args, **(kwargs or {}))

    made: Any = setup.Masters
    named: dict[str, torch.Tensor] = {}
    parameters: list[torch.Tensor] = []

    def watched(model: Any, *args: Any, **options: Any) -> Any:
        named.update(model.named_parameters())
        parameters.extend(named.values())
        with AtEveryClone():
            return made(model, *args, **options)

    monkeypatch.setattr(setup, "Masters", watched)
    lowered(model_dir)
    lower = sum("A_log" not in name for name in named)
    assert len(originals) == len(named) and originals[0] == lower and originals[-1] <= 1
    assert originals == sorted(originals, reverse=True)


def test_what_is_never_trained_leaves_with_the_rest(model_dir: Path) -> None:
    """An adapter may leave a tensor out of what travels: stored in what is computed with, it gets no gradient."""
    name = "model.layers.1.self_attn.q_norm.weight"
    adapter = replace(ADAPTER, wire_tensors=lambda m: {n: t for n, t in ADAPTER.wire_tensors(m).items() if n != name})
    trainer = setup.build_trainer(
        model_dir, adapter, chosen(), Ranks(compute=torch.bfloat16), attention="sdpa", split=RESIDENT
    )
    trainer.first_step = False
    (frozen,) = trainer.masters.frozen
    before = frozen.clone()
    figures(trainer, 0, 1)
    assert frozen.dtype == torch.bfloat16 and frozen.grad is None and not frozen.requires_grad
    trainer.to_host()
    held = [p for p in trainer.policy.parameters() if p.untyped_storage().nbytes()]
    assert held == [], "nothing of the policy stays on the device"
    trainer.to_device()
    assert torch.equal(frozen, before)
    figures(trainer, 1, 2)


def test_a_resumed_run_goes_on_bit_for_bit(model_dir: Path, learnt: Learnt) -> None:
    second = lowered(model_dir)
    found = checkpoint.latest(learnt.checkpoints)
    assert found is not None
    checkpoint.load(found, second.masters, second.ranks)
    assert learnt.figures[2:] == figures(second, 2, 3)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu_it_is_what_fsdp_on_a_mesh_of_one_gives(tmp_path: Path) -> None:
    from test_packing_gpu import save

    # calm enough that roundings in bf16 move the first gradient's norm by less than a thousandth (the product adds in
    # fp32, FSDP2 what was rounded); with eight layers of 0.06 they move it by 4 %
    model_dir = save(tmp_path / "m", num_hidden_layers=4, initializer_range=0.01)
    check_wrapped_and_not(model_dir, tmp_path, "cuda")


def check_wrapped_and_not(model_dir: Path, folder: Path, device: str) -> None:
    """The same by kernels whose atomics may add in another order; on a CPU to try it out."""
    theirs, mine = (
        sharded(1, model_dir, folder / str(wrapped), device=device, wrapped=wrapped) for wrapped in (True, False)
    )
    print("operators of a micro-batch:", theirs["operators"], "with FSDP2,", mine["operators"], "without")
    assert mine["operators"] < theirs["operators"]
    for step, tolerance in enumerate((2e-3, 0.05, 0.05)):
        assert mine["figures"][step] == pytest.approx(theirs["figures"][step], rel=tolerance, abs=tolerance), step
    masters = [load_file(folder / str(wrapped) / "masters.safetensors") for wrapped in (True, False)]
    for name, value in masters[0].items():
        assert (value - masters[1][name]).abs().max() < 6 * TRAIN["learning_rate"], name  # six updates
