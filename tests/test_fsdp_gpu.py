"""Two ranks on two GPUs, `pytest -m gpu tests/test_fsdp_gpu.py`: they learn what one learns, what they leave is whole.

In one go: NCCL between processes that see one GPU each, uneven shards, ranks with fewer micro-batches, bf16 compute
with `A_log` in fp32, leaving the GPU between steps, publishing by pieces, a checkpoint that one rank goes on from.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import get_args

import pytest
import torch
from safetensors.torch import load_file
from training_tools import save_model, spawn

from astracli.config.recipe_train import Sharding
from astracli.weights.format import digest
from astracli.weights.format.manifest import Manifest

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices"),
]
SIZES = {
    "vocab_size": 513, "hidden_size": 128, "intermediate_size": 253, "head_dim": 64, "linear_key_head_dim": 64,
    "linear_value_head_dim": 64,
}  # fmt: skip
NAMES = ("loss", "grad_norm", "kl", "entropy", "m2_limit", "tokens")

SCRIPT = """
import json, sys
from pathlib import Path
from safetensors.torch import save_file
from training_tools import make_trainer, recipe, uneven_groups
from astracli.training import checkpoint, fsdp
from astracli.weights.publish.publisher import Publisher

device, model_dir, out, resume, names, sharding = json.loads(sys.argv[1])
out = Path(out)
ranks = fsdp.join(device, sharding=sharding)
chosen = recipe(
    algorithm={"kl_coef": 0.01},
    train={"activation_checkpointing": "selective", "tokens_per_microbatch": 40, "learning_rate": 1e-4},
)
trainer = make_trainer(Path(model_dir), chosen, ranks)
masters, figures, empty = trainer.masters, [], 0
if resume:
    checkpoint.load(checkpoint.latest(out / "checkpoints"), masters, ranks)
else:
    publisher = Publisher(out / "weights", rank=ranks.rank, world_size=ranks.world_size, session="test", threads=2)
    publisher.publish(0, masters.wire_shards())
for step in range(2 if resume else 0, 3):
    result = trainer.train(uneven_groups(step), step, step)
    empty += sum(not micro.rows for minibatch in result.batch.minibatches for micro in minibatch)
    trainer.to_host()
    ranks.barrier()
    trainer.to_device()
    if not resume:
        publisher.publish_async(step + 1, masters.wire_shards(), owned=True)
        publisher.settle()
        if step == 1:
            checkpoint.save(out / "checkpoints", 2, masters, ranks, keep=1)
    figures.append([result.metrics[name] for name in names])
if not resume:
    full = masters.wire_full()
    if ranks.first:
        save_file(full, out / "full.safetensors")
    publisher.close()
ranks.close()
print(json.dumps({"figures": figures, "empty": empty}))
"""


def check(device: str, folder: Path, sharding: str) -> None:
    """The whole test, on GPUs or, to try it out, on a CPU."""
    model = save_model(folder / "model", std=0.05, **SIZES)

    def run(ranks: int, out: str, *, resume: bool = False) -> list[dict[str, list[list[float]]]]:
        told = json.dumps([device, str(model), str(folder / out), resume, NAMES, sharding])
        # the last line: TileLang prints what it compiles
        return [json.loads(text.strip().splitlines()[-1]) for text in spawn(SCRIPT, [told], ranks, timeout_s=400)]

    two, other = run(2, "two")
    assert two["figures"] == other["figures"]
    assert two["empty"] + other["empty"] > 0, "a rank has to wait for the other's micro-batches"
    (one,) = run(1, "one")
    (resumed,) = run(1, "two", resume=True)
    for mine, theirs, tolerance in zip(two["figures"], one["figures"], (0.02, 0.05, 0.1), strict=True):
        assert mine == pytest.approx(theirs, rel=tolerance, abs=2e-3)
    assert resumed["figures"][0] == pytest.approx(two["figures"][2], rel=0.02, abs=2e-3)

    full = load_file(folder / "two" / "full.safetensors")
    raw = (folder / "two" / "weights" / "v000003" / "manifest.json").read_bytes()
    manifest = Manifest.from_bytes(raw, "manifest.json")
    assert {tensor.name for tensor in manifest.tensors} == set(full)
    for tensor in manifest.tensors:
        bits = digest.bits_of(full[tensor.name].contiguous().view(-1))
        assert tensor.digest == digest.to_hex(digest.digest_bits(bits, 0)), tensor.name


@pytest.mark.parametrize("sharding", get_args(Sharding))
def test_two_gpus_learn_what_one_learns_and_leave_it_whole(sharding: str, tmp_path: Path) -> None:
    check("cuda", tmp_path, sharding)
