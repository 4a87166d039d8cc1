"""Publisher -> real files -> real HTTP server -> subscriber: chains, full versions, links, damage, cut connections."""

from __future__ import annotations

import json
import shutil
import socket
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from transfer_tools import FULL, TOKEN, Server, chain, copies, publish, same, server, subscriber

from astracli.errors import RunFailed
from astracli.weights import WeightCorrupt
from astracli.weights.format.manifest import version_name
from astracli.weights.publish.publisher import Publisher
from astracli.weights.receive import apply, download
from astracli.weights.receive.subscriber import Subscriber, choose_route

__all__ = ["server"]


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
        result = apply.apply(tmp_path / "one", engine, version - 1)
        assert result.version == version and result.bytes == plan.bytes <= plan.downloaded
        assert same(engine, versions[version])
        assert [p.name for p in (tmp_path / "one").glob("v*")] == [version_name(version)]
    late, fresh = subscriber(server, tmp_path, "two"), {n: torch.zeros_like(t) for n, t in versions[0].items()}
    assert late.fetch(8).steps == ("v000006/manifest.full.json", "v000007/manifest.json", "v000008/manifest.json")
    assert apply.apply(tmp_path / "two", fresh, None).steps == 3
    assert same(fresh, versions[8])
    behind = copies(versions[5])
    assert late.fetch(8, 5).kind == "delta"
    apply.apply(tmp_path / "two", behind, 5)
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
    apply.apply(tmp_path / "stage", engine, None)
    assert same(engine, big)
    receiver.close()


def test_a_large_file_comes_in_pieces_and_a_later_try_asks_for_the_missing_ones(
    tmp_path: Path, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(download, "PIECES_FROM", 300_000)
    monkeypatch.setattr(download, "PIECE", 50_000)
    big = {"w": torch.randn(200, 1000).bfloat16()}
    publish(tmp_path / "weights", [big])
    size = (tmp_path / "weights" / "v000000" / FULL[1]).stat().st_size
    server.cut_after = 30_000  # each connection ends in the middle of a piece
    source, path = download.Downloader(server.url, TOKEN, 1, None), tmp_path / "got"
    source.fetch(0, FULL[1], size, path)
    assert same_bytes(path, tmp_path / "weights" / "v000000" / FULL[1]) and source.downloaded == size
    ranges = [r.removeprefix("bytes=") for p, r in server.requests if "safetensors" in p]
    assert {f"{low}-{min(low + 50_000, size) - 1}" for low in range(0, size, 50_000)} < {*ranges}
    path.unlink()
    stream, calls = download.Downloader.stream, iter(range(100))

    def breaks(self: download.Downloader, *args: Any) -> None:
        if next(calls) >= 5:
            raise OSError("gone")
        stream(self, *args)

    server.cut_after = None
    monkeypatch.setattr(download.Downloader, "stream", breaks)
    with pytest.raises(RunFailed, match="gone"):
        source.fetch(0, FULL[1], size, path)
    assert 1 <= len(json.loads((tmp_path / "got.part.pieces").read_text())) <= 5
    monkeypatch.setattr(download.Downloader, "stream", stream)
    before = source.downloaded
    source.fetch(0, FULL[1], size, path)
    assert same_bytes(path, tmp_path / "weights" / "v000000" / FULL[1]) and 0 < source.downloaded - before < size
    assert not list(tmp_path.glob("got.part*"))
    source.close()


def same_bytes(one: Path, two: Path) -> bool:
    return one.read_bytes() == two.read_bytes()


def test_a_receiver_that_was_killed_goes_on_from_its_part_file(tmp_path: Path, server: Server) -> None:
    big = {"w": torch.randn(200, 1000).bfloat16()}
    publish(tmp_path / "weights", [big])
    whole = (tmp_path / "weights" / "v000000" / "full-00000.safetensors").read_bytes()
    (tmp_path / "stage" / "v000000").mkdir(parents=True)
    part = tmp_path / "stage" / "v000000" / "full-00000.safetensors.part"
    part.write_bytes(whole[:123_456])
    receiver = subscriber(server, tmp_path)
    manifest = (tmp_path / "weights" / "v000000" / FULL[0]).stat().st_size
    assert receiver.fetch(0).downloaded == manifest + len(whole) - 123_456
    (tmp_path / "stage" / "v000000" / "full-00000.safetensors").unlink()
    part.write_bytes(b"x" * 123_456)  # the rest of another file: found out, and fetched again from the start
    assert receiver.fetch(0).downloaded == 2 * len(whole) - 123_456
    receiver.close()


def test_receivers_at_once_do_not_wait_for_one_that_reads_slowly_nor_does_the_server_read_ahead_for_it(
    tmp_path: Path, server: Server
) -> None:
    big = {"w": torch.arange(16 << 20, dtype=torch.int32).view(torch.bfloat16)}
    publish(tmp_path / "weights", [big])
    path = tmp_path / "weights" / "v000000" / FULL[1]
    size = path.stat().st_size
    address = httpx.URL(server.url)
    with socket.create_connection((address.host, address.port), timeout=20) as slow:
        slow.sendall(
            f"GET /weights/0/{FULL[1]} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n"
            f"Authorization: Bearer {TOKEN}\r\n\r\n".encode()
        )
        found = bytearray(slow.recv(1 << 16))
        receivers = [subscriber(server, tmp_path, f"stage{k}", link_bytes=None) for k in range(3)]
        with ThreadPoolExecutor(3) as pool:
            plans = list(pool.map(lambda receiver: receiver.fetch(0), receivers))
        assert [plan.bytes for plan in plans] == [size] * 3
        for k, receiver in enumerate(receivers):
            assert (tmp_path / f"stage{k}" / "v000000" / FULL[1]).read_bytes() == path.read_bytes()
            receiver.close()
        assert server.requests[0][0].endswith(FULL[1]) and len(found) <= server.sent[0] < size / 2, server.sent[0]
        while chunk := slow.recv(1 << 20):
            found += chunk
    assert found.endswith(path.read_bytes()), "it gets all of it in its own time"


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
    apply.apply(tmp_path / "stage", engine, None)
    assert same(engine, big)
    again = Publisher(tmp_path / "weights")  # writes a new file under the old name: the staged one stays
    again.publish(0, {"w": big["w"] + 1})
    again.close()
    apply.apply(tmp_path / "stage", engine, None)
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
    result = apply.apply(tmp_path / "stage", copies(versions[1]), 1)
    assert (result.version, result.steps, result.changed) == (1, 0, 0)
    plan = json.loads((tmp_path / "stage" / "next.json").read_bytes())
    assert (
        plan["version"] == 1
        and plan["steps"] == []
        and plan["model_path"] == "/models/tiny"
        and len(plan["hash"]) == 32
    )
    receiver.close()
