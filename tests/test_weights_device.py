"""The codec in torch operations writes the numpy codec's bytes."""

from __future__ import annotations

import contextlib
import signal
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import xxhash
from children import children, kill
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from astracli.errors import RunFailed
from astracli.process import channel
from astracli.weights.device import difference as device
from astracli.weights.format import codec
from astracli.weights.format.manifest import FileEntry, hash_file
from astracli.weights.publish import coder, encoder, payload
from astracli.weights.publish.snapshot import copies

Bits = np.ndarray[Any, Any]


def by_numpy(base: Bits, new: Bits, piece: int) -> list[tuple[int, int, codec.Encoded]]:
    found = []
    for at in range(0, len(new), piece):
        encoded = codec.encode(base[at : at + piece], new[at : at + piece])
        if encoded.count:
            found.append((at, len(new[at : at + piece]), encoded))
    return found


Coded = tuple[str, int, int, codec.Encoded]


def coded(tensors: list[tuple[str, torch.Tensor, torch.Tensor]], piece: int) -> list[Coded]:
    """(name, start, length, payload) of every changed piece, coded in this process."""
    blocks: list[torch.Tensor] = []

    def block(size: int) -> tuple[int, torch.Tensor]:
        blocks.append(torch.empty(size, dtype=torch.uint8))
        return len(blocks) - 1, blocks[-1]

    result: list[Coded] = []
    for found in device.compared(tensors, piece, block):
        found.ready.wait()
        jobs = coder.encoded(blocks[found.work.block].numpy(), found.work, 1, threads=2)
        made = dict(one for job in (*jobs[0], *jobs[1]) for one in job())
        for number, (name, described) in enumerate(zip(found.names, found.work.pieces, strict=True)):
            result.append((name, *described[:2], made.pop(number)))
        assert not made
    return result


def signed(bits: Bits) -> torch.Tensor:
    return torch.from_numpy(bits.view(f"<i{bits.itemsize}").copy())


def by_torch(base: Bits, new: Bits, piece: int, where: str = "cpu") -> list[tuple[int, int, codec.Encoded]]:
    return [found[1:] for found in coded([("w", signed(base).to(where), signed(new).to(where))], piece)]


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


def a_model(seed: int, piece: int) -> list[tuple[str, Bits, Bits]]:
    """Tensors of both widths, empty, unchanged and changed in part, small and larger than a pass."""
    draw = np.random.default_rng(seed)
    sizes = [*draw.integers(0, 3 * piece, 30), 0, 16 * piece, 70 * piece + 5, 1, piece, 2 * piece]
    shares = draw.choice([0.0, 0.001, 0.05, 0.5], len(sizes))
    draws = enumerate(zip(sizes, shares, strict=True))
    return [
        (f"t{k}", *versions(seed + k, int(n), int(draw.choice([2, 2, 4])), share, False)) for k, (n, share) in draws
    ]


def pairs(model: list[tuple[str, Bits, Bits]], flat: bool) -> list[tuple[str, torch.Tensor, torch.Tensor]]:
    """As tensors: each by itself, or those of a width behind one another in one."""
    if not flat:
        return [(name, signed(base), signed(new)) for name, base, new in model]
    sides: list[dict[str, torch.Tensor]] = []
    for side in (1, 2):
        views: dict[str, torch.Tensor] = {}
        for itemsize in (2, 4):
            own = [item for item in model if item[side].itemsize == itemsize]
            if not own:
                continue
            whole = signed(np.concatenate([item[side] for item in own]))
            parts = whole.split([len(item[side]) for item in own])
            views |= {item[0]: part for item, part in zip(own, parts, strict=True)}
        sides.append(views)
    return [(name, sides[0][name], sides[1][name]) for name, *_ in model]


@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("piece", [64, 1024])
@pytest.mark.parametrize("seed", range(4))
def test_many_tensors_share_a_pass(seed: int, piece: int, flat: bool) -> None:
    model = a_model(100 * seed, piece)
    wanted = [(name, *found) for name, base, new in model for found in by_numpy(base, new, piece)]
    assert coded(pairs(model, flat), piece) == wanted
    assert len({name for name, *_ in wanted}) > 10


def test_jobs_beside_each_other_take_their_time_once() -> None:
    clock, both = coder.BusyClock(), threading.Barrier(2)

    def job() -> list[tuple[int, codec.Encoded]]:
        both.wait(60)
        time.sleep(0.2)
        return []

    begun = time.perf_counter()
    jobs = [threading.Thread(target=clock.timed, args=(job,)) for _ in range(2)]
    for one in jobs:
        one.start()
    for one in jobs:
        one.join()
    time.sleep(0.1)
    assert 0.19 <= clock.taken() <= time.perf_counter() - begun - 0.09 and clock.taken() == 0.0


@pytest.mark.parametrize("flat", [False, True])
def test_another_process_writes_what_this_one_would(flat: bool, tmp_path: Path) -> None:
    piece = 1024
    before = children()
    with contextlib.closing(encoder.EncoderProcess(3)) as process:
        for version in range(3):
            model = a_model(1000 + 100 * version, piece)
            wanted = [(name, *found) for name, base, new in model for found in by_numpy(base, new, piece)]
            path = tmp_path / f"{version}.bin"
            made = device.compared(pairs(model, flat), piece, process.block)
            begun = time.perf_counter()
            found = list(process.code(path, 1, made))
            file = path.read_bytes()
            assert process.files == {path.name: FileEntry(len(file), hash_file(path))}
            payloads = [file[c.offset : c.offset + c.size] for _, c in found]
            assert b"".join(payloads) == file and [c.checksum for _, c in found] == [
                xxhash.xxh3_128_hexdigest(payload) for payload in payloads
            ]
            assert [
                (name, c.start, c.length, codec.Encoded(c.encoding, c.changes, payload))
                for (name, c), payload in zip(found, payloads, strict=True)
            ] == wanted
            assert 0 < process.encode_s < time.perf_counter() - begun, "jobs beside each other count once"
            assert process.write_s > 0 and process.diff_s > 0
        blocks = len(process.blocks)
        assert blocks <= encoder.COPIES + encoder.WORKS + 2, "blocks are used again"
        assert list(process.code(tmp_path / "none", 1, iter(()))) == [] and process.files == {}
        assert not (tmp_path / "none").exists()
        (child,) = children() - before
        assert child.is_running()
    assert children() == before


def test_a_coder_that_dies_or_cannot_write_ends_the_version_with_the_cause(tmp_path: Path) -> None:
    model = a_model(7, 64)

    def code(process: encoder.EncoderProcess, path: Path) -> list[Any]:
        return list(process.code(path, 1, device.compared(pairs(model, False), 64, process.block)))

    before = children()
    with contextlib.closing(encoder.EncoderProcess(1)) as process:
        with pytest.raises(OSError, match="No such file"):
            code(process, tmp_path / "absent" / "d.bin")
        assert children() == before, "what was under way belongs to that file"
        wanted = code(process, tmp_path / "d.bin")
        assert len(wanted) > 20
        (child,) = children() - before
        child.send_signal(signal.SIGINT)  # a terminal's Ctrl-C reaches the whole group
        assert code(process, tmp_path / "e.bin") == wanted and children() - before == {child}
        kill(child)
        with pytest.raises(RunFailed, match="codes weights ended with -9"):
            code(process, tmp_path / "f.bin")
        broken = device.compared(pairs(model, False), 64, lambda size: process.block(size) if size < 99 else 1 / 0)  # type: ignore[arg-type,return-value]
        with pytest.raises(ZeroDivisionError):
            list(process.code(tmp_path / "g.bin", 1, broken))
        assert code(process, tmp_path / "h.bin") == wanted


def test_a_child_that_is_told_nonsense_ends() -> None:
    process, link = channel.child("astracli.weights.publish.coder", "2")
    with link, open("/dev/null", "rb") as file:
        channel.send(link, {"new": 0, "size": 4096}, file.fileno())
        assert process.wait(60) == 1


class Asked(TorchDispatchMode):
    """Counts operators whose answer a GPU's host would have to wait for."""

    def __init__(self) -> None:
        super().__init__()
        self.waits = list[str]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        by_mask = name.startswith("index") and any(
            t is not None and t.dtype == torch.bool for a in args if isinstance(a, (list, tuple)) for t in a
        )
        waits = ("_local_scalar_dense", "nonzero", "masked_select", "repeat_interleave", "unique", "item", "equal")
        if name in waits or by_mask:
            self.waits.append(name)
        return func(*args, **(kwargs or {}))


def test_the_device_is_asked_once_for_a_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    """For its counts, some passes later. Nothing else waits for an answer."""
    piece, begun, waited = 1024, 0, list[int]()
    model = [(f"t{k}", *versions(k, 700, 2, 0.03, False)) for k in range(800)]
    compare, wait = device.ComparePass.__init__, device.Event.wait

    def begin(self: Any, *args: Any) -> None:
        nonlocal begun
        begun += 1
        compare(self, *args)

    def watched(self: Any) -> None:
        waited.append(begun)
        wait(self)

    monkeypatch.setattr(device.ComparePass, "__init__", begin)
    monkeypatch.setattr(device.Event, "wait", watched)
    tensors = pairs(model, flat=False)
    with Asked() as asked:
        made = list(device.compared(tensors, piece, lambda size: (0, torch.empty(size, dtype=torch.uint8))))
    passes = -(-800 // (device.PIECES_AT_ONCE * piece // 700))
    assert begun == passes == len(waited) == len(made) and waited[0] == 5
    assert sum(len(found.names) for found in made) == 800
    assert asked.waits == []


def test_what_goes_to_the_host_whole_does_not_go_all_at_once() -> None:
    piece = 256
    base, new = versions(3, 60 * piece, 2, 0.9, False)
    new[5 * piece : 9 * piece] = base[5 * piece : 9 * piece]
    new[5 * piece + 7] ^= 1  # sparse among dense ones, and three that did not change
    sizes: list[int] = []

    def block(size: int) -> tuple[int, torch.Tensor]:
        sizes.append(size)
        return 0, torch.empty(size, dtype=torch.uint8)

    assert len(list(device.compared([("w", signed(base), signed(new))], piece, block))) == 4
    assert max(sizes) <= 16 * 2 * 2 * piece + 64 and sum(sizes) >= 56 * 2 * 2 * piece
    assert by_torch(base, new, piece) == by_numpy(base, new, piece)


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


def test_copies_lie_behind_one_another_by_dtype() -> None:
    draw = torch.Generator().manual_seed(0)
    sources = {name: torch.randn(shape, generator=draw) for name, shape in (("a", (3, 4)), ("b", (5,)), ("c", (2, 2)))}
    dtypes = {"a": torch.bfloat16, "b": torch.float32, "c": torch.bfloat16}
    found = copies(sources, dtypes)
    assert list(found) == ["a", "b", "c"]
    for name, source in sources.items():
        assert found[name].dtype == dtypes[name] and torch.equal(found[name], source.to(dtypes[name]))
        assert found[name].is_contiguous() and found[name].data_ptr() != source.data_ptr()
    assert found["c"].data_ptr() == found["a"].data_ptr() + found["a"].nbytes
    sources["a"].zero_()
    assert found["a"].any(), "training goes on"


def test_a_gpu_s_delta_is_the_file_that_a_cpu_writes(tmp_path: Path) -> None:
    """Payload, pieces and checksums, of tensors that begin in the middle of theirs."""
    model = pairs(a_model(3, payload.PIECE >> 10), flat=True)
    floats = {torch.int16: torch.bfloat16, torch.int32: torch.float32}
    base, new = (
        {n: payload.Local(str(floats[t.dtype])[6:], (9999,), 7, t.view(floats[t.dtype])) for n, t in side}
        for side in ([(n, old) for n, old, _ in model], [(n, now) for n, _, now in model])
    )
    lanes = dict.fromkeys(new, "00" * 16)
    for name in ("cpu", "gpu"):
        (tmp_path / name).mkdir()
    wanted = payload.write_delta(tmp_path / "cpu", 3, new, base, lanes, 1)
    found = payload.write_delta(tmp_path / "gpu", 3, {}, {}, {}, 1)
    found.tensors = {n: replace(t, pieces=[]) for n, t in wanted.tensors.items()}
    with contextlib.closing(encoder.EncoderProcess(2)) as process:
        payload.by_gpu(found, tmp_path / "gpu" / "delta-00003.bin", new, base, 1, process)
    assert (found.tensors, found.files) == (wanted.tensors, wanted.files) and wanted.files
    one, two = ((tmp_path / name / "delta-00003.bin").read_bytes() for name in ("cpu", "gpu"))
    assert one == two
