"""The codec in torch operations writes the numpy codec's bytes."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from astracli.weights import codec, device

Bits = np.ndarray[Any, Any]


def by_numpy(base: Bits, new: Bits, piece: int) -> list[tuple[int, int, codec.Encoded]]:
    found = []
    for at in range(0, len(new), piece):
        encoded = codec.encode(base[at : at + piece], new[at : at + piece])
        if encoded.count:
            found.append((at, len(new[at : at + piece]), encoded))
    return found


def by_torch(base: Bits, new: Bits, piece: int, where: str = "cpu") -> list[tuple[int, int, codec.Encoded]]:
    old, now = (torch.from_numpy(b.view(f"<i{b.itemsize}").copy()).to(where) for b in (base, new))
    room = threading.Semaphore(1)
    return [tuple(work()[:3]) for _, work in device.coded_pieces([("w", old, now)], piece, 1, room)]  # type: ignore[misc]


def versions(seed: int, size: int, itemsize: int, share: float, wild: bool) -> tuple[Bits, Bits]:
    """Base and new: `share` of the elements changed, by a few ULP or to any bits."""
    draw = np.random.default_rng(seed)
    top = (1 << 8 * itemsize) - 1
    base = draw.integers(0, top, size, np.uint64, endpoint=True).astype(f"<u{itemsize}")
    other = draw.integers(0, top, size, np.uint64, endpoint=True).astype(base.dtype)
    near = base + draw.choice([1, -1, 2, 300], size, p=[0.45, 0.45, 0.09, 0.01]).astype(base.dtype)
    return base, np.where(draw.random(size) < share, other if wild else near, base)


@settings(max_examples=120, deadline=None)
@given(
    st.integers(0, 1 << 30), st.integers(0, 5000), st.sampled_from([2, 4]),
    st.sampled_from([0.0, 0.001, 0.03, 0.1, 0.13, 0.6, 1.0]), st.booleans(), st.sampled_from([64, 1024, 4096]),
)  # fmt: skip
def test_torch_and_numpy_write_the_same_bytes(
    seed: int, size: int, itemsize: int, share: float, wild: bool, piece: int
) -> None:
    base, new = versions(seed, size, itemsize, share, wild)
    assert by_torch(base, new, piece) == by_numpy(base, new, piece)


@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize("share", [0.0005, 0.04, 0.3, 0.9])
def test_pieces_large_enough_to_be_sampled(itemsize: int, share: float) -> None:
    base, new = versions(5, 600_000, itemsize, share, wild=False)
    found = by_torch(base, new, 1 << 18)
    assert found == by_numpy(base, new, 1 << 18)
    assert {length for _, length, _ in found} == {1 << 18, 600_000 - (2 << 18)}


def test_every_encoding_is_chosen_and_the_same() -> None:
    draw = np.random.default_rng(0)
    base = draw.integers(0, 1 << 32, 4096, np.uint64).astype("<u4")
    few = np.where(draw.random(4096) < 0.05, np.uint32(1 << 20), np.uint32(0))
    pairs = {
        "gap-ulp": versions(1, 4096, 2, 0.03, False),
        "gap-xor": (base, base ^ few),
        "dense-ulp": versions(1, 4096, 2, 0.9, False),
        "dense-xor": (base, base ^ np.uint32(1 << 30)),
        "dense-raw": (base, np.zeros_like(base)),
    }
    for encoding, (old, new) in pairs.items():
        found = by_torch(old, new, 4096)
        assert [e.encoding for _, _, e in found] == [encoding] and found == by_numpy(old, new, 4096)


def test_a_pass_waits_until_the_one_before_is_compressed() -> None:
    """Two passes may wait; the third brings nothing to the host before all of the first is compressed."""
    base, new = (torch.from_numpy(b.view("<i2")) for b in versions(2, 16 * 64 * 3, 2, 0.1, False))
    room = threading.Semaphore(2)
    pieces = device.coded_pieces([("w", base, new)], 64, 1, room)
    held = [next(pieces)[1] for _ in range(32)]
    waiting = threading.Thread(target=lambda: held.append(next(pieces)[1]))
    waiting.start()
    waiting.join(0.1)
    assert waiting.is_alive()
    for work in held[:15]:
        work()
    waiting.join(0.1)
    assert waiting.is_alive()
    held[15]()
    waiting.join(10)
    assert len(held) == 33


def a_model(seed: int, piece: int) -> list[tuple[str, Bits, Bits]]:
    """Tensors of both widths, empty, unchanged and changed in part, small and larger than a pass."""
    draw = np.random.default_rng(seed)
    sizes = [*draw.integers(0, 3 * piece, 30), 0, 16 * piece, 40 * piece + 5, 1, piece, 2 * piece]
    shares = draw.choice([0.0, 0.001, 0.05, 0.5], len(sizes))
    draws = enumerate(zip(sizes, shares, strict=True))
    return [
        (f"t{k}", *versions(seed + k, int(n), int(draw.choice([2, 2, 4])), share, False)) for k, (n, share) in draws
    ]


@pytest.mark.parametrize("piece", [64, 1024])
@pytest.mark.parametrize("seed", range(4))
def test_many_tensors_share_a_pass(seed: int, piece: int) -> None:
    model = a_model(100 * seed, piece)
    wanted = [(name, *found) for name, base, new in model for found in by_numpy(base, new, piece)]
    tensors = [(n, *(torch.from_numpy(b.view(f"<i{b.itemsize}")) for b in pair)) for n, *pair in model]
    works = device.coded_pieces(tensors, piece, 1, threading.Semaphore(2))  # type: ignore[arg-type]
    assert [(name, *work()[:3]) for name, work in works] == wanted
    assert len({name for name, *_ in wanted}) > 10


class Asked(TorchDispatchMode):
    """Counts operators, and those whose answer a GPU's host would have to wait for."""

    def __init__(self) -> None:
        super().__init__()
        self.count, self.waits = 0, list[str]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        name = func.overloadpacket.__name__
        by_mask = name.startswith("index") and any(
            t is not None and t.dtype == torch.bool for a in args if isinstance(a, (list, tuple)) for t in a
        )
        waits = ("_local_scalar_dense", "nonzero", "masked_select", "repeat_interleave", "unique", "item", "equal")
        if name in waits or by_mask:
            self.waits.append(name)
        return func(*args, **(kwargs or {}))


def test_the_device_is_asked_once_for_a_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its counts, some passes later. Everything else is asked for without an answer."""
    piece, looked = 1024, list[int]()
    model = [(f"t{k}", *versions(k, 700, 2, 0.03, False)) for k in range(400)]
    tensors = [(n, *(torch.from_numpy(b.view("<i2")) for b in pair)) for n, *pair in model]
    arrays, compare = device._Fetched.arrays, device._Pass.__init__
    begun = 0

    def watched(self: Any) -> Any:
        looked.append(begun)
        return arrays(self)

    def begin(self: Any, *args: Any) -> None:
        nonlocal begun
        begun += 1
        compare(self, *args)

    monkeypatch.setattr(device._Fetched, "arrays", watched)
    monkeypatch.setattr(device._Pass, "__init__", begin)
    with Asked() as asked:
        works = list(device.coded_pieces(tensors, piece, 1, threading.Semaphore(1000)))  # type: ignore[arg-type]
    passes = -(-400 // (16 * piece // 700))
    assert begun == passes == len(looked) and len(works) == 400
    assert looked[0] == 5 and asked.waits == [] and asked.count < 400 * 20
    works[0][1]()
    assert len(looked) == passes + 1, "a work looks at what came of it"


def test_a_wait_would_be_noticed() -> None:
    flags = torch.tensor([True, False])
    with Asked() as asked:
        torch.nonzero(flags), flags[flags], flags.sum().item(), torch.nonzero_static(flags, size=1)
    assert len(asked.waits) == 3


@pytest.mark.gpu
@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize("share", [0.0005, 0.04, 0.3, 0.9])
def test_a_gpu_writes_the_same_bytes(itemsize: int, share: float) -> None:
    base, new = versions(5, 3_000_000, itemsize, share, wild=False)
    assert by_torch(base, new, 1 << 16, "cuda") == by_numpy(base, new, 1 << 16)
