"""Admission and staleness arithmetic, by hand and by simulation."""

from __future__ import annotations

import random

import pytest

from astracli.rl.schedule import Admission, batch_reason, sample_seed


def allowance(*, batch_groups: int, max_staleness: int, next_step: int, version: int) -> int:
    """Groups that a long run may have in flight and waiting."""
    return Admission(
        batch_groups=batch_groups, max_staleness=max_staleness, next_step=next_step, version=version,
        steps=1000, in_flight=0, waiting=0,
    ).allowed  # fmt: skip


def test_allowance_at_staleness_0_is_one_batch_while_the_trainer_waits_and_none_while_it_trains() -> None:
    waits = allowance(batch_groups=8, max_staleness=0, next_step=3, version=3)
    trains = allowance(batch_groups=8, max_staleness=0, next_step=4, version=3)
    assert (waits, trains) == (8, 0)


def test_allowance_grows_with_staleness_and_shrinks_with_the_lag_of_the_engine() -> None:
    assert [allowance(batch_groups=16, max_staleness=1, next_step=5, version=v) for v in (5, 4, 3, 0)] == [32, 16, 0, 0]
    assert allowance(batch_groups=16, max_staleness=8, next_step=5, version=5) == 9 * 16
    assert allowance(batch_groups=16, max_staleness=1, next_step=3, version=5) == 32  # a version ahead allows no more


def test_the_last_groups_wait_for_training_while_staleness_forbids_them() -> None:
    """As many as the rest of the run needs are under way, but none is allowed: the engine is a version behind."""
    late = Admission(batch_groups=4, max_staleness=0, steps=2, next_step=1, version=0, in_flight=2, waiting=2)
    assert (late.allowed, late.needed, late.capacity) == (0, 4, 0)
    assert late.reason is not None and late.reason.endswith("staleness 0 is allowed; 2 groups in flight")
    last = Admission(batch_groups=4, max_staleness=0, steps=2, next_step=1, version=1, in_flight=2, waiting=2)
    assert last.reason == "the run's last 4 groups: 2 in flight, 2 waiting"


def test_reason_says_what_is_waited_for() -> None:
    full = Admission(batch_groups=16, max_staleness=1, steps=100, next_step=2, version=2, in_flight=16, waiting=16)
    assert full.capacity == 0
    assert full.reason == "training: 16 groups in flight, 16 waiting of 32 allowed (staleness 1)"
    behind = Admission(batch_groups=16, max_staleness=1, steps=100, next_step=4, version=2, in_flight=0, waiting=0)
    assert behind.reason == (
        "new weights in the engine: it is 2 versions behind the next batch, staleness 1 is allowed; 0 groups in flight"
    )
    last = Admission(batch_groups=4, max_staleness=8, steps=10, next_step=9, version=9, in_flight=1, waiting=3)
    assert last.reason == "the run's last 4 groups: 1 in flight, 3 waiting"
    over = Admission(batch_groups=4, max_staleness=8, steps=10, next_step=10, version=9, in_flight=0, waiting=0)
    assert over.reason == "the end of the run: every batch has its groups"
    assert (
        Admission(batch_groups=4, max_staleness=8, steps=10, next_step=9, version=9, in_flight=1, waiting=2).reason
        is None
    )


def test_capacity_never_exceeds_what_the_run_still_needs() -> None:
    assert (
        Admission(batch_groups=4, max_staleness=8, steps=3, next_step=1, version=1, in_flight=2, waiting=1).capacity
        == 5
    )


def test_batch_reason() -> None:
    common = {"step": 7, "batch_groups": 8, "in_flight": 3}
    assert batch_reason(**common, ready=5, due=0, dropped_in_a_row=0) == "groups for step 7: 5 of 8, 3 in flight"
    assert batch_reason(**common, ready=5, due=0, dropped_in_a_row=40).endswith("; 40 in a row dropped for no signal")
    tired = batch_reason(**common, ready=5, due=0, dropped_in_a_row=0, skipped_in_a_row=9)
    assert tired == "groups for step 7: 5 of 8, 3 in flight; 9 prompts in a row skipped"
    assert batch_reason(**common, ready=8, due=1, dropped_in_a_row=0) == (
        "1 group in flight that step 7 must take or none can"
    )


@pytest.mark.parametrize("staleness", [0, 1, 3])
@pytest.mark.parametrize("batch", [1, 2, 5])
def test_admitted_groups_that_come_back_in_order_never_expire(batch: int, staleness: int) -> None:
    """Play generation and training against each other: what admission lets in is trained on before its deadline."""
    draw = random.Random(batch * 10 + staleness)
    step, version, training = 0, 0, False
    ahead: list[int] = []
    for _ in range(3000):
        if draw.random() < 0.6:
            room = Admission(
                batch_groups=batch,
                max_staleness=staleness,
                steps=1000,
                next_step=step,
                version=version,
                in_flight=len(ahead),
                waiting=0,
            ).capacity
            ahead += [version] * min(room, draw.randint(1, batch))
        elif not training and len(ahead) >= batch:
            taken, ahead = ahead[:batch], ahead[batch:]
            assert all(v + staleness >= step for v in taken)
            step, training = step + 1, True
        elif training:
            version, training = step, False
    assert step > 200 // batch


def test_sample_seeds_depend_on_the_counters_alone_and_do_not_collide() -> None:
    seeds = {sample_seed(seed, lease, index) for seed in range(3) for lease in range(200) for index in range(16)}
    assert len(seeds) == 3 * 200 * 16
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert sample_seed(1, 2, 3) == sample_seed(1, 2, 3)
