"""What a plan says of LoRA: bytes by hand, one GPU of 24 GB in turns, one of 48 GB side by side."""

from __future__ import annotations

from math import prod
from typing import Any

import pytest
from machines import GIB, facts
from test_plan import TINY, load, planned

from astracli.adapters import qwen3_5
from astracli.adapters.qwen3_5_sizes import text_shapes
from astracli.backends import choice as backend
from astracli.config import recipe_io
from astracli.errors import UserError
from astracli.machine import documents
from astracli.machine.memory import Component
from astracli.models import lora_targets, registry
from astracli.plan import build as plan
from astracli.plan.types import LaunchPlan

RECIPE = "qwen3.5-4b-lora-24gb"
CONFIG = qwen3_5.ADAPTER.known_configs["Qwen/Qwen3.5-4B"]
PARAMETERS = 4_205_751_296


def on(machine: str, *overrides: str, name: str = RECIPE) -> LaunchPlan:
    """On a machine that ships with astra, its checkpoint not downloaded."""
    recipe, there = load(name, *overrides), documents.load(machine)
    adapter = registry.resolve(recipe)
    return plan.build(recipe, adapter, backend.choose(adapter, there, recipe), there)


def rows(result: LaunchPlan, process: str) -> dict[tuple[Component, str, bool], int]:
    return {(row.component, row.where, row.offloaded): row.bytes for row in result.memory if row.process == process}


def adapted() -> dict[str, tuple[int, ...]]:
    """By hand: every matrix in a block."""
    return {n: s for n, s in text_shapes(CONFIG).items() if ".layers." in n and len(s) == 2}


def test_4b_on_one_gpu_of_24_gb_in_turns() -> None:
    result = on("1x4090")
    assert not [problem for problem in result.problems if problem.blocking and problem.kind != "checkpoint"]
    assert result.placement.time_sharing and not result.warnings
    trainer, matrices = rows(result, "trainer"), adapted()
    elements = sum(prod(shape) for shape in matrices.values())
    adapters = sum(16 * sum(shape) for shape in matrices.values())
    assert trainer[Component.FROZEN_WEIGHTS, "gpu", False] == 2 * PARAMETERS
    assert trainer[Component.FROZEN_WEIGHTS, "host", True] == 2 * PARAMETERS
    assert trainer[Component.BASE, "host", False] == 2 * elements
    assert trainer[Component.ADAPTERS, "gpu", False] == 12 * adapters
    assert trainer[Component.MOMENTS, "gpu", False] == 8 * adapters
    assert trainer[Component.CHECKPOINT_COPY, "host", False] == 12 * adapters
    absent = {Component.MASTERS, Component.GRADIENTS, Component.REFERENCE, Component.PUBLISHED}
    assert not absent & {row.component for row in result.memory}
    checkpoints, versions, _ = result.disk
    assert checkpoints.bytes == 3 * 12 * adapters < 2 * GIB
    assert versions.bytes == 2 * 2 * PARAMETERS + 12 * 4 * adapters
    assert result.model["adapter_parameters"] == adapters == 32_464_896


def test_4b_on_one_gpu_of_48_gb_side_by_side() -> None:
    result = on("1xl40s", "resources.share_mode=side_by_side")
    assert not [problem for problem in result.problems if problem.blocking and problem.kind != "checkpoint"]
    assert not result.placement.time_sharing and not result.warnings
    trainer = rows(result, "trainer")
    assert (Component.BASE, "gpu", False) in trainer, "there is room for it beside the merged weights"
    assert result.running_requests >= 128
    with pytest.raises(UserError, match=r"GPU 0 needs at least .* of GPU memory for engine0 and trainer"):
        plan.refuse(on("1x4090", "resources.share_mode=side_by_side", "train.reference_device=gpu"))


def test_several_ranks_share_the_model_and_each_has_all_adapters() -> None:
    several = ("resources.rollout_gpus=1", "resources.train_gpus=4", "resources.share_gpus=false")
    result = planned(load(RECIPE, *several, "resources.share_mode=auto"), facts("8.9", 5, host_gib=512))
    trainer, alone = rows(result, "trainer3"), rows(on("1xl40s"), "trainer")
    assert trainer[Component.FROZEN_WEIGHTS, "gpu", False] == PARAMETERS // 2
    assert trainer[Component.ADAPTERS, "gpu", False] == alone[Component.ADAPTERS, "gpu", False]


def test_merged_weights_that_travel_are_held_as_ever() -> None:
    result = on("1xl40s", "weights.transfer=delta")
    published = {row.component for row in result.memory if row.process == "trainer"}
    assert Component.PUBLISHED in published and Component.FULL_PUBLISHED not in published


def test_the_tiny_recipe() -> None:
    result = planned(load("tiny-lora-m2po-delta"), facts(), TINY)
    trainer, parameters = rows(result, "trainer"), result.model["parameters"]
    assert trainer[Component.FROZEN_WEIGHTS_FP32, "host", False] == 4 * parameters
    assert Component.MASTERS not in {row.component for row in result.memory if row.process == "trainer"}


@pytest.mark.parametrize("name", ["qwen3.5-0.8b-lora", "qwen2.5-0.5b-gsm8k-lora", RECIPE])
@pytest.mark.parametrize("machine", ["1x4090", "1xl40s", "1xh200"])
def test_the_shipped_recipes_fit_one_gpu(name: str, machine: str) -> None:
    result = on(machine, name=name)
    assert not [problem.message for problem in result.problems if problem.blocking]


# ---- targets ---------------------------------------------------------------------------------------------------------


def targets(adapter: Any, config: Any, *overrides: str) -> set[str]:
    table = recipe_io.load(RECIPE, overrides).lora
    assert table is not None
    return {lora_targets.last_name(n) for n in lora_targets.chosen(table, adapter, adapter.shapes(config))}


def test_auto_takes_every_projection_of_each_family() -> None:
    dense = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    hybrid = dense | {"in_proj_qkv", "in_proj_z", "in_proj_a", "in_proj_b", "out_proj"}
    for name in ("llama", "qwen2", "qwen3"):
        adapter = registry.get(name)
        assert adapter.tiny_config is not None
        assert targets(adapter, adapter.tiny_config()) == dense
    assert targets(qwen3_5.ADAPTER, TINY) == hybrid


def test_named_targets_and_one_that_there_is_not() -> None:
    chosen = targets(qwen3_5.ADAPTER, TINY, "lora.targets=q_proj,linear_attn.out_proj")
    assert chosen == {"q_proj", "out_proj"}
    with pytest.raises(UserError) as caught:
        targets(qwen3_5.ADAPTER, TINY, "lora.targets=q_proj,query,conv1d,embed_tokens")
    assert "`query`, `conv1d`, `embed_tokens`" in caught.value.message
    assert "in_proj_qkv" in (caught.value.hint or "")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("lora.dropout=0.1", "`lora.dropout` = 0.1 is not allowed: it takes 0"),
        ("lora.rank=0", "`lora.rank` = 0 is not allowed"),
        ("lora.targets=[]", "`lora.targets` = [] names no layer"),
        ("lora.ranks=8", "unknown key `lora.ranks`"),
    ],
)
def test_bad_tables(override: str, message: str) -> None:
    with pytest.raises(UserError) as caught:
        recipe_io.load("tiny-lora-m2po-delta", [override])
    assert message in caught.value.message


def test_an_adapter_travels_only_where_there_is_one() -> None:
    with pytest.raises(UserError, match=r"there is no table \[lora\]"):
        recipe_io.load("qwen3.5-tiny-m2po-delta", ["weights.transfer=adapter"])
