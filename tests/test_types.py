"""Groups as they travel: what is packed comes back, what is not a group is refused, ages and signal by hand."""

from __future__ import annotations

import msgpack
import numpy as np
import pytest

from astracli.rl.types import Group, Sample, Segment, pack_group, unpack_group


def segment(version: int, *tokens: int) -> Segment:
    return Segment(version, np.array(tokens, np.int32), -np.array(tokens, np.float32) / 8)


def group(*rewards: float) -> Group:
    first = Sample(0, [segment(6, 3, 4), segment(4, 5)], "stop", rewards[0], "right", "three four five")
    others = [Sample(i, [segment(5, 7)], "length", reward, "wrong", "é") for i, reward in enumerate(rewards[1:], 1)]
    return Group(9, "p9", np.array([1, 2], np.int32), [first, *others], "?", "!", {"level": "add2"})


def test_a_group_comes_back_as_it_was_packed() -> None:
    sent = group(1.0, 0.25)
    found = unpack_group(pack_group(sent))
    assert pack_group(found) == pack_group(sent)
    assert (found.lease_id, found.problem_id, found.problem, found.answer, found.meta) == (
        *(9, "p9", "?", "!"),
        {"level": "add2"},
    )
    first = found.samples[0]
    assert (first.tokens.tolist(), first.versions.tolist()) == ([3, 4, 5], [6, 6, 4])
    assert (first.tokens.dtype, first.logprobs.tolist()) == (np.int32, [-0.375, -0.5, -0.625])
    assert [(s.index, s.finish_reason, s.reward, s.verdict, s.text) for s in found.samples] == [
        (0, "stop", 1.0, "right", "three four five"),
        (1, "length", 0.25, "wrong", "é"),
    ]


def test_a_group_is_as_old_as_its_oldest_token() -> None:
    assert group(1.0, 0.0).oldest_version == 4
    assert Group(0, "p", np.zeros(0, np.int32), [Sample(0, [], "stop")]).oldest_version == 0


def test_signal_is_a_difference_of_rewards() -> None:
    assert group(0.0, 0.5).has_signal and group(1.0, 0.5).has_signal
    assert not group(1.0, 1.0).has_signal and not group(0.0, 0.0).has_signal
    assert not Group(0, "p", np.zeros(0, np.int32), []).has_signal


def test_what_is_no_group_is_refused() -> None:
    short = group(1.0, 0.0)
    short.samples[0].segments[0].logprobs = short.samples[0].segments[0].logprobs[:1]
    with pytest.raises(ValueError, match="segment with 2 tokens and 1 log-probabilities"):
        unpack_group(pack_group(short))
    for blob in (b"", b"\xc1", msgpack.packb([1, 2]), msgpack.packb({"lease_id": 1}), pack_group(short)[:-3]):
        with pytest.raises(ValueError, match="not a packed group"):
            unpack_group(blob)
