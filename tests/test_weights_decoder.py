"""Decoding in a child process: the same changes, the same errors, and no child left behind."""

from __future__ import annotations

import contextlib
import gc
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from children import children, kill
from staged_tools import Weights, chain, delta, restage, stage
from transfer_tools import copies, same

from astracli.process import channel
from astracli.weights import WeightCorrupt, WeightMismatch
from astracli.weights.format import flat
from astracli.weights.format.codec import DecodedPiece
from astracli.weights.receive import apply, decoder, reading
from astracli.weights.receive.decoder import DecoderProcess
from astracli.weights.receive.placement import EngineSlice
from astracli.weights.receive.resident import Resident


@pytest.fixture(scope="module")
def child() -> Iterator[DecoderProcess]:
    with contextlib.closing(DecoderProcess()) as found:
        yield found


def hands_of(engine: Weights, cut: int = 0) -> Resident:
    """Each tensor in one place, or cut in two."""
    placed = {}
    for name, tensor in engine.items():
        view = tensor.view(-1)
        at = min(cut, len(view) - 1) if cut else 0
        placed[name] = [EngineSlice(view[:at], 0), EngineSlice(view[at:], at)] if at else [EngineSlice(view, 0)]
    return Resident(placed)


@pytest.mark.parametrize("cut", [0, 5, 333])
def test_a_chain_a_full_version_and_views_in_pieces(tmp_path: Path, child: DecoderProcess, cut: int) -> None:
    versions = chain(4)
    where = stage(tmp_path, versions, [delta(1), delta(2)])
    engine = copies(versions[0])
    prepared, direct = child.prepare(where), apply.prepare(where)
    assert prepared.plan == direct.plan and prepared.bytes == direct.bytes > 0
    assert [m.changed for m in prepared.manifests] == [m.changed for m in direct.manifests]
    hands = hands_of(engine, cut)
    result = apply.apply(where, hands.placed, 0, prepared, hands)
    assert same(engine, versions[2]) and result.steps == 2 and result.decode_s > 0
    restage(tmp_path, ["v000000/manifest.full.json", delta(1)])
    apply.apply(where, hands.placed, None, child.prepare(where), hands)
    assert same(engine, versions[1])


def test_what_was_decoded_before_stays_when_the_next_one_is(tmp_path: Path, child: DecoderProcess) -> None:
    versions = chain(3)
    where = stage(tmp_path, versions, [delta(2)])
    later = child.prepare(where)
    restage(tmp_path, [delta(1)])
    engine = copies(versions[0])
    hands = hands_of(engine)
    first = child.prepare(where)
    apply.apply(where, hands.placed, 0, first, hands)
    restage(tmp_path, [delta(2)])
    apply.apply(where, hands.placed, 1, later, hands)
    assert same(engine, versions[2])


def test_damage_is_named_and_a_wrong_base_is_still_refused(tmp_path: Path, child: DecoderProcess) -> None:
    versions = chain(3)
    where = stage(tmp_path, versions, [delta(2)])
    engine = copies(versions[0])
    hands = hands_of(engine)
    with pytest.raises(WeightMismatch, match="changes version 1, the engine holds 0"):
        apply.apply(where, hands.placed, 0, child.prepare(where), hands)
    path = where / "v000002" / "delta-00000.bin"
    blob = path.read_bytes()
    path.write_bytes(blob[:50] + bytes([blob[50] ^ 1]) + blob[51:])
    with pytest.raises(WeightCorrupt, match=r"staged `delta-00000\.bin` of version 2 fails its checksum"):
        child.prepare(where)
    (where / "next.json").unlink()
    with pytest.raises(WeightCorrupt, match=r"cannot read staged `next\.json`"):
        child.prepare(where)
    assert same(engine, versions[0])


def test_a_payload_that_cannot_be_decoded_leaves_no_memory_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(coded: reading.CheckedPiece) -> DecodedPiece:
        raise WeightCorrupt(f"`{coded.tensor.name}` is no zstd")

    def decoded() -> list[str]:
        links = []
        for path in Path("/proc/self/fd").iterdir():
            with contextlib.suppress(OSError):
                links.append(os.readlink(path))
        return [link for link in links if "astra-decoded" in link]

    where, held = stage(tmp_path, chain(2), [delta(1)]), decoded()
    monkeypatch.setattr(reading, "decode", refuse)
    ours, theirs = socket.socketpair()
    gc.disable()  # a cycle would keep as much memory as a version takes
    try:
        thread = threading.Thread(target=decoder.serve, args=(theirs, 1))
        thread.start()
        for _ in range(3):
            channel.send(ours, {"stage": str(where)})
            assert "is no zstd" in channel.receive(ours)[0]["error"]
        ours.close()
        thread.join()
        assert decoded() == held
    finally:
        gc.enable()
        theirs.close()


def answered(where: Path, processes: int) -> tuple[dict[str, Any], bytes]:
    """What the child says to one plan, and the memory that it sends."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        channel.send(ours, {"stage": str(where)})
        ours.shutdown(socket.SHUT_WR)
        decoder.serve(theirs, processes)
        doc, handle = channel.receive(ours)
    if handle is None:
        return doc, b""
    with open(handle, "rb") as file:
        return doc, file.read()


def test_forked_processes_decode_the_same_and_say_what_was_wrong(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decoder, "LEAST_BYTES", 1)
    where, ours = stage(tmp_path, chain(3), [delta(1), delta(2)]), os.getpid()
    children = psutil.Process().children()
    alone, shared = answered(where, 1), answered(where, 3)
    assert alone == shared and len(shared[1]) > 1000 and any(shared[1])
    decode, pieces = reading.decode, [coded for step in reading.open_plan(where)[1] for coded in step]

    def wrong(coded: reading.CheckedPiece) -> DecodedPiece:
        if coded.tensor.name == pieces[-1].tensor.name:
            if os.getpid() == ours:
                pytest.fail("decoded in this process")
            if killed:
                os.kill(os.getpid(), signal.SIGKILL)
            raise WeightCorrupt(f"`{coded.tensor.name}` is no zstd")
        return decode(coded)

    monkeypatch.setattr(reading, "decode", wrong)
    killed = False
    assert answered(where, 3) == ({"error": f"`{pieces[-1].tensor.name}` is no zstd"}, b"")
    killed = True
    assert answered(where, 3) == ({"unable": "a process that decoded ended with -9"}, b"")
    monkeypatch.setattr(reading, "decode", decode)
    assert answered(where, 3) == alone
    assert psutil.Process().children() == children


def test_a_child_that_died_is_replaced(tmp_path: Path) -> None:
    where = stage(tmp_path, chain(2), [delta(1)])
    with contextlib.closing(DecoderProcess()) as decoder:
        before = children()
        decoder.start()
        (child,) = children() - before
        kill(child)
        assert decoder.prepare(where).version == 1


def test_without_a_child_the_engine_decodes_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    versions = chain(2)
    where = stage(tmp_path, versions, [delta(1)])
    monkeypatch.setattr(sys, "executable", str(tmp_path / "nothing"))
    with contextlib.closing(DecoderProcess()) as decoder:
        prepared = decoder.prepare(where)
    assert "decoded inside the engine" in capsys.readouterr().err
    engine = copies(versions[0])
    apply.apply(where, engine, 0, prepared)
    assert same(engine, versions[1])


def test_the_child_ends_with_its_engine(tmp_path: Path) -> None:
    code = (
        "import os, signal; from astracli.weights.receive.decoder import DecoderProcess;"
        "d = DecoderProcess(); d.start();"
        "print(d._process.pid, flush=True); os.kill(os.getpid(), signal.SIGKILL)"
    )
    done = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, timeout=120, check=False)
    child, deadline = Path("/proc") / done.stdout.decode().strip(), time.monotonic() + 60

    def alive() -> bool:
        with contextlib.suppress(OSError):
            return (child / "stat").read_text().rpartition(")")[2].split()[0] != "Z"
        return False

    while alive() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not alive()


def test_an_engine_that_dies_while_its_child_decodes_keeps_its_last_lines(tmp_path: Path) -> None:
    where = stage(tmp_path, chain(2), [delta(1)])
    ours, theirs = socket.socketpair()
    channel.send(ours, {"stage": str(where)})
    ours.close()
    with theirs:
        decoder.serve(theirs, 1)


def test_pieces_become_few_spans_that_no_index_leaves() -> None:
    reach = flat.REACH
    pieces = [
        ("a", 2, 0, 10, "gap-ulp", 3), ("a", 2, 20, 10, "gap-ulp", 2), ("a", 2, 30, 4, "dense-ulp", 1),
        ("a", 2, 34, 4, "dense-ulp", 4), ("a", 2, 40, 4, "dense-ulp", 4), ("b", 4, 0, 9, "gap-xor", 1),
        ("b", 4, reach, 9, "gap-xor", 2),
    ]  # fmt: skip
    groups, places = flat.lay_out(pieces)
    assert groups[2].spans == [("a", 0, 30, 0, 0, 5, 0), ("a", 30, 8, 0, 5, 8, -1), ("a", 40, 4, 0, 13, 4, -1)]
    assert groups[4].spans == [("b", 0, 9, 1, 0, 1, 0), ("b", reach, 9, 1, 1, 2, 1)]
    assert [p.shift for p in places] == [0, 20, 0, 4, 0, 0, 0]
    assert flat.flatten([("a", 0, DecodedPiece("raw", 2, None, torch.zeros(2).numpy().view("<u4")))]).groups == []
