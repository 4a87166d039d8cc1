"""What a plan takes when memory can be had for time: the quickest split that fits, by estimates checked by hand."""

from __future__ import annotations

import pytest
from machines import GIB, facts
from test_plan import load, planned

from astracli import plan, plan_memory, plan_place, plan_speed
from astracli.adapters import qwen3_5
from astracli.plan_speed import Pace
from astracli.plan_trainer import Split, recomputed

ONE_EACH = ("resources.rollout_gpus=1", "resources.train_gpus=1")
NAME = "qwen3.5-4b-m2po-delta"
SHAPE = qwen3_5.ADAPTER.memory_shape(qwen3_5.ADAPTER.known_configs["Qwen/Qwen3.5-4B"])


def test_seconds_by_hand() -> None:
    recipe, pace = load(NAME), Pace(flops=400e12, link=100e9)
    parameters, tokens = 4_205_751_296, 256 * 8192 / 4
    passes = tokens * SHAPE.flops_per_token / 400e12

    def seconds(split: Split, ranks: int = 1) -> float:
        return plan_speed.step_seconds(recipe, SHAPE, ranks, split, pace)

    assert seconds(Split()) == pytest.approx(passes)
    assert seconds(Split(recomputed="selective")) == pytest.approx(1.15 * passes)
    assert seconds(Split(recomputed="full"), 4) == pytest.approx(1.3 * passes / 4)
    assert seconds(Split("host")) - passes == pytest.approx(2 * parameters / 50e9), "in, once a step"
    both = 4 * 2 * 0.5 * 8 * parameters / 100e9
    assert seconds(Split("gpu", 0.5)) - passes == pytest.approx(both), "in and out, in each of four updates"
    without = load(NAME, "algorithm.kl_coef=0")
    assert plan_speed.step_seconds(without, SHAPE, 1, Split("host"), pace) == pytest.approx(passes)


def test_the_estimate_orders_what_was_measured_on_80_gb() -> None:
    """16,101, 14,740 and 13,206 tokens/s on one H200 held to 80 GB, without a reference: docs/benchmarks.md."""
    recipe = load(NAME, "algorithm.kl_coef=0")
    pace = plan_speed.pace([{"name": "NVIDIA H200", "compute_capability": "9.0"}])
    splits = (Split("gpu", 0.65, "none"), Split("gpu", 0.15, "selective"), Split("gpu", 0.0, "full"))
    seconds = [plan_speed.step_seconds(recipe, SHAPE, 1, split, pace) for split in splits]
    assert seconds[1] / seconds[0] == pytest.approx(16101 / 14740, rel=0.03)
    assert seconds[2] / seconds[0] == pytest.approx(16101 / 13206, rel=0.03)


@pytest.mark.parametrize(
    ("gib", "split"),
    [
        (141, Split("gpu", 0.0, "none")),
        (86, Split("host", 0.45, "none")),
        (79.6, Split("host", 0.65, "none")),
        (60, Split("host", 0.75, "selective")),
        (44, Split("host", 1.0, "full")),
    ],
)
def test_the_quickest_that_fits_is_taken(gib: float, split: Split) -> None:
    result = planned(load(NAME, *ONE_EACH), facts("9.0", 2, memory_gib=gib, host_gib=512))
    plan.refuse(result)
    assert result.placement.split == split
    assert plan_memory.total(result.memory, where="gpu", processes=["trainer"], fixed=True) <= gib * GIB
    options = plan_place.options(load(NAME, *ONE_EACH), SHAPE, 1, Pace())
    assert len(options) == len(set(options)) == 2 * 21 * 3
    assert ("activations", plan_place.KEPT[split.recomputed]) == result.placement.reasons[0][:2]


def test_the_plan_says_what_the_others_would_cost() -> None:
    result = planned(load(NAME, *ONE_EACH), facts("9.0", 2, memory_gib=60, host_gib=512))
    assert result.placement.reasons[0] == (
        "activations",
        "every second block's made again",
        "the quickest that fits 60.00 GiB (estimated); none again: does not fit, every again: 1.10 times as long",
    )
    blocked = planned(load(NAME, *ONE_EACH), facts("9.0", 2, memory_gib=30, host_gib=512))
    assert blocked.placement.reasons[0][2] == "needs least; nothing fits 30.00 GiB"


def test_four_gpus_share_what_one_had_to_move() -> None:
    for gib, capability, mode in ((79.6, "9.0", "none"), (44, "8.9", "selective")):
        split = planned(load(NAME), facts(capability, 8, memory_gib=gib, host_gib=512)).placement.split
        assert split == Split("gpu", 0.0, mode)


def test_a_slow_link_makes_computing_again_the_cheaper_way() -> None:
    recipe = load(NAME, *ONE_EACH, "algorithm.kl_coef=0")
    where = (recipe, SHAPE, {0: int(79.6 * GIB)}, [], [0])
    assert plan_place.place(*where, Pace(400e12, 100e9)).split == Split("gpu", 0.65, "none")
    assert plan_place.place(*where, Pace(400e12, 20e9)).split == Split("gpu", 0.15, "selective")
    assert plan_place.place(*where, Pace(400e12, 1e9)).split == Split("gpu", 0.0, "full")


def test_the_recipe_s_word_counts() -> None:
    asked = load(NAME, *ONE_EACH, "train.activation_checkpointing=full")
    result = planned(asked, facts("9.0", 2, memory_gib=141, host_gib=512))
    assert recomputed(asked, result.placement.split) == "full" == result.placement.split.recomputed
    assert result.placement.reasons == ()
    assert recomputed(asked, Split(recomputed="none")) == "full" and recomputed(load(NAME), Split()) == "none"
    shared = (*ONE_EACH, "resources.share_gpus=true")
    turns = planned(load(NAME, *shared, "resources.share_mode=turns"), facts("9.0", 1, memory_gib=141, host_gib=512))
    assert turns.placement.split.recomputed == "none", "in turns the GPU is the trainer's own"


def test_the_slowest_gpu_counts() -> None:
    h100, l40 = (
        {"name": n, "compute_capability": c} for n, c in (("NVIDIA H100 80GB HBM3", "9.0"), ("NVIDIA L40", "8.9"))
    )
    assert plan_speed.pace([h100, l40]) == plan_speed.pace([l40]) != plan_speed.pace([h100])
    assert plan_speed.pace([h100]).flops == pytest.approx(0.42 * 989e12) and plan_speed.pace([h100]).link == 99e9
    assert plan_speed.pace([l40]) == Pace(pytest.approx(0.42 * 181e12), 50e9)
    names = ("H200", "H100 80GB HBM3", "H100 PCIe", "L40", "L40S")
    assert [plan_speed.peak(f"NVIDIA {name}") for name in names] == [989, 989, 756, 181, 362], "the most exact name"
    assert plan_speed.peak("a gpu", "10.0") == 2250
    assert plan_speed.peak("a gpu", "7.5") == plan_speed.peak("a gpu") == 300
    assert plan_speed.pace([]) == Pace()
    assert plan_speed.pace([{"name": "odd", "compute_capability": None}]).link == 50e9
