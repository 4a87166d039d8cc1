"""One rank that stores its parameters in bf16 does, bit for bit, what FSDP2 on a mesh of one did, with fewer operators.

On a GPU this is how one rank trains; here it is told to compute in bf16 on a CPU (`Ranks.compute`).
"""

from __future__ import annotations

import json
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from training_tools import make_trainer, recipe, save_model, spawn, uneven_groups

from astracli.adapters.qwen3_5 import ADAPTER, tiny_config
from astracli.plan_trainer import Split
from astracli.training import checkpoint, setup
from astracli.training.fsdp import Ranks
from astracli.training.gradients import Gradients
from astracli.training.step import Trainer

ODD = {"vocab_size": 65, "intermediate_size": 61}
TRAIN: dict[str, Any] = {
    "packing": "packed", "tokens_per_microbatch": 40, "learning_rate": 1e-3, "parity_tolerance": 100.0,
    "activation_checkpointing": "selective",
}  # fmt: skip
NAMES = ("loss", "grad_norm", "kl", "entropy", "m2_limit", "tokens")

SHARDED = """
import json, sys
from pathlib import Path
import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch.distributed.device_mesh import init_device_mesh
from test_single_rank import NAMES, TRAIN, chosen, count_operators, rows_error
from training_tools import make_trainer, uneven_groups
from astracli.training import checkpoint, fsdp

model_dir, out, resume = json.loads(sys.argv[1])
out = Path(out)
ranks = fsdp.join("cpu")
if ranks.world_size == 1:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    ranks.mesh = init_device_mesh("cpu", (1,))
ranks.compute = torch.bfloat16
trainer = make_trainer(Path(model_dir), chosen(), ranks)
if resume:
    checkpoint.load(checkpoint.latest(Path(resume)), trainer.masters, ranks)
found = {"rows": rows_error(trainer), "figures": []}
trainer._rows_checked = True
for step in range(2 if resume else 0, 3):
    metrics = trainer.train(uneven_groups(step), step, step).metrics
    found["figures"].append([metrics[name] for name in NAMES])
    if step == 1:
        checkpoint.save(out / "checkpoints", 2, 2, trainer.masters, ranks, keep=1)
full = trainer.masters.wire_full()
if ranks.first:
    save_file(full, out / "full.safetensors")
if ranks.world_size == 1:
    save_file({k: v.to_local() if hasattr(v, "to_local") else v for k, v in trainer.masters.values.items()}, out / "masters.safetensors")
found["operators"] = count_operators(trainer)
ranks.close()
print(json.dumps(found))
"""


def chosen(**train: Any) -> Any:
    return recipe(algorithm={"kl_coef": 0.01}, train=TRAIN | train)


def rows_error(trainer: Trainer) -> float:
    """The start-up check's figure: how far bf16 rounds the gradient of packed rows from that of separate ones."""
    from astracli.training import packing, parity

    rows = parity.spread(trainer._divide(uneven_groups(0), 0).rows, 80)
    join = packing.dividers(True)[1]
    error = parity.gradients_against_separate(
        trainer.policy, trainer.adapter, rows, trainer.masters, join=join, pad_token=0
    )
    assert not trainer.masters.grads.found()
    return error


def count_operators(trainer: Trainer) -> int:
    """aten and custom operators of forward and backward of one micro-batch, the second of a minibatch: of tensors that
    are no views."""
    from torch.utils._python_dispatch import TorchDispatchMode

    count = 0

    class Counting(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            nonlocal count
            count += not any(r.alias_info is not None and not r.alias_info.is_write for r in func._schema.returns)
            return func(*args, **(kwargs or {}))

    micros = [m for minibatch in trainer._divide(uneven_groups(0), 0).minibatches for m in minibatch if m.rows]
    for micro in micros[:2]:
        count = 0
        with Counting():
            trainer._forward(trainer.policy, micro)[0].sum().backward()
    trainer.masters.grads.clear()
    return count


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("model"), config=tiny_config() | ODD)


def lowered(model_dir: Path, split: Split = Split(), **train: Any) -> Trainer:
    ranks = Ranks(compute=torch.bfloat16)
    trainer = setup.build_trainer(model_dir, ADAPTER, chosen(**train), ranks, attention="sdpa", split=split)
    trainer._rows_checked = True  # a CPU's tolerance is that of fp32
    return trainer


def figures(trainer: Trainer, first: int = 0, last: int = 3) -> list[list[float]]:
    steps = [trainer.train(uneven_groups(step), step, step).metrics for step in range(first, last)]
    return [[metrics[name] for name in NAMES] for metrics in steps]


def sharded(world_size: int, model_dir: Path, out: Path, resume: Path | None = None) -> dict[str, Any]:
    told = json.dumps([str(model_dir), str(out), str(resume) if resume else None])
    found: dict[str, Any] = json.loads(spawn(SHARDED, [told], world_size)[0])
    return found


def test_it_is_bit_for_bit_what_fsdp_on_a_mesh_of_one_gives(model_dir: Path, tmp_path: Path) -> None:
    theirs = sharded(1, model_dir, tmp_path)
    trainer = lowered(model_dir)
    assert rows_error(trainer) == theirs["rows"] > 0
    assert figures(trainer) == theirs["figures"]
    masters = load_file(tmp_path / "masters.safetensors")
    for name, value in trainer.masters.values.items():
        assert value.dtype == torch.float32 and torch.equal(value, masters[name]), name
    full = load_file(tmp_path / "full.safetensors")
    for name, tensor in trainer.masters.wire_full().items():
        assert tensor.dtype == full[name].dtype and torch.equal(tensor, full[name]), name
    print("operators of a micro-batch, FSDP2 on one rank and without:", theirs["operators"], count_operators(trainer))
