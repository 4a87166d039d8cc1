"""Publisher -> real files: what lies on disk, retention, restarts, the background, several ranks."""

from __future__ import annotations

import errno
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transfer_tools import (
    Server,
    Weights,
    chain,
    copies,
    first_weights,
    publish,
    same,
    same_files,
    server,
    step,
    subscriber,
)

from astracli.errors import RunFailed
from astracli.process.atomic import write_atomic
from astracli.weights.device import host
from astracli.weights.format.digest import digest_tensor, to_hex
from astracli.weights.format.manifest import Manifest, read_stable, seal, version_name, versions_in
from astracli.weights.publish import payload, snapshot
from astracli.weights.publish.committer import Committer
from astracli.weights.publish.publisher import Publisher, PublishResult
from astracli.weights.publish.snapshot import Shard
from astracli.weights.receive import apply

__all__ = ["server"]


# ---- publishing -----------------------------------------------------------------------------------------------------


def test_what_a_publisher_leaves_on_disk(tmp_path: Path) -> None:
    versions = chain(5)
    results = publish(tmp_path, versions, full_interval=4)
    assert versions_in(tmp_path) == [0, 1, 2, 3, 4]
    names = {v: sorted(p.name for p in (tmp_path / version_name(v)).iterdir()) for v in range(5)}
    assert names[0] == ["STABLE", "full-00000.safetensors", "manifest.full.json"]
    assert names[1] == ["STABLE", "delta-00000.bin", "manifest.json"]
    assert names[4] == sorted({*names[0], *names[1]})
    elements = sum(t.numel() for t in versions[0].values())
    full_bytes = sum(t.numel() * t.element_size() for t in versions[0].values())
    changed = sum(int((a != b).sum()) for a, b in zip(versions[0].values(), versions[1].values(), strict=True))
    assert results[1].changed == changed and results[1].elements == elements
    assert results[1].density == changed / elements and not results[1].full_written
    assert 0 < results[1].bytes_delta == results[1].bytes < results[1].bytes_full == full_bytes
    assert results[0].density == 1.0 and results[0].bytes_delta == 0
    manifest = Manifest.from_bytes((tmp_path / "v000001" / "manifest.json").read_bytes())
    assert (manifest.model, manifest.base_version) == ("tiny", 0)
    entry = {t.name: t for t in manifest.tensors}
    assert entry["model.norm.weight"].encoding == "none" and entry["model.norm.weight"].pieces == ()
    assert entry["model.layers.0.linear_attn.A_log"].dtype == "float32"
    for name, tensor in versions[1].items():
        assert entry[name].digest == to_hex(digest_tensor(tensor))


def test_threads_write_the_same_full_version(tmp_path: Path) -> None:
    weights = {"a": torch.randn(3000, 3000).bfloat16(), "b": torch.randn(7), "c": torch.zeros(0, 4), **first_weights()}
    for name, threads in (("one", 1), ("three", 3)):
        publish(tmp_path / name, [weights], threads=threads)
    files = [{p.name: p.read_bytes() for p in (tmp_path / n / "v000000").glob("*full*")} for n in ("one", "three")]
    assert files[0] == files[1] and len(files[0]) == 2


def test_a_full_version_loads_as_safetensors_under_hf_names(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    versions = chain(2)
    publish(tmp_path, versions, transfer="full")
    assert same(load_file(tmp_path / "v000001" / "full-00000.safetensors"), versions[1])
    assert not (tmp_path / "v000001" / "manifest.json").exists()


def test_the_publisher_keeps_its_own_copy(tmp_path: Path) -> None:
    """Training writes to the same tensors in place; the diff is against what was published."""
    weights, publisher = first_weights(), Publisher(tmp_path)
    publisher.publish(0, weights)
    weights["model.norm.weight"][3] = 2.0
    assert publisher.publish(1, weights).changed == 1
    assert publisher.publish(2, weights).changed == 0
    publisher.close()


def test_what_gives_its_device_up_publishes_the_tensors_themselves(tmp_path: Path) -> None:
    """The same memory waits for every version; the files are those of a publisher that copies."""
    plain, leaving = Publisher(tmp_path / "plain"), Publisher(tmp_path / "leaving", leaves=True)
    weights = first_weights()
    live, waits = copies(weights), set()
    for version in range(4):
        plain.publish(version, weights)
        leaving.publish(version, live, owned=True)
        waits.add(tuple(t.flat.data_ptr() for t in leaving.base.values()))
        weights = step(weights, version)
        for name, tensor in live.items():
            tensor.copy_(weights[name])  # trained
    assert len(waits) == 1
    with pytest.raises(ValueError, match="not published in the background"):
        leaving.publish_async(4, live)
    plain.close()
    leaving.close()
    assert same_files(tmp_path / "plain", tmp_path / "leaving", "delta-0*") == 3
    assert same_files(tmp_path / "plain", tmp_path / "leaving") > 3


def test_behind_a_host_copy_that_failed_half_way_comes_a_full_version(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    publisher, live = Publisher(tmp_path, leaves=True), copies(first_weights())
    publisher.publish(0, live, owned=True)
    copy, done = torch.Tensor.copy_, list[int]()

    def breaks(self: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        done.append(1)
        if len(done) == 2:
            raise RuntimeError("the GPU fell off")
        return copy(self, *args, **kwargs)

    for tensor in live.values():
        tensor.add_(1)
    with monkeypatch.context() as broken, pytest.raises(RuntimeError, match="fell off"):
        broken.setattr(torch.Tensor, "copy_", breaks)
        publisher.publish(1, live, owned=True)
    found = publisher.publish(2, live, owned=True)
    assert found.full_written and not found.bytes_delta
    assert not publisher.publish(3, live, owned=True).changed
    publisher.close()


def test_retention_keeps_the_newest_what_leads_there_and_what_is_pinned(tmp_path: Path) -> None:
    pinned: set[int] = set()
    publisher = Publisher(tmp_path, full_interval=5, keep=2, pinned=pinned.__contains__)
    for version, weights in enumerate(chain(14)):
        publisher.publish(version, weights)
        if version == 6:
            pinned.add(6)
    assert versions_in(tmp_path) == [5, 6, 10, 11, 12, 13]
    pinned.clear()
    publisher.publish(14, first_weights(3))
    publisher.publish(15, first_weights(4))
    assert versions_in(tmp_path) == [14, 15]
    publisher.close()


def test_background_publishing_takes_a_snapshot_and_says_how_long_the_next_one_waited(tmp_path: Path) -> None:
    versions, publisher = chain(3), Publisher(tmp_path)
    weights, seen, gate = copies(versions[0]), [], threading.Event()

    def slow(result: PublishResult) -> None:
        seen.append(result.version)
        gate.wait(60)

    assert publisher.publish_async(0, weights, slow) < 0.05
    for name, tensor in weights.items():
        tensor.copy_(versions[1][name])
    threading.Timer(0.3, gate.set).start()
    waited = publisher.publish_async(1, weights)
    assert waited > 0.2
    result = publisher.wait()
    assert result is not None and result.version == 1 and result.waited_s == waited and seen == [0]
    manifest = Manifest.from_bytes((tmp_path / "v000000" / "manifest.full.json").read_bytes())
    assert {t.name: t.digest for t in manifest.tensors} == {n: to_hex(digest_tensor(t)) for n, t in versions[0].items()}
    assert publisher.wait() is None
    publisher.publish_async(1, weights)
    with pytest.raises(RunFailed, match="version 1 is published already"):
        publisher.wait()
    publisher.close()


def test_other_tensors_than_before_are_refused(tmp_path: Path) -> None:
    publisher = Publisher(tmp_path)
    publisher.publish(0, first_weights())
    fewer = first_weights()
    del fewer["model.norm.weight"]
    with pytest.raises(RunFailed, match=r"other tensors than 0: model\.norm\.weight"):
        publisher.publish(1, fewer)
    with pytest.raises(RunFailed, match="float64 do not travel"):
        publisher.publish(1, {"a": torch.zeros(3, dtype=torch.float64)})
    assert versions_in(tmp_path) == [0]
    publisher.close()


def test_a_version_cut_short_does_not_exist(tmp_path: Path) -> None:
    versions = chain(3)
    publish(tmp_path, versions[:2])
    (tmp_path / "v000002").mkdir()
    (tmp_path / "v000002" / "delta-00000.bin.tmp1").write_bytes(b"half")
    (tmp_path / "v000002" / "manifest.json").write_bytes(b"{}")
    assert versions_in(tmp_path) == [0, 1]
    publisher = Publisher(tmp_path)
    publisher.restart(1, versions[1])
    assert not (tmp_path / "v000002").exists()
    publisher.publish(2, versions[2])
    assert "delta-00000.bin.tmp1" not in [p.name for p in (tmp_path / "v000002").iterdir()]
    assert versions_in(tmp_path) == [0, 1, 2]
    publisher.close()


def test_restart_forgets_later_versions_and_publishes_in_full(tmp_path: Path, server: Server) -> None:
    versions = chain(6)
    publish(tmp_path / "weights", versions, full_interval=100)
    receiver = subscriber(server, tmp_path)
    receiver.fetch(4, 3)
    again = Publisher(tmp_path / "weights", session="second", full_interval=100)
    again.restart(3, versions[3])
    assert versions_in(tmp_path / "weights") == [0, 1, 2, 3]
    assert set(read_stable(tmp_path / "weights", 3)["manifests"]) == {"full"}
    other = step(versions[3], 77)
    again.publish(4, other)
    plan = receiver.fetch(4, 3)  # version 4 of the first attempt is still staged, and must not be taken for this one
    engine = copies(versions[3])
    assert plan.kind == "delta" and apply.apply(tmp_path / "stage", engine, 3).version == 4
    assert same(engine, other)
    again.close()
    receiver.close()


def test_frozen_and_tied_tensors_stand_in_every_manifest(tmp_path: Path) -> None:
    versions = chain(3)
    frozen = {"visual.patch.weight": torch.randn(5, 5).bfloat16()}
    tied = {"lm_head.weight": "model.embed_tokens.weight"}
    publish(tmp_path, versions, frozen=frozen, tied=tied)
    for v, name in ((0, "manifest.full.json"), (2, "manifest.json")):
        manifest = Manifest.from_bytes((tmp_path / version_name(v) / name).read_bytes())
        assert manifest.frozen_digests == {
            "visual.patch.weight": to_hex(digest_tensor(frozen["visual.patch.weight"])),
            "lm_head.weight": to_hex(digest_tensor(versions[v]["model.embed_tokens.weight"])),
        }


# ---- several ranks --------------------------------------------------------------------------------------------------


def shards(weights: Weights, rank: int, world: int) -> dict[str, Any]:
    """Uneven dim-0 shards; the last tensor is whole on rank 0 alone."""
    found: dict[str, Any] = {}
    for name, tensor in weights.items():
        if "norm" in name:
            if rank == 0:
                found[name] = tensor
            continue
        rows = -(-len(tensor) // world)
        part = tensor[rank * rows : (rank + 1) * rows]
        found[name] = Shard(part.reshape(-1), min(rank * rows, len(tensor)) * tensor[0].numel(), tuple(tensor.shape))
    return found


@pytest.mark.parametrize("world", [2, 3])
def test_ranks_write_pieces_and_the_manifest_is_that_of_the_whole(tmp_path: Path, server: Server, world: int) -> None:
    versions = chain(4)
    errors: list[BaseException] = []

    def run(rank: int) -> None:
        try:
            publisher = Publisher(
                tmp_path / "weights", rank=rank, world_size=world, session="a", full_interval=3, rank_timeout_s=20
            )
            for version, weights in enumerate(versions):
                result = publisher.publish(version, shards(weights, rank, world))
                assert result.elements == sum(t.numel() for t in weights.values())
            publisher.close()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(world)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not errors
    publish(tmp_path / "single", versions, full_interval=3)
    for v in range(4):
        for name in ("manifest.json", "manifest.full.json"):
            paths = [tmp_path / d / version_name(v) / name for d in ("weights", "single")]
            assert paths[0].exists() == paths[1].exists()
            if paths[0].exists():
                many, one = (Manifest.from_bytes(p.read_bytes()) for p in paths)
                pairs = ({t.name: (t.digest, t.count, t.shape) for t in m.tensors} for m in (many, one))
                assert next(pairs) == next(pairs)
    assert sorted(p.name for p in (tmp_path / "weights" / "v000001").iterdir()) == [
        "STABLE", *(f"delta-{rank:05d}.bin" for rank in range(world)), "manifest.json",
    ]  # fmt: skip
    receiver = subscriber(server, tmp_path)
    engine = copies(versions[0])
    assert receiver.fetch(2, 0).kind == "delta"
    apply.apply(tmp_path / "stage", engine, 0)
    assert same(engine, versions[2])
    empty = {name: torch.zeros_like(t) for name, t in versions[0].items()}
    assert receiver.fetch(3, None).kind == "full"
    apply.apply(tmp_path / "stage", empty, None)
    assert same(empty, versions[3])
    receiver.close()


def test_a_full_disk_ends_a_version_only_when_no_thread_writes_any_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held: list[int] = []

    def chunks(flat: torch.Tensor) -> Iterator[tuple[Any, Any]]:
        for bits, _ in host.chunks_of(flat):
            held.append(1)
            yield bits, held.pop

    def full(handle: int, view: memoryview, at: int) -> int:
        time.sleep(0.02 if at else 0.0)
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(payload, "chunks_of", chunks)
    monkeypatch.setattr(payload.os, "pwrite", full)
    publisher = Publisher(tmp_path, threads=2)
    with pytest.raises(OSError, match="No space left"):
        publisher.publish(0, first_weights())
    assert held == []  # on a GPU: a buffer that the next version would wait for, for ever
    assert [p.name for p in (tmp_path / "v000000").iterdir()] == []
    publisher.close()


def test_ranks_that_do_not_cover_a_tensor_or_never_come_are_named(tmp_path: Path) -> None:
    tensor = torch.zeros(4, 2).bfloat16()
    publisher = Publisher(tmp_path / "a")
    with pytest.raises(RunFailed, match="hold 2 elements of `w`, whose shape is"):
        publisher.publish(0, {"w": Shard(tensor.view(-1)[:2], 0, (4, 2))})
    publisher.close()
    alone = Publisher(tmp_path / "b", world_size=2, session="s", rank_timeout_s=0.1)
    (tmp_path / "b" / "v000000").mkdir()
    with pytest.raises(RunFailed, match=r"rank-00001\.json"):
        alone.publish(0, {"w": tensor})
    alone.close()
    assert versions_in(tmp_path / "b") == []


def test_a_left_over_that_vanishes_while_a_rank_looks_at_it_is_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    second = Committer("", 1, 2, "s", 5, payload.Part("full"), {})
    path = tmp_path / "STABLE"
    doc = {"session": "s", "version": 3}
    threading.Timer(0.1, lambda: write_atomic(path, seal(doc))).start()
    monkeypatch.setattr(Path, "exists", lambda self: True)  # as it was a moment ago
    assert second.wait_for(path, 3) == doc


# ---- on a GPU, which is made up --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("free", "reserved", "fullest", "stays"),
    [(1.0, 10.0, 7.9, True), (1.0, 10.0, 8.0, False), (4.0, 2.0, 2.0, True), (3.0, 2.0, 2.0, False)],
)
def test_a_version_stays_on_a_gpu_that_was_never_too_full_for_two(
    monkeypatch: pytest.MonkeyPatch, free: float, reserved: float, fullest: float, stays: bool
) -> None:
    """GiB: a version of 2, and 1 that must stay free. The first one, before anything was trained, always leaves."""
    gib = 2**30
    for name, value in (("mem_get_info", (int(free * gib), 80 * gib)), ("memory_reserved", int(reserved * gib))):
        monkeypatch.setattr(torch.cuda, name, lambda _, value=value: value)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda _: int(fullest * gib))
    version = {"a": payload.Local("bfloat16", (gib,), 0, torch.empty(gib, dtype=torch.bfloat16, device="meta"))}
    assert snapshot.room_on_gpu(version) == stays
    left: list[str] = []
    monkeypatch.setattr(snapshot, "on_gpu", lambda tensors: not left and tensors["a"].flat.device.type == "meta")
    monkeypatch.setattr(snapshot, "lanes_of", lambda tensors: dict.fromkeys(tensors, "digest"))

    def to_host(flats: dict[str, torch.Tensor], run: Any) -> dict[str, torch.Tensor]:
        left.extend(flats)
        return {name: torch.empty(1) for name in flats}

    monkeypatch.setattr(snapshot, "to_host", to_host)
    source = {"a": version["a"].flat}
    assert snapshot.take(source, owned=True, first=True).tensors["a"].flat.device.type == "cpu" and left == ["a"]
    if not stays:
        left.clear()
        assert snapshot.take(source, owned=True, first=False).lanes == {"a": "digest"} and left == ["a"]
