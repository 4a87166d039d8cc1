"""Memory of a launch plan: what each process holds in bytes, what moves to the host, what cannot fit."""

from __future__ import annotations

import math
import re
from typing import Any, get_args

import pytest
from machines import GIB, facts
from test_plan import load, memory_warnings, planned

from astracli.adapters import llama, qwen3, qwen3_5
from astracli.adapters.qwen3_5_sizes import text_shapes
from astracli.config.recipe_train import Sharding
from astracli.engines.sglang.plugin import ENGINE
from astracli.errors import UserError
from astracli.launch import run
from astracli.machine.facts import validate
from astracli.machine.memory import Component, words
from astracli.models import registry
from astracli.models.adapter import MemoryShape
from astracli.plan import build as plan
from astracli.plan import memory as plan_memory
from astracli.plan import offload as plan_split
from astracli.plan import trainer as plan_trainer
from astracli.plan.cost import TrainerLoad
from astracli.plan.seats import GpuId
from astracli.plan.view import render, what
from astracli.process import layout
from astracli.training import adam

MEMORY = ENGINE.memory
EVERY_BLOCK_AGAIN = "train.activation_checkpointing=full"
REQUESTS = "rollout.max_running_requests=32"


def test_bytes_of_qwen3_5_4b() -> None:
    full = (EVERY_BLOCK_AGAIN, "train.sharding=full")
    result = planned(load("qwen3.5-4b-m2po-full", *full), facts("8.9", 8, host_gib=512))
    rows = {(row.process, what(row)): row.bytes for row in result.memory}
    parameters = 4_205_751_296
    assert rows["engine0", "weights (bf16)"] == 2 * parameters
    assert rows["engine0", "KV cache (bf16), one request"] == 8192 * 32 * 1024
    assert rows["engine0", "recurrent state"] == 33 * 24 * (32 * 128 * 128 * 4 + 8192 * 3 * 2)
    assert rows["engine0", "KV cache (bf16), the others"] == 31 * 8192 * 32 * 1024
    tight = planned(load("qwen3.5-4b-m2po-full", REQUESTS), facts("8.9", 8, memory_gib=20, host_gib=512))
    held = {what(row): row.bytes for row in tight.memory if row.process == "engine0"}
    reserved = ("weights (bf16)", "recurrent state", "KV cache (bf16), one request", "KV cache (bf16), the others")
    assert sum(held[what] for what in reserved) == int(0.7 * 20 * GIB), "no more than its part"
    assert rows["trainer", "master weights (fp32)"] == parameters  # 4 bytes over 4 ranks
    assert rows["trainer", "moments (fp32)"] == 2 * parameters
    assert rows["trainer1", "gradients (fp32)"] == parameters
    assert rows["trainer", "reference (bf16)"] == parameters // 2
    outside = 248320 * 2560 + 2560
    assert rows["trainer", "embedding and head, gathered (bf16)"] == 2 * outside
    assert rows["trainer", "activations"] == 8192 * 32 * 2 * 2560  # the input of every block
    head = 6 * 248320 * 2560 + 3 * 2**29 + 8192 * 14 * 2560
    assert rows["trainer", "backward pass of the head or a block"] == head
    assert rows["trainer1", "published weights, last version and the next"] == parameters
    assert rows["trainer1", "published weights, the first version"] == parameters // 2
    assert rows["trainer1", "checkpoint while loading (fp32), over these"] == 4 * parameters - parameters // 2
    disk = {what(row): row.bytes for row in result.disk}
    assert disk["3 checkpoints (one being written)"] == 3 * 12 * parameters
    assert disk["13 published versions, full"] == 13 * 2 * parameters
    assert disk["export"] == 2 * parameters
    assert result.model["flops_per_trained_token"] == pytest.approx(25.2e9, rel=2e-3)
    assert result.expected["avg_at_n_last"] == 0.574
    lean = planned(load("qwen3.5-4b-m2po-full", "algorithm.kl_coef=0"), facts("8.9", 8, host_gib=512))
    assert "reference (bf16)" not in {what(row) for row in lean.memory}


def moved(name: str, gib: float, count: int, *overrides: str) -> tuple[str, float]:
    result = planned(load(name, *overrides), facts("9.0", count, memory_gib=gib, host_gib=512))
    plan.refuse(result)
    split = result.placement.split
    return split.reference, split.moments_on_host


def test_what_does_not_fit_moves_to_the_host_and_the_plan_says_why() -> None:
    one_each = ("resources.rollout_gpus=1", "resources.train_gpus=1")
    name, full = "qwen3.5-4b-m2po-delta", (*one_each, EVERY_BLOCK_AGAIN)
    assert moved(name, 141, 2, *full) == ("gpu", 0.0)
    assert moved(name, 79.6, 2, *full) == ("gpu", 0.0), "an H100 of 80 GB"
    assert moved(name, 79, 2, *full) == ("gpu", 0.05), "a twentieth in each of four updates beats 7.8 GiB once"
    assert moved(name, 76, 2, *full) == ("host", 0.0)
    assert moved(name, 60, 2, *full) == ("host", 0.4)
    assert moved(name, 44, 2, *full) == ("host", 1.0)
    again = "train.activation_checkpointing="
    assert moved(name, 79.6, 2, *one_each, f"{again}selective") == ("host", 0.2)
    assert moved(name, 79.6, 2, *one_each, f"{again}none") == ("host", 0.7)
    assert moved(name, 79.6, 2, *one_each, f"{again}none", "train.reference_device=gpu") == ("gpu", 0.95)
    assert moved(name, 80, 3, one_each[0], "resources.train_gpus=2", EVERY_BLOCK_AGAIN) == ("gpu", 0.0)
    assert moved(name, 141, 2, *one_each, "train.optimizer_device=host") == ("gpu", 1.0)
    result = planned(load(name, *full, REQUESTS), facts("9.0", 2, memory_gib=60, host_gib=512))
    why = "with everything on the GPU the trainer needs 74.53 GiB, 79.23 GiB with its margin; it may fill 60.00 GiB"
    assert result.placement.reasons[:-1] == (("reference", "host", why), ("optimizer", "40% on the host", why))
    rows = [row for row in result.memory if row.process == "trainer" and what(row) == "moments (fp32)"]
    away = math.ceil(0.4 * 8 * 4_205_751_296)
    assert [(row.where, row.bytes) for row in rows] == [("gpu", 8 * 4_205_751_296 - away), ("host", away)]
    result = planned(load(name, *one_each), facts("9.0", 2, memory_gib=44, host_gib=512))
    where = {what(row): (row.where, row.bytes) for row in result.memory if row.process == "trainer"}
    assert where["moments (fp32)"] == ("host", 8 * 4_205_751_296)
    assert where["reference (bf16)"] == ("host", 2 * 4_205_751_296)
    assert "placement" in {table.title for table in render(result)}
    with pytest.raises(UserError, match=r"GPU 1 needs at least 66\.\d\d GiB of GPU memory for trainer"):
        asked = load("qwen3.5-4b-m2po-delta", *one_each, "train.optimizer_device=gpu")
        plan.refuse(planned(asked, facts("9.0", 2, memory_gib=44, host_gib=512)))


def test_a_run_held_to_24_gib_of_a_big_card_is_planned_as_on_a_card_of_24() -> None:
    held = load("qwen3.5-4b-lora-24gb", "resources.gpu_memory_gib=24")
    big, small = (validate(facts("9.0", 1, memory_gib=gib, host_gib=192)) for gib in (96, 24))
    found, wanted = run.planned(held, "train", big), run.planned(load("qwen3.5-4b-lora-24gb"), "train", small)
    assert (found.placement, found.memory, found.margins) == (wanted.placement, wanted.memory, wanted.margins)
    assert (found.gpu_sizes, found.gpu_share) == ({GpuId(0): 24 * GIB}, 0.25) and wanted.gpu_share == 1.0
    assert run.planned(held, "train", small) == wanted, "what a card does not have is not given either"


def test_a_hybrids_prefix_cache_is_counted_in_recurrent_states() -> None:
    """SGLang takes three a request, and the plan fits fewer requests."""
    shape = qwen3_5.ADAPTER.memory_shape(qwen3_5.ADAPTER.known_configs["Qwen/Qwen3.5-4B"])
    abort = ("weights.pause_mode=abort",)
    without, cached = (load("qwen3.5-4b-m2po-delta", *abort, f"rollout.prefix_cache={it}") for it in ("auto", "on"))
    running = without.rollout.running
    more = MEMORY.reserved(shape, cached) - MEMORY.reserved(shape, without)
    assert more == 2 * running * shape.state_bytes_per_sequence
    box = facts("9.0", 8, memory_gib=44, host_gib=512)
    requests = [planned(one, box).running_requests for one in (without, cached)]
    assert requests[1] <= requests[0]
    states = [sum(row.bytes for row in planned(one, box).memory if row.component is Component.RECURRENT_STATE)
              for one in (without, cached)]  # fmt: skip
    assert states[1] > states[0]


def test_an_engine_beside_its_trainer_reserves_what_that_one_leaves() -> None:
    shared = ("resources.rollout_gpus=1", "resources.train_gpus=1", "resources.share_gpus=true")
    recipe = load("qwen3.5-4b-m2po-delta", *shared, REQUESTS)
    result = planned(recipe, facts("9.0", 1, memory_gib=141, host_gib=512))
    fraction = result.placement.mem_fraction_static
    assert fraction == 0.19
    assert plan_memory.total(result.memory, where="gpu", fixed=True) <= 0.96 * 141 * GIB
    shape = qwen3_5.ADAPTER.memory_shape(qwen3_5.ADAPTER.known_configs["Qwen/Qwen3.5-4B"])
    assert fraction * 141 * GIB > MEMORY.reserved(shape, recipe, requests=8)
    decided = [("activations", "all kept"), ("engine", "reserves 19%"), ("a full version", "host")]
    assert [item[:2] for item in result.placement.reasons] == decided
    assert fraction * 141 * GIB > MEMORY.reserved(shape, recipe, requests=32), "all that it can use"
    less = planned(recipe, facts("9.0", 1, memory_gib=100, host_gib=512)).placement
    because = "the engine beside it makes more of the memory"
    assert less.reasons[0] == ("activations", "all made again", because) and less.split == plan_split.Split(
        "gpu", 0.0, "full"
    )
    assert moved("qwen3.5-4b-m2po-delta", 80, 1, *shared, REQUESTS) == ("host", 0.25)
    lowered = load("qwen3.5-4b-m2po-delta", *shared, "rollout.sglang.mem_fraction_static=0.1")
    assert planned(lowered, facts("9.0", 1, memory_gib=141, host_gib=512)).placement.mem_fraction_static == 0.1


def test_published_versions_lie_on_a_gpu_that_has_room_for_two() -> None:
    """Where there is none, on the host, and nothing else is decided otherwise for them."""
    versions, first = Component.PUBLISHED.value, "published weights, the first version"
    where = {}
    for gib in (141, 110, 90):
        settings = ("resources.rollout_gpus=1", "resources.train_gpus=1", EVERY_BLOCK_AGAIN)
        one_each = load("qwen3.5-4b-m2po-delta", *settings)
        result = planned(one_each, facts("9.0", 2, memory_gib=gib, host_gib=512))
        rows = {what(row): row for row in result.memory if row.process == "trainer"}
        need = plan_memory.total(result.memory, where="gpu", processes=["trainer"])
        where[gib] = rows[versions].where
        assert rows[versions].bytes == 4 * 4_205_751_296
        assert (first in rows) == (where[gib] == "gpu")
        assert need + (2**30 if where[gib] == "gpu" else 0) <= gib * GIB and not memory_warnings(result)
        assert result.placement.split == layout.Split("gpu", 0.0, "full")
    assert where == {141: "gpu", 110: "gpu", 90: "host"}
    shared = ("resources.rollout_gpus=1", "resources.train_gpus=1", "resources.share_gpus=true")
    time_sharing = load("qwen3.5-4b-m2po-delta", *shared, "resources.share_mode=time_sharing")
    away = planned(time_sharing, facts("9.0", 1, memory_gib=192, host_gib=512))
    assert {row.where for row in away.memory if what(row) == versions} == {"host"}, "it gives its GPU back"


def test_the_room_that_published_versions_leave_is_the_planned_one() -> None:
    from astracli.weights.publish import snapshot

    assert snapshot.SPARE_BYTES == plan_trainer.SPARE_BYTES


def test_an_engine_that_may_not_reserve_enough_is_refused() -> None:
    asked = load("qwen3.5-4b-m2po-delta", "rollout.sglang.mem_fraction_static=0.2", REQUESTS)
    with pytest.raises(UserError, match=r"reserves 20% of GPU 0 \(8\.80 GiB\), it needs 9\.\d\d GiB") as error:
        plan.refuse(planned(asked, facts("8.9", 8, memory_gib=44, host_gib=512)))
    sets = re.findall(r"--set ([^ `]+)", str(error.value.hint))
    assert [s.split("=")[0] for s in sets] == ["rollout.sglang.mem_fraction_static"]


def test_what_cannot_fit_is_refused_with_its_size() -> None:
    recipe = load("llama3-8b-instruct-m2po-delta", "resources.train_gpus=1", "resources.rollout_gpus=1")
    result = planned(recipe, facts("9.0", 2, memory_gib=60, host_gib=512))
    with pytest.raises(UserError, match=r"GPU 1 needs at least 67\.\d\d GiB of GPU memory for trainer, it has 60"):
        plan.refuse(result)
    small = planned(load("qwen3.5-4b-m2po-delta"), facts("9.0", 8, host_gib=16))
    with pytest.raises(UserError, match=r"needs at least .* GiB of memory, this machine has 16\.00 GiB"):
        plan.refuse(small)
    full = planned(load("qwen3.5-4b-m2po-full"), facts("9.0", 8, host_gib=512, disk_gib=100))
    assert [item for item in full.missing if "disk" in item] == ["250.68 GiB of disk"]


def test_words() -> None:
    assert words(2 * 4_205_751_296) == "7.83 GiB"
    assert words(512) == "512 B"
    assert words(51_511_296) == "49.1 MiB"


def test_dense_families_have_no_state_row() -> None:
    for adapter, path in ((llama.ADAPTER, "meta-llama/Meta-Llama-3-8B-Instruct"), (qwen3.ADAPTER, "Qwen/Qwen3-8B")):
        recipe = load("qwen3-1.7b-m2po-delta", f"model.path={path}")
        assert registry.resolve(recipe) is adapter
        result = planned(recipe, facts("9.0", 2, memory_gib=200, host_gib=512))
        assert "recurrent state" not in {what(row) for row in result.memory}


def test_only_several_ranks_gather_what_lies_outside_blocks() -> None:
    """One rank has it: its bf16 parameters are the upper parts of its masters, which are counted once."""
    recipe = load("qwen3.5-4b-m2po-delta")
    shape = qwen3_5.ADAPTER.memory_shape(qwen3_5.ADAPTER.known_configs["Qwen/Qwen3.5-4B"])

    def rows(ranks: int, sharding: Any = "full") -> dict[str, int]:
        split = layout.Split(sharding=sharding)
        made = plan_trainer.trainer_rows("t", TrainerLoad(recipe, shape, ranks), "cuda", split)
        return {what(row): row.bytes for row in made}

    gathered = "embedding and head, gathered (bf16)"
    assert gathered not in rows(1) and rows(2)[gathered] == 2 * (248320 * 2560 + 2560)
    assert rows(1)["master weights (fp32)"] == 2 * rows(2)["master weights (fp32)"] == 4 * 4_205_751_296
    assert not any("bf16" in what for what in rows(1) if what != "reference (bf16)")

    every, gradients = 4_205_751_296, "gradients (fp32)"
    held = {sharding: rows(2, sharding)[gradients] for sharding in get_args(Sharding)}
    assert held == {"optimizer": 4 * every, "gradients": 2 * every, "parameters": 4 * every, "full": 2 * every}
    assert rows(4, "optimizer")["weights that other ranks update (bf16)"] == 2 * every * 3 // 4
    assert rows(2, "gradients")["weights, gathered for a minibatch (bf16)"] == 2 * every
    assert gathered not in {**rows(2, "gradients"), **rows(2, "optimizer")} and gathered in rows(2, "parameters")
    passes = "backward pass of the head or a block"
    assert rows(2, "optimizer")[passes] == rows(1)[passes] < rows(2)[passes], "it computes as one rank does"


def test_an_update_with_moments_on_the_host_counts_a_bucket_of_them() -> None:
    """Where every tensor is small, and so is what comes and goes in the passes."""
    recipe = load("qwen3.5-4b-m2po-delta", "train.tokens_per_microbatch=64", "rollout.context_length=64",
                  "rollout.max_new_tokens=32", EVERY_BLOCK_AGAIN)  # fmt: skip
    blocks = (1000,) * 1000
    shape = MemoryShape(10**9, 1000, 64, 1000, 1, 0, 1.0, outside_blocks=64000, block_activations=blocks)
    kept, passes = "activations", "backward pass of the head or a block"

    def rows(on_host: float) -> dict[str, int]:
        split = layout.Split(moments_on_host=on_host)
        return {
            what(row): row.bytes for row in plan_trainer.trainer_rows("t", TrainerLoad(recipe, shape, 1), "cuda", split)
        }

    bucket = layout.BUCKET_BYTES
    assert bucket > 10 * rows(0.0)[kept]
    assert rows(0.0)[kept] + rows(0.0)[passes] == bucket, "of masters made whole"
    assert rows(0.5)[kept] + rows(0.5)[passes] == layout.BUCKETS_IN_FLIGHT * bucket, "and of moments"


DENSE = {"llama": (llama, "meta-llama/Meta-Llama-3-8B-Instruct"), "1.7b": (qwen3, "Qwen/Qwen3-1.7B"),
         "8b": (qwen3, "Qwen/Qwen3-8B")}  # fmt: skip


@pytest.mark.parametrize("name", ["qwen3_5", *DENSE])
@pytest.mark.parametrize("sharding", ["optimizer", "full"])
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_an_update_brings_no_more_than_is_planned(name: str, ranks: int, sharding: Any) -> None:
    """The update's own buckets, replayed over the tensors of a model: three sets of moments at most, and masters."""
    if name == "qwen3_5":
        config = qwen3_5.ADAPTER.known_configs["Qwen/Qwen3.5-4B"]
        shapes, shape = text_shapes(config), qwen3_5.ADAPTER.memory_shape(config)
    else:
        module, path = DENSE[name]
        config = module.ADAPTER.known_configs[path]
        shapes, shape = module.ADAPTER.shapes(config), module.ADAPTER.memory_shape(config)
    sizes = {tensor: math.ceil(math.prod(dims) / ranks) for tensor, dims in shapes.items()}
    master = 4 if ranks == 1 or sharding == "optimizer" else 0
    for part in plan_split.PARTS:
        away = adam.on_host(sizes, part)
        stay = [
            sum(sizes[n] for n in b) for b in adam.buckets({n: master * s for n, s in sizes.items() if n not in away})
        ]
        comes = adam.buckets({n: (8 + master) * s for n, s in sizes.items() if n in away})
        moving = [sum(sizes[n] for n in bucket) for bucket in comes]
        first = 8 * sum(moving[: layout.BUCKETS_IN_FLIGHT - 1]) + master * max(stay, default=0)
        later = [8 * sum(moving[max(0, i - 1) : i + 2]) + master * moving[i] for i in range(len(moving))]
        planned_bytes = plan_trainer.in_update(shape, ranks, layout.Split(moments_on_host=part, sharding=sharding))
        assert max(first, *later, 0) <= planned_bytes * 1.001, part
