"""The codec: every pattern of bits comes back, small when little changed, and no malformed payload passes."""

from __future__ import annotations

import itertools
import struct
from typing import Any

import numpy as np
import pytest
import torch
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from astracli.weights import WeightCorrupt
from astracli.weights.device.difference import from_order
from astracli.weights.format import codec, container
from astracli.weights.format.digest import bits_of
from astracli.weights.format.flat import flatten
from astracli.weights.receive.placement import EngineSlice
from astracli.weights.receive.reading import Prepared
from astracli.weights.receive.resident import Resident

DTYPES: list[Any] = [np.uint16, np.uint32]
SPECIAL = {
    2: [0x0000, 0x8000, 0x7F80, 0xFF80, 0x7FC0, 0x7FC1, 0xFFFF, 0x7FFF, 0x0001, 0x8001, 0x7F7F, 0xFF7F],
    4: [0, 1 << 31, 0x7F800000, 0xFF800000, 0x7FC00000, 0x7FC00001, 0xFFFFFFFF, 0x7FFFFFFF, 1, 0x80000001],
}
"""Zeros of both signs, infinities, NaNs with payloads, the smallest and the largest numbers."""


def change(update: codec.DecodedPiece, bits: np.ndarray[Any, Any], cuts: tuple[int, ...] = ()) -> None:
    """Apply an update to the base's bits in place, as an engine does that holds them in parts."""
    flat = torch.from_numpy(bits.view(f"<i{bits.itemsize}"))
    slices = [EngineSlice(flat[low:high], low) for low, high in itertools.pairwise((0, *cuts, len(bits)))]
    Resident({"w": slices}).apply(Prepared(b"", 1, "delta", 0, None, flat=[flatten([("w", 0, update)])]))


def applied(encoded: codec.Encoded, base: np.ndarray[Any, Any], cuts: tuple[int, ...] = ()) -> np.ndarray[Any, Any]:
    new = base.copy()
    change(codec.decode(encoded.payload, encoded.encoding, encoded.count, len(base), base.itemsize), new, cuts)
    return new


def round_trip(base: np.ndarray[Any, Any], new: np.ndarray[Any, Any]) -> codec.Encoded:
    encoded = codec.encode(base, new)
    assert encoded.count == int(np.count_nonzero(base != new))
    assert (encoded.encoding == "none") == (encoded.count == 0)
    assert np.array_equal(applied(encoded, base), new)
    return encoded


def every_encoding(base: np.ndarray[Any, Any], new: np.ndarray[Any, Any]) -> list[codec.Encoded]:
    at = codec.changed_indices(base, new)
    return [codec.encode_as(encoding, base, new, at) for encoding in container.ENCODINGS]


@st.composite
def versions(draw: st.DrawFn, count: int = 2) -> list[np.ndarray[Any, Any]]:
    """Flat arrays of bits, each the one before with some elements replaced; special values are common."""
    dtype: np.dtype[Any] = np.dtype(draw(st.sampled_from(DTYPES)))
    size = draw(st.integers(0, 700))
    special = st.sampled_from(SPECIAL[dtype.itemsize])
    elements = special | st.integers(0, int(np.iinfo(dtype).max))
    chain = [draw(hnp.arrays(dtype, size, elements=elements))]
    for _ in range(count - 1):
        mask = draw(hnp.arrays(np.bool_, size)) if draw(st.booleans()) else np.full(size, draw(st.booleans()))
        chain.append(np.where(mask, draw(hnp.arrays(dtype, size, elements=elements)), chain[-1]))
    return chain


@settings(max_examples=150, deadline=None)
@given(versions())
def test_any_change_of_any_bits_comes_back(pair: list[np.ndarray[Any, Any]]) -> None:
    round_trip(*pair)


@settings(max_examples=60, deadline=None)
@given(versions())
def test_every_encoding_is_lossless_by_itself(pair: list[np.ndarray[Any, Any]]) -> None:
    base, new = pair
    if np.array_equal(base, new):
        return
    for encoded in every_encoding(base, new):
        assert np.array_equal(applied(encoded, base), new), encoded.encoding


@settings(max_examples=40, deadline=None)
@given(versions(count=6))
def test_a_chain_of_deltas_ends_at_the_last_version(chain: list[np.ndarray[Any, Any]]) -> None:
    weights = chain[0]
    for base, new in itertools.pairwise(chain):
        encoded = codec.encode(base, new)
        weights = applied(encoded, weights)
    assert np.array_equal(weights, chain[-1])


@settings(max_examples=60, deadline=None)
@given(versions(), st.integers(0, 700), st.integers(0, 700))
def test_an_update_that_is_cut_changes_every_part(pair: list[np.ndarray[Any, Any]], one: int, two: int) -> None:
    base, new = pair
    low, high = sorted((min(one, len(base)), min(two, len(base))))
    assert np.array_equal(applied(codec.encode(base, new), base, (low, high)), new)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_signs_of_zero_infinities_and_nan_payloads_survive(dtype: torch.dtype) -> None:
    base = bits_of(torch.tensor([0.0, -0.0, 1.0, float("inf"), float("-inf"), float("nan"), -1.0, 0.0], dtype=dtype))
    new = bits_of(torch.tensor([-0.0, 0.0, float("nan"), float("-inf"), 1.0, 0.0, float("nan"), 1e-7], dtype=dtype))
    new = new.copy()
    new[2] |= 0x15  # a NaN with a payload
    for encoded in every_encoding(base, new):
        assert np.array_equal(applied(encoded, base), new), encoded.encoding


def test_the_order_of_bits_is_the_order_of_floats() -> None:
    bits = np.arange(1 << 16, dtype=np.uint16)
    order = codec.to_order(bits)
    back = from_order(torch.from_numpy(order.view(np.int16))).numpy().view(np.uint16)
    assert len(np.unique(order)) == 1 << 16 and np.array_equal(back, bits)
    values = torch.from_numpy(bits.view(np.int16)).view(torch.bfloat16).float().numpy()
    finite = np.isfinite(values)
    ranked = values[finite][np.argsort(order[finite])]
    assert (np.diff(ranked) >= 0).all()


def test_long_gaps_take_the_escape() -> None:
    for gap in (253, 254, 255, 256, 257, 65535, 65536, 3_000_000):
        base = np.zeros(2 * gap + 3, np.uint16)
        new = base.copy()
        new[gap] = 1
        new[2 * gap + 1] = 7
        assert round_trip(base, new).encoding == "gap-ulp"


def adam_update(count: int, learning_rate: float, steps: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """bf16 weights before and after `steps` Adam steps on fp32 masters; moments warm, gradients mostly noise."""
    draw = torch.Generator().manual_seed(seed)
    weights = torch.randn(count, generator=draw) * 0.02
    first, second = torch.zeros(count), torch.ones(count)
    before = weights
    for step in range(12 + steps):
        gradient = torch.randn(count, generator=draw)
        first.mul_(0.9).add_(gradient, alpha=0.1)
        second.mul_(0.999).addcmul_(gradient, gradient, value=0.001)
        if step >= 12:
            weights = weights - learning_rate * first / second.sqrt()
    return before.bfloat16(), weights.bfloat16()


def test_an_adam_update_of_a_few_percent_costs_about_one_byte_a_change() -> None:
    before, after = (bits_of(t) for t in adam_update(2_000_000, 1.5e-6, 4))
    encoded = round_trip(before, after)
    assert encoded.encoding == "gap-ulp"
    assert 0.03 <= encoded.count / len(before) <= 0.05
    assert len(encoded.payload) / encoded.count < 1.15
    assert 2 * len(before) / len(encoded.payload) > 40


def test_most_changed_is_coded_dense_and_random_bits_cost_no_more_than_themselves() -> None:
    before, after = (bits_of(t) for t in adam_update(400_000, 3e-4, 4))
    encoded = round_trip(before, after)
    assert encoded.encoding == "dense-ulp" and len(encoded.payload) < 0.6 * before.nbytes
    draw = np.random.default_rng(0)
    for dtype in DTYPES:
        one, two = (draw.integers(0, np.iinfo(dtype).max, 200_000, dtype, endpoint=True) for _ in range(2))
        assert len(round_trip(one, two).payload) < one.nbytes * 1.001 + 100


def test_fp32_that_changes_everywhere_beats_raw() -> None:
    draw = np.random.default_rng(1)
    base = draw.standard_normal(100_000, dtype=np.float32)
    new = base * (1 + 1e-5 * draw.standard_normal(100_000).astype(np.float32))
    encoded = round_trip(base.view(np.uint32), new.view(np.uint32))
    assert encoded.encoding.startswith("dense-") and len(encoded.payload) < 0.6 * base.nbytes


# ---- malformed ------------------------------------------------------------------------------------------------------


def sample(encoding: str = "gap-ulp", itemsize: int = 2) -> tuple[codec.Encoded, int]:
    draw = np.random.default_rng(5)
    base = draw.integers(0, 60000, 5000).astype(f"<u{itemsize}")
    new = base.copy()
    new[draw.choice(5000, 12, replace=False)] += 3
    found = {e.encoding: e for e in every_encoding(base, new)}
    return found[encoding], len(base)


def resealed(blob: bytes) -> bytes:
    """A payload with a right checksum, so that the checks behind it are reached."""
    body = blob[:-8]
    return body + struct.pack("<Q", xxhash.xxh3_64_intdigest(body))


@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize("encoding", list(container.ENCODINGS))
def test_every_flip_and_truncation_is_detected(encoding: str, itemsize: int) -> None:
    encoded, length = sample(encoding, itemsize)
    draw = np.random.default_rng(9)
    for trial in range(300):
        blob = bytearray(encoded.payload)
        if trial % 3 == 2:
            del blob[draw.integers(len(blob)) :]
        else:
            blob[draw.integers(len(blob))] ^= 1 << draw.integers(8)
        with pytest.raises(WeightCorrupt):
            codec.decode(bytes(blob), encoding, encoded.count, length, itemsize)


def test_a_forged_payload_never_reaches_an_index_error() -> None:
    draw = np.random.default_rng(3)
    outcomes = {"refused": 0, "valid": 0}
    for encoding in container.ENCODINGS:
        encoded, length = sample(encoding)
        for _ in range(400):
            blob = bytearray(encoded.payload)
            blob[draw.integers(len(blob) - 8)] = draw.integers(256)
            try:
                update = codec.decode(resealed(bytes(blob)), encoding, encoded.count, length, 2)
            except WeightCorrupt:
                outcomes["refused"] += 1
                continue
            outcomes["valid"] += 1
            change(update, np.zeros(length, np.uint16))
            if update.indices is not None:
                assert (np.diff(update.indices) > 0).all() and update.indices[0] >= 0 and update.indices[-1] < length
    assert outcomes["refused"] > 300


def test_a_payload_ends_with_its_planes() -> None:
    encoded, length = sample()
    longer = resealed(encoded.payload[:-8] + b"x" + bytes(8))
    with pytest.raises(WeightCorrupt, match=r"payload planes end at byte \d+ of \d+"):
        codec.decode(longer, encoded.encoding, encoded.count, length, 2)


def test_a_dense_payload_has_no_long_gaps() -> None:
    encoded, length = sample("dense-ulp")
    blob = bytearray(encoded.payload)
    struct.pack_into("<Q", blob, container.HEADER.size - 8, 1)
    with pytest.raises(WeightCorrupt, match="2 planes for `dense-ulp`"):
        codec.decode(resealed(bytes(blob)), "dense-ulp", encoded.count, length, 2)


def test_a_piece_has_a_largest_size() -> None:
    long = np.broadcast_to(np.uint16(0), (container.MAX_PIECE + 1,))  # one element in memory
    with pytest.raises(ValueError, match="a piece of 2147483649 elements"):
        codec.encode_changed(long, long, np.zeros(1, np.int64))


def forged(
    gaps: list[int], long: list[int], values: list[int], *, length: int = 1000, escapes: int | None = None
) -> bytes:
    planes = [np.array(gaps, np.uint8)]
    planes += container.planes_of(np.array(long, "<u4")) if long else []
    planes += container.planes_of(np.array(values, "<u2"))
    frames = [container.deflate(p, 1) for p in planes]
    number = len(long) if escapes is None else escapes
    head = container.HEADER.pack(container.MAGIC, 1, 2, len(planes), 0, length, len(gaps), number)
    return resealed(head + b"".join(container.SIZE.pack(len(f)) for f in frames) + b"".join(frames) + bytes(8))


def test_what_each_check_refuses() -> None:
    def decode(blob: bytes, count: int, length: int = 1000) -> codec.DecodedPiece:
        return codec.decode(blob, "gap-ulp", count, length, 2)

    with pytest.raises(WeightCorrupt, match="payload with 0 changes and 0 long gaps among 1000 elements"):
        decode(forged([], [], []), 0)
    good = decode(forged([3, 255, 0], [300], [1, 2, 3]), 3)
    assert good.indices is not None and good.indices.tolist() == [3, 304, 305]
    refused = {
        "reaches element 1003 of 1000": (forged([3, 255], [999], [1, 2]), 2),
        "gap of 12 in its list": (forged([3, 255], [12], [1, 2]), 2),
        "1 escaped gaps, its header says 2": (forged([3, 255], [300, 300], [1, 2]), 2),
        "changes 1 elements, its header says 2": (forged([3, 4], [], [1, 0]), 2),
        "3 changes and 9 long gaps": (forged([3, 4, 5], [], [1, 1, 1], escapes=9), 3),
        "header": (forged([3, 4, 5], [], [1, 1, 1], length=7), 3),
        "planes for": (forged([3, 4], [300], [1, 1], escapes=0), 2),
        "shorter than its header": (b"ADP1", 1),
    }
    for message, (blob, count) in refused.items():
        with pytest.raises(WeightCorrupt, match=message):
            decode(blob, count)
    with pytest.raises(WeightCorrupt, match="unchanged piece"):
        codec.decode(b"x", "none", 0, 10, 2)


def test_a_frame_that_announces_more_than_belongs_there_is_not_inflated() -> None:
    frame = container.deflate(np.ones(1 << 24, np.uint8), 1)
    with pytest.raises(WeightCorrupt, match="16777216 bytes where 5 belong"):
        container.inflate(memoryview(frame), 5)
