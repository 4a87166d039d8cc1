"""The digest: numpy, torch and a plain loop agree; pieces add up; what changes, shows."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from astracli.weights.format import digest

MASK = (1 << 64) - 1


def splitmix(value: int) -> int:
    z = (value + 0x9E3779B97F4A7C15) & MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
    return z ^ (z >> 31)


def by_hand(bits: np.ndarray, start: int = 0) -> digest.Lanes:
    """The definition, one element at a time."""
    lanes = []
    for column, row in zip(digest.COLUMN_SEEDS, digest.ROW_SEEDS, strict=True):
        total = 0
        for k, value in enumerate(bits.view(f"<i{bits.itemsize}").tolist(), start):
            total += (splitmix(splitmix(k >> 14) ^ row) | 1) * (splitmix(splitmix(k & 16383) ^ column) | 1) * value
        lanes.append(total & MASK)
    return lanes[0], lanes[1]


def random_bits(size: int, dtype: str, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, np.iinfo(dtype).max, size, dtype, endpoint=True)


@pytest.mark.parametrize("dtype", ["<u2", "<u4"])
@pytest.mark.parametrize(
    ("size", "start"), [(0, 0), (1, 0), (5, 16380), (40_000, 7), (16384, 16384), (33_000, 1 << 33)]
)
def test_numpy_and_the_definition_agree(size: int, start: int, dtype: str) -> None:
    bits = random_bits(size, dtype)
    expected = by_hand(bits, start)
    assert digest.digest_bits(bits, start) == expected
    signed = torch.from_numpy(bits.view(f"<i{bits.itemsize}"))
    assert digest.digest_tensor(signed.view(torch.bfloat16 if dtype == "<u2" else torch.float32), start) == expected


def test_the_values_are_frozen() -> None:
    """A digest of a published version must mean the same in every release."""
    bits = np.arange(40_000, dtype=np.uint16) * np.uint16(7)
    assert digest.to_hex(digest.digest_bits(bits)) == "35ee49c7a8bb8414d05f01e78ce5f120"
    assert (
        digest.to_hex(digest.digest_bits(bits.astype(np.uint32) << np.uint32(15))) == "e26dc7ad420a00008e89f5b978900000"
    )


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 50_000), st.integers(0, 50_000), st.integers(0, 50_000), st.integers(0, 1 << 40))
def test_pieces_add_up_in_any_order(size: int, one: int, two: int, start: int) -> None:
    bits = random_bits(size, "<u2", size)
    a, b = sorted((min(one, size), min(two, size)))
    total = digest.ZERO
    for low, high in ((b, size), (0, a), (a, b)):
        total = digest.add(total, digest.digest_bits(bits[low:high], start + low))
    assert total == digest.digest_bits(bits, start)


def test_every_single_bit_and_every_swap_shows_in_both_lanes() -> None:
    bits = random_bits(40_000, "<u2", 3)
    before = digest.digest_bits(bits)
    draw = np.random.default_rng(4)
    for trial in range(400):
        changed = bits.copy()
        i, j = draw.integers(len(bits), size=2)
        if trial % 2:
            changed[i] ^= np.uint16(1 << draw.integers(16))
        else:
            changed[i], changed[j] = bits[j], bits[i]
        if np.array_equal(changed, bits):
            continue
        after = digest.digest_bits(changed)
        assert after[0] != before[0] and after[1] != before[1]


def test_sign_flips_that_cancel_in_a_plain_sum_show() -> None:
    bits = np.zeros(40_000, np.uint32)
    seen = set()
    for i, j in ((0, 1), (5, 16389), (16384, 32768), (3, 39_999)):
        flipped = bits.copy()
        flipped[[i, j]] = 1 << 31
        seen.add(digest.digest_bits(flipped))
    assert len(seen) == 4 and digest.ZERO not in seen


def test_a_tensor_of_any_shape_and_the_numpy_view_share_memory() -> None:
    tensor = torch.randn(13, 7).bfloat16()
    view = digest.bits_of(tensor)
    assert view.shape == (91,) and view.dtype == np.uint16
    assert digest.digest_tensor(tensor, 11) == digest.digest_bits(view, 11)
    view[:] = 0
    assert not tensor.any()


def test_hex_goes_both_ways_and_other_dtypes_are_refused() -> None:
    assert digest.from_hex(digest.to_hex((1, MASK))) == (1, MASK)
    with pytest.raises(ValueError, match="3 digits"):
        digest.from_hex("abc")
    with pytest.raises(ValueError, match="float64"):
        digest.digest_tensor(torch.zeros(3, dtype=torch.float64))
