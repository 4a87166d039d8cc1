"""Groups to minibatches to micro-batches: whole samples, near-equal tokens, each token under its right position."""

from __future__ import annotations

import numpy as np
import pytest
from training_tools import recipe, sample_groups

from astracli.rl.batch import Batch, build_batch
from astracli.rl.types import Group, Sample, Segment

PAD = 0


def batch(groups: list[Group], **values: int) -> Batch:
    own = {key: values.pop(key) for key in ("minibatches", "tokens_per_microbatch") if key in values}
    chosen = recipe(train={"minibatches": 4, "tokens_per_microbatch": 60} | own)
    chosen = chosen.model_copy(update={"seed": values.pop("seed", 1)})
    return build_batch(groups, chosen, pad_token=PAD, **{"step": 3} | values)


def indices(b: Batch) -> list[list[list[int]]]:
    return [[[row.index for row in micro.rows] for micro in minibatch] for minibatch in b.minibatches]


def test_every_sample_is_trained_once_and_whole() -> None:
    groups = sample_groups(None, 16, seed=0, size=8)
    b = batch(groups)
    seen = [i for minibatch in indices(b) for micro in minibatch for i in micro]
    assert sorted(seen) == list(range(128))
    assert b.loss_tokens == sum(len(s.tokens) for g in groups for s in g.samples)
    assert [sum(len(m.target_N) for m in minibatch) for minibatch in b.minibatches] == b.minibatch_tokens


def test_minibatches_hold_near_equal_token_counts() -> None:
    b = batch(sample_groups(None, 16, seed=0, size=8))
    loads = [sum(len(row) for micro in minibatch for row in micro.rows) for minibatch in b.minibatches]
    assert max(loads) - min(loads) <= 2


def test_micro_batches_keep_the_budget_and_long_rows_travel_alone() -> None:
    groups = sample_groups(None, 8, seed=0)
    groups[0].samples[0].segments[0] = Segment(0, np.arange(2, 60, dtype=np.int32), np.zeros(58, np.float32))
    b = batch(groups, tokens_per_microbatch=48)
    for micro in (m for minibatch in b.minibatches for m in minibatch):
        assert micro.tokens_BL.size <= 48 or len(micro.rows) == 1
        assert micro.tokens_BL.shape[1] == max(len(r) for r in micro.rows)


def test_positions_predict_the_token_after_them() -> None:
    b = batch(sample_groups(None, 4, seed=2))
    for micro in (m for minibatch in b.minibatches for m in minibatch):
        length = micro.tokens_BL.shape[1]
        n = 0
        for row_number, row in enumerate(micro.rows):
            for t in range(row.loss_tokens):
                r, column = divmod(int(micro.predict_N[n]), length)
                assert (r, column) == (row_number, row.prompt_length + t - 1)
                assert micro.tokens_BL[r, column + 1] == micro.target_N[n] == row.sample.tokens[t]
                assert micro.advantage_N[n] == np.float32(row.advantage)
                n += 1
        assert n == len(micro.predict_N)
        assert (micro.mask_BL.sum(1) == [len(r) for r in micro.rows]).all()
        assert (micro.tokens_BL[micro.mask_BL == 0] == PAD).all()


def test_the_division_is_fixed_by_seed_and_step_alone() -> None:
    groups = sample_groups(None, 16, seed=0, size=8)
    first = indices(batch(groups))
    assert indices(batch(list(reversed(groups)))) == first
    assert indices(batch(groups, step=4)) != first
    assert indices(batch(groups, seed=2)) != first


@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_share_a_minibatch_and_stay_in_step(world_size: int) -> None:
    groups = sample_groups(None, 5, seed=0)
    whole = batch(groups)
    shares = [batch(groups, rank=rank, world_size=world_size) for rank in range(world_size)]
    for number, minibatch in enumerate(whole.minibatches):
        parts = [share.minibatches[number] for share in shares]
        assert len({len(part) for part in parts}) == 1
        together = sorted(row.index for part in parts for micro in part for row in micro.rows)
        assert together == sorted(row.index for micro in minibatch for row in micro.rows)
    assert all(share.minibatch_tokens == whole.minibatch_tokens for share in shares)


def test_a_rank_without_rows_gets_empty_micro_batches() -> None:
    group = sample_groups(None, 1, seed=0, size=2)
    b = batch(group, minibatches=2, rank=1, world_size=2)
    for minibatch in b.minibatches:
        assert [len(m.rows) for m in minibatch] == [0]
        assert minibatch[0].tokens_BL.shape == (1, 1)


def test_fewer_rows_than_minibatches() -> None:
    assert len(batch(sample_groups(None, 1, seed=0, size=2)).minibatches) == 2


def test_an_empty_completion_counts_in_its_group_and_trains_nothing() -> None:
    (group,) = sample_groups(None, 1, seed=0, size=2)
    group.samples.append(Sample(2, [], "stop", 0.0))
    for sample, reward in zip(group.samples, (1.0, 0.0, 0.0), strict=True):
        sample.reward = reward
    b = batch([group])
    # rewards 1 0 0: mean 1/3, unbiased std 1/sqrt(3)
    assert [round(r.advantage, 3) for r in b.rows] == [1.155, -0.577]
    with pytest.raises(ValueError, match="no completion token"):
        batch([Group(0, "p", np.array([2], np.int32), [Sample(0, [], "stop")])])


def test_staleness_counts_tokens_of_every_segment() -> None:
    (group,) = sample_groups(None, 1, seed=0, size=1)
    group.samples[0].segments = [
        Segment(4, np.array([2, 3, 4], np.int32), np.zeros(3, np.float32)),
        Segment(6, np.array([5], np.int32), np.zeros(1, np.float32)),
    ]
    assert batch([group]).staleness(7) == (2.5, 3)
