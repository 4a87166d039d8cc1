"""A full version waits beside the engine until its pause, which copies it: memory, chunks, fall-backs, damage."""

from __future__ import annotations

import importlib
import json
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from staged_tools import FusedModel, chain, delta, restage, stage, wait_for
from torch import nn
from transfer_tools import copies, same

from astracli.engines import loader as engine_loader
from astracli.weights.receive import apply, reading, staging
from astracli.weights.receive.staging import Held, Staging, Where

CPU = torch.device("cpu")
FULL = "v{:06d}/manifest.full.json"


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(staging, "CHUNK", 4096)


def versions_of(count: int) -> list[list[np.ndarray[Any, Any]]]:
    """Bits of tensors that end inside a chunk, at its end, behind it; of one that spans three, and of none."""
    draw = np.random.default_rng(0)
    sizes = [(700, "<u2"), (1, "<u2"), (6144, "<u2"), (0, "<u2"), (2048, "<u4"), (128, "<u2"), (3, "<u4")]
    return [[draw.integers(0, 1 << 16, n).astype(dtype) for n, dtype in sizes] for _ in range(count)]


def views_for(bits: list[np.ndarray[Any, Any]]) -> list[torch.Tensor]:
    return [torch.zeros(len(b), dtype=torch.int16 if b.itemsize == 2 else torch.int32) for b in bits]


def applied(memory: Staging, held: Held) -> None:
    with memory.applied():
        held.copy()


@pytest.mark.parametrize("where", ["gpu", "host"])
def test_bits_wait_in_one_memory_for_every_version(where: Where) -> None:
    memory, places = Staging(where, CPU, kept=True), set()
    for bits in versions_of(3):
        views, wanted = views_for(bits), [b.copy() for b in bits]
        held = memory.hold(list(zip(views, bits, strict=True)))
        assert held is not None and held.where == where and held.valid
        assert len(held.pairs) > len(bits), "cut where chunks end"
        starts = [source.data_ptr() - memory.memory.data_ptr() for _, source in held.pairs]  # type: ignore[union-attr]
        assert all(start % 256 == 0 for start in starts), "aligned for a GPU"
        assert all(n % 4096 + s.nbytes <= 4096 for n, (_, s) in zip(starts, held.pairs, strict=True))
        for b in bits:
            b[:] = 0  # its file is not read again
        assert not any(view.any() for view in views), "nothing changes before the pause"
        applied(memory, held)
        assert all(np.array_equal(v.numpy().view(w.dtype), w) for v, w in zip(views, wanted, strict=True))
        assert not held.valid, "what was applied waits no more"
        places.add(memory.memory.data_ptr())  # type: ignore[union-attr]
    assert len(places) == 1


def test_a_version_that_another_one_has_replaced_cannot_be_copied() -> None:
    memory = Staging("host", CPU, kept=True)
    one, two = versions_of(2)
    first = memory.hold(list(zip(views_for(one), one, strict=True)))
    second = memory.hold(list(zip(views_for(two), two, strict=True)))
    assert first is not None and second is not None and not first.valid and second.valid
    with pytest.raises(AssertionError, match="holds other bits by now"):
        first.copy()


@pytest.mark.parametrize("where", ["gpu", "host"])
def test_memory_that_is_not_kept_is_given_back_behind_the_pause(where: Where) -> None:
    memory = Staging(where, CPU, kept=False)
    for bits in versions_of(2):
        held = memory.hold(list(zip(views_for(bits), bits, strict=True)))
        assert held is not None and memory.memory is not None
        applied(memory, held)
        deadline = time.monotonic() + 60
        while memory.memory is not None and time.monotonic() < deadline:
            time.sleep(0.005)
        assert memory.memory is None and not held.pairs


def test_a_process_that_needs_the_gpu_gets_it_and_the_next_version_is_staged_again() -> None:
    memory = Staging("gpu", CPU, kept=True)
    for bits in versions_of(2):
        held = memory.hold(list(zip(views_for(bits), bits, strict=True)))
        assert held is not None
        memory.leave_gpu()
        assert memory.memory is None and not held.valid
    host = Staging("host", CPU, kept=True)
    held = host.hold(list(zip(views_for(bits), bits, strict=True)))
    host.leave_gpu()
    assert host.memory is not None and held is not None and held.valid, "host memory is not the GPU's"


def test_without_room_the_next_best_place_serves_from_then_on(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (bits,) = versions_of(1)
    jobs = list(zip(views_for(bits), bits, strict=True))
    full = {"gpu"}
    original = Staging.room

    def room(self: Staging, where: Where, size: int) -> torch.Tensor:
        if where in full:
            raise torch.OutOfMemoryError(f"no room on the {where}")
        return original(self, where, size)

    monkeypatch.setattr(Staging, "room", room)
    memory = Staging("gpu", CPU, kept=True)
    for _ in range(2):
        held = memory.hold(jobs)
        assert held is not None and held.where == "host"
    said = capsys.readouterr().err
    assert said.count("wait for their pause in pinned host memory: no room on the gpu") == said.count("warning") == 1
    full.add("host")
    assert memory.hold(jobs) is None and memory.hold(jobs) is None
    assert capsys.readouterr().err.count("copied from their files in the pause") == 1
    monkeypatch.setattr(Staging, "room", original)
    monkeypatch.setattr(staging, "available", lambda: staging.SPARE_BYTES + 100)
    assert Staging("host", CPU, kept=True).hold(jobs) is None
    assert "the host has 1.1 GB free, the version takes 0.0 GB" in capsys.readouterr().err


# ---- inside an engine ------------------------------------------------------------------------------------------------


@pytest.fixture
def engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FusedModel]:
    """Random weights, as of a server that waits for version 0; our loader has been called once."""
    monkeypatch.setenv("ASTRA_STAGE_DIR", str(tmp_path / "stage"))
    monkeypatch.setenv("ASTRA_START_VERSION", "")
    monkeypatch.setenv("ASTRA_VERIFY_INTERVAL", "1")
    monkeypatch.setenv("ASTRA_STAGING", "gpu")
    monkeypatch.setenv("ASTRA_STAGING_KEPT", "1")
    model = FusedModel()
    yield model
    known = engine_loader.loaded_models[model]
    known.settle()
    known.watcher.close()
    known.decoder.close()


def staged_ahead(model: FusedModel, version: int) -> apply.Prepared:
    """What the engine's thread has brought to its place."""
    watching, deadline = engine_loader.loaded_models[model].watcher, time.monotonic() + 60
    while time.monotonic() < deadline:
        found = watching.prepared
        if found is not None and found.version == version:
            return found
        time.sleep(0.005)
    raise AssertionError("nothing was staged")


def called(model: FusedModel, where: Path) -> dict[str, Any]:
    engine_loader.apply_staged(model)
    engine_loader.loaded_models[model].settle()  # the read-back still writes to the stage
    return dict(json.loads((where / "result.json").read_text()))


def test_full_versions_are_staged_beside_the_engine_and_read_back_like_deltas(
    tmp_path: Path, engine: FusedModel
) -> None:
    versions = chain(4)
    where = stage(tmp_path, versions, [FULL.format(0)], transfer="full", full_interval=1)
    first = called(engine, where)  # the thread begins with this call
    assert first["ok"] and first["staging"] in ("file", "gpu") and same(engine.hf(), versions[0])
    memory = engine_loader.loaded_models[engine].staging
    for version in (1, 2):
        restage(tmp_path, [FULL.format(version)])
        prepared = staged_ahead(engine, version)
        assert same(engine.hf(), versions[version - 1]), "nothing changes before the pause"
        shutil.rmtree(where / f"v{version:06d}")
        place = memory.memory.data_ptr()  # type: ignore[union-attr]
        assert all(not step.copies for step in prepared.loaded) and prepared.flat == []
        result = called(engine, where)
        assert result["ok"] and result["staging"] == "gpu" and result["kind"] == "full", result
        assert result["load_s"] > 0 and result["changed"] == sum(t.numel() for t in versions[0].values())
        assert same(engine.hf(), versions[version])
        readback = json.loads(wait_for(where / "readback.json"))
        assert readback["ok"] and readback["version"] == version
    restage(tmp_path, [FULL.format(3)])
    staged_ahead(engine, 3)
    assert memory.memory is not None and memory.memory.data_ptr() == place, "the same memory for every version"


def test_bits_that_rot_while_they_wait_are_found_in_the_pause_and_another_full_version_mends_it(
    tmp_path: Path, engine: FusedModel
) -> None:
    versions = chain(2)
    where = stage(tmp_path, versions, [FULL.format(0)], transfer="full")
    assert called(engine, where)["ok"]
    restage(tmp_path, [FULL.format(1)])
    staged_ahead(engine, 1)
    memory = engine_loader.loaded_models[engine].staging.memory
    assert memory is not None
    memory[1] ^= 1
    wrong = called(engine, where)
    assert not wrong["ok"] and "1 of 9 tensors have the wrong digest: model.embed_tokens.weight" in wrong["message"]
    assert engine_loader.loaded_models[engine].version is None
    restage(tmp_path, [FULL.format(1)])
    staged_ahead(engine, 1)
    mended = called(engine, where)
    assert mended["ok"] and mended["staging"] == "gpu" and same(engine.hf(), versions[1])


def test_a_full_version_and_the_deltas_behind_it_are_staged_together(tmp_path: Path, engine: FusedModel) -> None:
    versions = chain(3)
    where = stage(tmp_path, versions, [FULL.format(0)])
    assert called(engine, where)["ok"]
    restage(tmp_path, [FULL.format(0), delta(1), delta(2)])
    prepared = staged_ahead(engine, 2)
    assert [step.held is not None for step in prepared.loaded] == [True, False, False]
    result = called(engine, where)
    assert result["ok"] and result["staging"] == "gpu" and same(engine.hf(), versions[2])


def test_what_waits_for_a_parameter_that_has_moved_or_left_its_gpu_is_read_again(
    tmp_path: Path, engine: FusedModel
) -> None:
    versions = chain(4)
    where = stage(tmp_path, versions, [FULL.format(0)], transfer="full")
    assert called(engine, where)["ok"]
    restage(tmp_path, [FULL.format(1)])
    staged_ahead(engine, 1)
    before = engine.qkv
    kept = before.detach().clone()
    engine.qkv = nn.Parameter(before.data.clone())
    moved = called(engine, where)
    assert moved["ok"] and moved["staging"] == "file" and same(engine.hf(), versions[1])
    assert torch.equal(before, kept), "freed memory, in a real engine"
    restage(tmp_path, [FULL.format(2)])
    prepared = staged_ahead(engine, 2)
    engine_loader.settle(engine)  # its GPU goes to a trainer
    known = engine_loader.loaded_models[engine]
    assert known.staging.memory is None and known.watcher.prepared is None
    assert not known.place(prepared.manifests[-1].tensors).fits(prepared)
    again = called(engine, where)
    assert again["ok"] and again["staging"] == "file" and same(engine.hf(), versions[2])
    restage(tmp_path, [FULL.format(3)])
    staged_ahead(engine, 3)
    assert called(engine, where)["staging"] == "gpu" and same(engine.hf(), versions[3])


def test_a_bench_moves_the_memory_between_versions(
    tmp_path: Path, engine: FusedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parent.parent / "bench"))
    loaders = importlib.import_module("weights.staging_loader")
    versions = chain(4)
    where = stage(tmp_path, versions, [FULL.format(0)], transfer="full")
    assert called(engine, where)["ok"]
    for version, place in enumerate(("host", "file", "gpu"), 1):
        getattr(loaders, place)(engine)
        restage(tmp_path, [FULL.format(version)])
        staged_ahead(engine, version)
        found = called(engine, where)
        assert found["ok"] and found["staging"] == place and same(engine.hf(), versions[version])


def test_the_embedded_engine_reads_no_file_in_its_pause(tmp_path: Path) -> None:
    versions = chain(2)
    where = stage(tmp_path, versions, [FULL.format(1)], transfer="full")
    prepared = apply.prepare(where)
    reading.hold(prepared)
    for file in where.glob("v*/full-*.safetensors"):
        file.write_bytes(bytes(file.stat().st_size))  # what was mapped is overwritten
    weights = copies(versions[0])
    assert apply.apply(where, weights, 0, prepared).load_s > 0
    assert same(weights, versions[1])
