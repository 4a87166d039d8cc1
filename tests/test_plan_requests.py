"""How many requests an engine gets when the recipe leaves it open: by hand on recorded machines."""

from __future__ import annotations

import configs
import pytest
from machines import GIB, facts
from test_plan import TINY, load, planned, tiny

from astracli.config.recipe import Recipe
from astracli.config.recipe_rollout import RUNNING
from astracli.plan import build as plan
from astracli.plan import memory as plan_memory
from astracli.plan.view import to_json, what

WEIGHTS = 2 * 4_205_751_296
STATE = 24 * (32 * 128 * 128 * 4 + 8192 * 3 * 2)
"""49.1 MiB a request, and one more."""
KV = 8192 * 32 * 1024
"""256 MiB a full context."""


def opened(name: str, *overrides: str) -> Recipe:
    """A shipped recipe that leaves to memory alone how many requests."""
    recipe = load(name, "rollout.max_running_requests=auto", *overrides)
    return recipe.model_copy(update={"rollout": recipe.rollout.model_copy(update={"running_ceiling": {}})})


@pytest.mark.parametrize(
    ("memory_gib", "fit", "given"),
    [
        (52, 95, 88),  # 0.7 x 52 GiB - 7.83 GiB - 49.1 MiB = 28.52 GiB, over 305.1 MiB each
        (80, 161, 160),  # 48.12 GiB
        (141, 304, 256),  # 90.82 GiB; more than 256 are of no use
    ],
)
def test_an_engine_with_a_gpu_of_its_own(memory_gib: float, fit: int, given: int) -> None:
    assert int((0.7 * memory_gib * GIB - WEIGHTS - STATE) / (KV + STATE)) == fit
    result = planned(load("qwen3.5-4b-m2po-delta"), facts("8.9", 8, memory_gib=memory_gib, host_gib=512))
    assert result.running_requests == given
    (row,) = [row for row in result.placement.reasons if row[0] == "requests"]
    of_no_use = "; more than 256 are of no use" if given == 256 else ""
    assert row[1:] == (
        f"{given} at once",
        f"70% of {memory_gib:.2f} GiB less 7.83 GiB of weights: {fit} fit, "
        f"with a full context of 256.0 MiB and 49.1 MiB of state each{of_no_use}",
    )
    held = {what(r): r.bytes for r in result.memory if r.process == "engine0"}
    assert held["recurrent state"] == (given + 1) * STATE
    kv = held["KV cache (bf16), one request"] + held["KV cache (bf16), the others"]
    assert kv == given * KV, "no request is ever retracted"
    plan.refuse(result)


@pytest.mark.parametrize(("memory_gib", "given"), [(22.5, 24), (44, 32), (48, 32), (48.1, 80)])
def test_a_recipe_may_know_of_a_ceiling_of_small_gpus(memory_gib: float, given: int) -> None:
    """The 32 that ran on 44 GB L40s do not follow from memory: 76 fit there."""
    document = facts("8.9", 8, memory_gib=memory_gib, host_gib=512)
    for name in ("qwen3.5-4b-m2po-delta", "qwen3.5-4b-m2po-full"):
        result = planned(load(name), document)
        assert result.running_requests == given == to_json(result)["running_requests"]
        (row,) = [row for row in result.placement.reasons if row[0] == "requests"]
        assert row[1] == f"{given} at once"
        said = "; rollout.running_ceiling of GPUs of up to 48 GiB is 32"
        assert row[2].endswith(said) == (given == 32), row
        held = {what(r): r.bytes for r in result.memory if r.process == "engine0"}
        assert held["recurrent state"] == (given + 1) * STATE


def test_of_several_ceilings_that_of_the_smallest_memory_holds() -> None:
    document = facts("8.9", 8, memory_gib=40, host_gib=512)
    several = load("qwen3.5-4b-m2po-delta", "rollout.running_ceiling={41 = 11, 39 = 3}")
    assert several.rollout.running_ceiling == {"41": 11, "39": 3}
    assert planned(several, document).running_requests == 11
    raised = load("qwen3.5-4b-m2po-delta", "rollout.running_ceiling.48=256")
    assert planned(raised, document).running_requests == 64
    number = load("qwen3.5-4b-m2po-delta", "rollout.max_running_requests=50")
    assert planned(number, document).running_requests == 50, "what the recipe says stays"


def test_no_more_than_admission_lets_be_under_way() -> None:
    few = opened("qwen3.5-4b-m2po-delta", "train.max_staleness=0", "train.batch_groups=40", "eval.max_concurrency=64")
    result = planned(few, facts("9.0", 8, memory_gib=141, host_gib=512))
    assert result.running_requests == 80, "40 groups of 8 over 4 engines"


def test_beside_a_trainer_one_request_in_four_finds_a_full_context() -> None:
    shared = ("resources.rollout_gpus=1", "resources.train_gpus=1", "resources.share_gpus=true")
    recipe = opened("qwen3.5-4b-m2po-delta", *shared)
    document = facts("9.0", 1, memory_gib=110, host_gib=512)
    result = planned(recipe, document)
    plan.refuse(result)
    count, fraction = result.running_requests, result.placement.mem_fraction_static
    assert fraction is not None and count >= 8 and count % 8 == 0
    static = WEIGHTS + (count + 1) * STATE + count // 4 * KV
    assert static <= fraction * 110 * GIB
    assert plan_memory.on_gpu(result.memory, ["engine0", "trainer"], fixed=True) <= 110 * GIB
    (row,) = [row for row in result.placement.reasons if row[0] == "requests"]
    assert (
        row[2].startswith("what the trainer leaves of 110.00 GiB: ")
        and "for one in 4, 49.1 MiB of state each" in row[2]
    )
    time_sharing = planned(opened("qwen3.5-4b-m2po-delta", *shared, "resources.share_mode=time_sharing"), document)
    assert time_sharing.running_requests > count, "with time sharing the engine has the whole GPU"
    plan.refuse(time_sharing)


def test_a_dense_model_counts_its_kv_cache_alone() -> None:
    result = planned(opened("qwen3-1.7b-m2po-delta"), facts("8.9", 2, memory_gib=44, host_gib=512))
    (row,) = [row for row in result.placement.reasons if row[0] == "requests"]
    assert "state" not in row[2] and result.running_requests > 8


def test_what_the_recipe_says_stays_and_a_cpu_takes_the_default() -> None:
    said = planned(load("llama3-8b-instruct-m2po-delta"), facts("8.9", 8, memory_gib=80, host_gib=512))
    assert said.running_requests == 32 and "requests" not in {row[0] for row in said.placement.reasons}
    assert planned(opened("qwen3.5-tiny-m2po-delta"), facts(), TINY).running_requests == RUNNING
    assert planned(tiny(), facts(), TINY).running_requests == 256
    elsewhere = planned(load("qwen3.5-4b-m2po-delta"), facts())
    assert elsewhere.running_requests == RUNNING
    assert elsewhere.placement.reasons[0] == ("requests", "32 at once", "the memory of its GPU is not known")


def test_the_processes_are_told() -> None:
    recipe = opened("qwen3.5-4b-m2po-delta", "resources.rollout_gpus=1", "resources.train_gpus=1")
    result = planned(recipe, facts("9.0", 2, memory_gib=141, host_gib=512))
    config = configs.of_plan(recipe, result)["engine0"]
    assert config.recipe.rollout.max_running_requests == config.recipe.rollout.running == 256
