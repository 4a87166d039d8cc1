"""Publisher -> real files -> real HTTP server -> subscriber: chains, full versions, retention, restarts, damage."""

from __future__ import annotations

import errno
import json
import shutil
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Mount

from astracli.errors import RunFailed
from astracli.weights import WeightCorrupt, host, payload, staged
from astracli.weights.digest import digest_tensor, to_hex
from astracli.weights.manifest import Manifest, read_stable, seal, version_name, versions_in, write_atomic
from astracli.weights.publisher import Publisher, PublishResult
from astracli.weights.server import weights_app
from astracli.weights.snapshot import Shard
from astracli.weights.subscriber import Subscriber, choose_route

Weights = dict[str, torch.Tensor]
TOKEN = "s3cret"
FULL = ("manifest.full.json", "full-00000.safetensors")


def first_weights(seed: int = 0) -> Weights:
    draw = torch.Generator().manual_seed(seed)
    return {
        "model.embed_tokens.weight": torch.randn(64, 32, generator=draw).bfloat16(),
        "model.layers.0.linear_attn.A_log": torch.randn(8, generator=draw),
        "model.layers.0.linear_attn.conv1d.weight": torch.randn(24, 1, 4, generator=draw).bfloat16(),
        "model.layers.0.mlp.up_proj.weight": torch.randn(48, 32, generator=draw).bfloat16(),
        "model.norm.weight": torch.ones(32).bfloat16(),
    }


def step(weights: Weights, seed: int) -> Weights:
    """A later version: a few per cent of each matrix, all of A_log, nothing of the norm."""
    draw = torch.Generator().manual_seed(1000 + seed)
    changed = {}
    for name, tensor in weights.items():
        if "norm" in name:
            changed[name] = tensor.clone()
            continue
        mask = torch.rand(tensor.shape, generator=draw) < (1.0 if tensor.dtype == torch.float32 else 0.05)
        changed[name] = torch.where(mask, tensor * 1.01, tensor)
    return changed


def chain(count: int) -> list[Weights]:
    found = [first_weights()]
    while len(found) < count:
        found.append(step(found[-1], len(found)))
    return found


def same(one: Weights, two: Weights) -> bool:
    return one.keys() == two.keys() and all(digest_tensor(one[n]) == digest_tensor(two[n]) for n in one)


def copies(weights: Weights) -> Weights:
    return {name: tensor.clone() for name, tensor in weights.items()}


class Server:
    """A uvicorn server of a weights directory that asks for the token, and can be told to misbehave."""

    def __init__(self, directory: Path):
        self.requests: list[tuple[str, str]] = []
        self.cut_after: int | None = None
        app = Starlette(routes=[Mount("/weights", weights_app(directory))])

        async def guarded(scope: Any, receive: Any, send: Any) -> None:
            if scope["type"] != "http":
                return await app(scope, receive, send)
            request = Request(scope)
            self.requests.append((request.url.path, request.headers.get("range", "")))
            if request.headers.get("authorization") != f"Bearer {TOKEN}":
                refusal: Response = JSONResponse({}, status_code=401)
                return await refusal(scope, receive, send)
            budget = self.cut_after if "safetensors" in request.url.path else None
            sent = 0

            async def limited(message: Any) -> None:
                nonlocal sent
                if message["type"] == "http.response.body" and budget is not None:
                    body = message.get("body", b"")[: budget - sent]
                    sent += len(body)
                    await send({"type": "http.response.body", "body": body, "more_body": True})
                    if sent >= budget:
                        raise ConnectionError("cut")
                    return
                await send(message)

            return await app(scope, receive, limited if budget is not None else send)

        self.socket = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self.socket.getsockname()[1]}"
        self.server = uvicorn.Server(uvicorn.Config(guarded, log_level="critical", lifespan="off"))
        self.thread = threading.Thread(target=self.server.run, kwargs={"sockets": [self.socket]}, daemon=True)
        self.thread.start()
        while not self.server.started:
            time.sleep(0.005)

    def nonce(self) -> bytes:
        """What its listing says."""
        reply = httpx.get(f"{self.url}/weights/", headers={"Authorization": f"Bearer {TOKEN}"}, trust_env=False)
        return str(reply.json()["store"]["nonce"]).encode()

    def stop(self) -> None:
        self.server.should_exit = True
        self.thread.join(10)
        self.socket.close()


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    (tmp_path / "weights").mkdir()
    found = Server(tmp_path / "weights")
    yield found
    found.stop()


def subscriber(server: Server, tmp_path: Path, name: str = "stage", **options: Any) -> Subscriber:
    return Subscriber(server.url, TOKEN, tmp_path / name, **{"wait_s": 5.0, **options})


def publish(directory: Path, versions: list[Weights], **options: Any) -> list[PublishResult]:
    publisher = Publisher(directory, model_name="tiny", **options)
    results = [publisher.publish(version, weights) for version, weights in enumerate(versions)]
    publisher.close()
    return results


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
        gate.wait(10)

    assert publisher.publish_async(0, weights, slow) < 0.05
    for name, tensor in weights.items():
        tensor.copy_(versions[1][name])
    threading.Timer(0.3, gate.set).start()
    waited = publisher.publish_async(1, weights)
    assert waited > 0.2
    result = publisher.wait()
    assert result is not None and result.version == 1 and result.waited_s == waited and seen == [0]
    manifest = Manifest.from_bytes((tmp_path / "v000000" / "manifest.full.json").read_bytes())
    assert {t.name: t.digest for t in manifest.tensors} == staged.read_back_digests(versions[0])
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
    assert plan.kind == "delta" and staged.apply(tmp_path / "stage", engine, 3).version == 4
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
    staged.apply(tmp_path / "stage", engine, 0)
    assert same(engine, versions[2])
    empty = {name: torch.zeros_like(t) for name, t in versions[0].items()}
    assert receiver.fetch(3, None).kind == "full"
    staged.apply(tmp_path / "stage", empty, None)
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
    publisher = Publisher(tmp_path, rank=1, world_size=2, session="s", rank_timeout_s=5)
    path = tmp_path / "STABLE"
    doc = {"session": "s", "version": 3}
    threading.Timer(0.1, lambda: write_atomic(path, seal(doc))).start()
    monkeypatch.setattr(Path, "exists", lambda self: True)  # as it was a moment ago
    assert publisher._await(path, 3) == doc
    publisher.close()


# ---- serving --------------------------------------------------------------------------------------------------------


def test_the_server_gives_ranges_of_listed_files_and_nothing_else(tmp_path: Path, server: Server) -> None:
    publish(tmp_path / "weights", chain(2))
    (tmp_path / "secret").write_text("no")
    (tmp_path / "weights" / "v000001" / "unlisted").write_text("no")
    (tmp_path / "weights" / "v000002").mkdir()
    (tmp_path / "weights" / "v000002" / "manifest.json").write_text("{}")
    whole = (tmp_path / "weights" / "v000000" / "full-00000.safetensors").read_bytes()
    file = f"{server.url}/weights/0/full-00000.safetensors"
    with httpx.Client(headers={"Authorization": f"Bearer {TOKEN}"}, trust_env=False, follow_redirects=True) as client:
        listing = client.get(f"{server.url}/weights").json()
        assert listing["versions"] == [0, 1] and listing["latest"] == 1
        assert listing["detail"]["1"]["delta"]["base_version"] == 0
        reply = client.get(file, headers={"Range": "bytes=10-19"})
        assert (reply.status_code, reply.content) == (206, whole[10:20])
        assert reply.headers["content-range"] == f"bytes 10-19/{len(whole)}"
        assert client.get(file, headers={"Range": f"bytes={len(whole) - 5}-"}).content == whole[-5:]
        assert client.get(file, headers={"Range": f"bytes={len(whole)}-"}).status_code == 416
        assert client.get(file).content == whole
        for path in ("1/unlisted", "2/manifest.json", "9/STABLE", "0/..%2f..%2fsecret", "0/%2e%2e/secret", "x/STABLE"):
            assert client.get(f"{server.url}/weights/{path}").status_code == 404, path
    assert httpx.get(file, trust_env=False).status_code == 401


# ---- fetching -------------------------------------------------------------------------------------------------------


def test_chain_or_full_whichever_is_fewer_bytes() -> None:
    def delta(version: int, size: int) -> dict[str, Any]:
        return {"delta": {"file": "d", "base_version": version - 1, "bytes": size}}

    def full(size: int) -> dict[str, Any]:
        return {"full": {"file": "f", "base_version": None, "bytes": size}}

    detail = {0: full(100)} | {v: delta(v, 10) for v in range(1, 8)} | {4: delta(4, 10) | full(100)}
    assert choose_route(detail, 7, 6).steps == ((7, "d"),)
    assert choose_route(detail, 7, 0).bytes == 70
    assert choose_route(detail, 7, None).steps == ((4, "f"), (5, "d"), (6, "d"), (7, "d"))
    assert choose_route(detail, 7, 9).kind == "full"
    assert choose_route(detail, 7, 7).kind == "none"
    heavy = detail | {2: delta(2, 60)}
    assert choose_route(heavy, 7, 0).kind == "delta" and choose_route(heavy | {3: delta(3, 60)}, 7, 0).kind == "full"
    broken = {v: kinds for v, kinds in detail.items() if v != 6}
    with pytest.raises(RunFailed, match=r"nothing leads from version 5 to 7; published are \[0, 1, 2, 3, 4, 5, 7\]"):
        choose_route(broken, 7, 5)


def test_receivers_follow_join_late_and_catch_up(tmp_path: Path, server: Server) -> None:
    versions = chain(9)
    publish(tmp_path / "weights", versions, full_interval=6)
    follower, engine = subscriber(server, tmp_path, "one"), copies(versions[0])
    for version in range(1, 9):
        plan = follower.fetch(version, version - 1)
        assert (plan.kind, len(plan.steps)) == ("delta", 1)
        result = staged.apply(tmp_path / "one", engine, version - 1)
        assert result.version == version and result.bytes == plan.bytes <= plan.downloaded
        assert same(engine, versions[version])
        assert [p.name for p in (tmp_path / "one").glob("v*")] == [version_name(version)]
    late, fresh = subscriber(server, tmp_path, "two"), {n: torch.zeros_like(t) for n, t in versions[0].items()}
    assert late.fetch(8).steps == ("v000006/manifest.full.json", "v000007/manifest.json", "v000008/manifest.json")
    assert staged.apply(tmp_path / "two", fresh, None).steps == 3
    assert same(fresh, versions[8])
    behind = copies(versions[5])
    assert late.fetch(8, 5).kind == "delta"
    staged.apply(tmp_path / "two", behind, 5)
    assert same(behind, versions[8])
    follower.close()
    late.close()


def test_a_version_that_comes_later_is_waited_for_and_one_that_never_comes_is_not(
    tmp_path: Path, server: Server
) -> None:
    versions = chain(2)
    publisher = Publisher(tmp_path / "weights")
    publisher.publish(0, versions[0])
    receiver = subscriber(server, tmp_path, wait_s=3.0)
    threading.Timer(0.3, publisher.publish, (1, versions[1])).start()
    assert receiver.fetch(1, 0).waited_s > 0.2
    receiver.wait_s = 0.1
    with pytest.raises(RunFailed, match=r"waited 0\.1 s for version 2; the newest is 1"):
        receiver.fetch(2, 1)
    publisher.restart(1, versions[1])
    publisher.close()
    receiver.close()


def test_a_cut_connection_resumes_where_it_was(tmp_path: Path, server: Server) -> None:
    big = {"w": torch.randn(200, 1000).bfloat16()}
    publish(tmp_path / "weights", [big])
    server.cut_after = 150_000
    receiver = subscriber(server, tmp_path)
    plan = receiver.fetch(0)
    manifest, payload = ((tmp_path / "weights" / "v000000" / n).stat().st_size for n in FULL)
    ranges = [r for path, r in server.requests if "safetensors" in path]
    assert len(ranges) >= 3 and ranges[0] == f"bytes=0-{payload - 1}"
    assert all(int(r.removeprefix("bytes=").split("-")[0]) > 0 for r in ranges[1:])
    assert plan.downloaded == manifest + payload and plan.bytes == payload
    engine = {"w": torch.zeros(200, 1000).bfloat16()}
    staged.apply(tmp_path / "stage", engine, None)
    assert same(engine, big)
    receiver.close()


def test_a_receiver_that_was_killed_goes_on_from_its_part_file(tmp_path: Path, server: Server) -> None:
    big = {"w": torch.randn(200, 1000).bfloat16()}
    publish(tmp_path / "weights", [big])
    whole = (tmp_path / "weights" / "v000000" / "full-00000.safetensors").read_bytes()
    (tmp_path / "stage" / "v000000").mkdir(parents=True)
    part = tmp_path / "stage" / "v000000" / "full-00000.safetensors.0of1.part"
    part.write_bytes(whole[:123_456])
    receiver = subscriber(server, tmp_path)
    manifest = (tmp_path / "weights" / "v000000" / FULL[0]).stat().st_size
    assert receiver.fetch(0).downloaded == manifest + len(whole) - 123_456
    (tmp_path / "stage" / "v000000" / "full-00000.safetensors").unlink()
    part.write_bytes(b"x" * 123_456)  # the rest of another file: found out, and fetched again from the start
    assert receiver.fetch(0).downloaded == 2 * len(whole) - 123_456
    receiver.close()


def test_a_large_file_comes_in_parallel_ranges(tmp_path: Path, server: Server) -> None:
    big = {"w": torch.randn(200, 1000).bfloat16()}
    publish(tmp_path / "weights", [big])
    receiver = subscriber(server, tmp_path, parts=4, part_bytes=50_000)
    receiver.fetch(0)
    ranges = sorted(int(r.removeprefix("bytes=").split("-")[0]) for p, r in server.requests if "safetensors" in p)
    assert len(ranges) == 4 and ranges[0] == 0 and 99_000 < ranges[1] < 101_000
    engine = {"w": torch.zeros(200, 1000).bfloat16()}
    staged.apply(tmp_path / "stage", engine, None)
    assert same(engine, big)
    assert [p.suffix for p in (tmp_path / "stage" / "v000000").iterdir() if p.suffix == ".part"] == []
    receiver.close()


def test_a_large_file_of_the_same_disk_is_linked_and_outlives_its_publisher(tmp_path: Path, server: Server) -> None:
    big = {"w": torch.randn(200, 1000).bfloat16()}
    publish(tmp_path / "weights", [big])
    source = tmp_path / "weights" / "v000000" / FULL[1]
    receiver = subscriber(server, tmp_path, link_bytes=100_000)
    plan = receiver.fetch(0)
    staged_file = tmp_path / "stage" / "v000000" / FULL[1]
    assert plan.linked == source.stat().st_size and staged_file.samefile(source)
    assert plan.downloaded == source.with_name(FULL[0]).stat().st_size  # the manifest is small
    assert not any(FULL[1] in path for path, _ in server.requests)
    shutil.rmtree(tmp_path / "weights" / "v000000")
    engine = {"w": torch.zeros(200, 1000).bfloat16()}
    staged.apply(tmp_path / "stage", engine, None)
    assert same(engine, big)
    again = Publisher(tmp_path / "weights")  # writes a new file under the old name: the staged one stays
    again.publish(0, {"w": big["w"] + 1})
    again.close()
    staged.apply(tmp_path / "stage", engine, None)
    assert same(engine, big)
    receiver.close()


def test_a_disk_that_is_not_the_publishers_and_a_damaged_link_go_over_the_network(
    tmp_path: Path, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    big = {"w": torch.randn(200, 1000).bfloat16()}
    publish(tmp_path / "weights", [big])
    source = tmp_path / "weights" / "v000000" / FULL[1]
    receiver = subscriber(server, tmp_path, "never", link_bytes=None)
    assert receiver.fetch(0).linked == 0
    (tmp_path / "weights" / "NONCE").write_text("of another server")  # this disk holds another run's directory there
    receiver = subscriber(server, tmp_path, "other", link_bytes=100_000)
    assert receiver.fetch(0).linked == 0
    (tmp_path / "weights" / "NONCE").write_bytes(server.nonce())
    blob = source.read_bytes()
    source.write_bytes(blob[:-1] + bytes([blob[-1] ^ 1]))
    receiver = subscriber(server, tmp_path, "damaged", link_bytes=100_000)
    with pytest.raises(WeightCorrupt, match="arrived corrupt twice"):
        receiver.fetch(0)
    assert not (tmp_path / "damaged" / "next.json").exists()
    source.write_bytes(blob)

    def refused(one: Path, two: Path) -> None:
        raise OSError("another file system")

    monkeypatch.setattr("os.link", refused)
    receiver = subscriber(server, tmp_path, "copied", link_bytes=100_000)
    assert receiver.fetch(0).linked == source.stat().st_size
    copied = tmp_path / "copied" / "v000000" / FULL[1]
    assert copied.read_bytes() == blob and not copied.samefile(source)
    receiver.close()


def test_a_damaged_file_is_fetched_twice_then_named(tmp_path: Path, server: Server) -> None:
    publish(tmp_path / "weights", chain(2))
    for name in ("delta-00000.bin", "manifest.json"):
        receiver = subscriber(server, tmp_path, name)
        path = tmp_path / "weights" / "v000001" / name
        blob = path.read_bytes()
        path.write_bytes(blob[:70] + bytes([blob[70] ^ 4]) + blob[71:])
        server.requests.clear()
        with pytest.raises(WeightCorrupt, match=f"`{name}` of version 1 arrived corrupt twice"):
            receiver.fetch(1, 0)
        assert [p for p, _ in server.requests].count(f"/weights/1/{name}") == 2
        assert not (tmp_path / name / "next.json").exists()
        path.write_bytes(blob)
        receiver.close()
    receiver = subscriber(server, tmp_path)
    truncated = tmp_path / "weights" / "v000001" / "delta-00000.bin"
    truncated.write_bytes(truncated.read_bytes()[:-9])
    with pytest.raises(WeightCorrupt, match=r"delta-00000\.bin"):
        receiver.fetch(1, 0)
    receiver.close()


def test_a_link_pruned_under_way_falls_back_to_full(tmp_path: Path, server: Server) -> None:
    versions = chain(5)
    publish(tmp_path / "weights", versions, full_interval=4)
    receiver = subscriber(server, tmp_path)
    before = receiver._source.listing()
    receiver._await = lambda target: before  # type: ignore[method-assign]
    for name in ("STABLE", "delta-00000.bin", "manifest.json"):
        (tmp_path / "weights" / "v000002" / name).unlink()
    assert receiver.fetch(4, 1).kind == "full"
    receiver.close()


def test_a_wrong_token_and_a_dead_server_end_with_a_message(tmp_path: Path, server: Server) -> None:
    publish(tmp_path / "weights", chain(1))
    with pytest.raises(RunFailed, match="refuses the token"):
        Subscriber(server.url, "other", tmp_path / "stage").fetch(0)
    server.stop()
    receiver = subscriber(server, tmp_path, retries=1)
    with pytest.raises(RunFailed, match="cannot reach"):
        receiver.fetch(0)
    receiver.close()


def test_next_json_is_sealed_and_a_step_to_the_same_version_is_nothing(tmp_path: Path, server: Server) -> None:
    versions = chain(2)
    publish(tmp_path / "weights", versions)
    receiver = subscriber(server, tmp_path, model_path="/models/tiny")
    assert receiver.fetch(1, 1).kind == "none"
    result = staged.apply(tmp_path / "stage", copies(versions[1]), 1)
    assert (result.version, result.steps, result.changed) == (1, 0, 0)
    plan = json.loads((tmp_path / "stage" / "next.json").read_bytes())
    assert (
        plan["version"] == 1
        and plan["steps"] == []
        and plan["model_path"] == "/models/tiny"
        and len(plan["hash"]) == 32
    )
    receiver.close()
