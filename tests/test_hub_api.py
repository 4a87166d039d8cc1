"""The hub over real sockets: token, bodies, long polls, both clients, and how long a batch takes."""

from __future__ import annotations

import asyncio
import json
import math
import socket
import sqlite3
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from hub_tools import group, open_store
from starlette.applications import Starlette
from starlette.responses import PlainTextResponse
from starlette.routing import Route

from astracli.errors import RunFailed
from astracli.hub import client as client_module
from astracli.hub.api import build_app
from astracli.hub.client import AsyncHubClient, HubClient
from astracli.hub.schema import Database
from astracli.hub.store import HubStore
from astracli.hub.types import EngineReport, NextBatch, Target
from astracli.hub.wire import unpack_answer
from astracli.process.server import ServerThread
from astracli.rl.types import Group, Sample, Segment, pack_group, unpack_group

TOKEN = "secret-of-this-run"


class Server:
    def __init__(self, store: HubStore, path: Path, port: int = 0):
        self.store = store
        self.statuses: list[dict[str, Any]] = []
        self.metrics = path / "metrics.jsonl"
        weights = Starlette(routes=[Route("/{file:path}", lambda request: PlainTextResponse("weights"))])
        app = build_app(store, TOKEN, weights_app=weights, metrics_path=self.metrics, on_status=self.statuses.append)
        listener = socket.socket()
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(("127.0.0.1", port))
        self.thread = ServerThread(app, listener).start()
        self.url = self.thread.url


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    running = Server(open_store(tmp_path), tmp_path)
    yield running
    running.thread.stop()


@pytest.fixture
def hub(server: Server) -> Iterator[HubClient]:
    with HubClient(server.url, TOKEN) as client:
        yield client


def post(server: Server, path: str, body: bytes) -> httpx.Response:
    return httpx.post(server.url + path, content=body, headers={"Authorization": f"Bearer {TOKEN}"})


def test_every_route_asks_for_the_token(server: Server) -> None:
    for method, path in (
        ("POST", "/state"),
        ("POST", "/lease"),
        ("PUT", "/group"),
        ("GET", "/weights/1/manifest.json"),
    ):
        for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": TOKEN}):
            assert httpx.request(method, server.url + path, headers=headers).status_code == 401
    with HubClient(server.url, "wrong") as hub, pytest.raises(RunFailed, match=r"\(401\): missing or wrong token"):
        hub.state()
    good = httpx.get(server.url + "/weights/1/manifest.json", headers={"Authorization": f"Bearer {TOKEN}"})
    assert good.text == "weights"


@pytest.mark.parametrize(
    ("path", "body", "message"),
    [
        ("/lease", b"{", "body is not JSON"),
        ("/lease", b"[]", "body is no JSON object"),
        ("/skip", b'{"lease_id": 1000000000000000000000, "reason": "r"}', "a number of 70 bits is too large"),
        ("/eval/done", b'{"step": 1, "version": 1, "results": {"a": [-9223372036854775809]}}', "64 bits is too large"),
        ("/ack", b"[" * 100_000, "body is not JSON"),
        ("/lease", b"{}", "`worker` is missing"),
        ("/lease", b'{"worker": "w", "n": "3"}', '`n` = "3": input should be a valid integer'),
        ("/lease", b'{"worker": "w", "n": true}', "`n` = true: input should be a valid integer"),
        ("/lease", b'{"worker": "w", "n": 3, "max": 3}', "there is no `max`"),
        ("/lease", b'{"worker": "w", "n": 3, "wait_s": NaN}', "body is not JSON"),
        ("/lease/renew", b'{"lease_ids": [1, "x"]}', '`lease_ids.1` = "x": input should be a valid integer'),
        ("/metrics", b'{"records": [3]}', "`records.0` = 3: input should be a valid dictionary"),
        (
            "/engine/state",
            b'{"engine": "e", "version": 1, "state": "happy"}',
            "'ready', 'updating' or 'down'",
        ),
        ("/engine/state", b'{"engine": "e", "version": null, "state": "ready"}', "that is `ready` has a version"),
        ("/gpu_lease/take", b'{"gpu_lease": "gpu7", "who": "trainer"}', "there is no GPU lease `gpu7`"),
    ],
)
def test_bad_bodies_are_400_and_say_what_is_wrong(server: Server, path: str, body: bytes, message: str) -> None:
    reply = post(server, path, body)
    assert reply.status_code == 400
    assert message in reply.json()["error"]


def test_a_group_that_is_none_is_400_and_a_step_out_of_order_409(server: Server, hub: HubClient) -> None:
    reply = httpx.put(server.url + "/group", content=b"??", headers={"Authorization": f"Bearer {TOKEN}"})
    assert (reply.status_code, "not a packed group" in reply.json()["error"]) == (400, True)
    with pytest.raises(RunFailed, match=r"refused POST /batch \(409\): batch 3 was asked for; the next one is 0"):
        hub.batch(3, wait_s=0)


def test_a_full_disk_is_one_line_and_any_other_failure_is_raised(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(words: str) -> None:
        def rows(*_: Any) -> None:
            raise sqlite3.OperationalError(words)

        monkeypatch.setattr(Database, "rows", rows)

    body = b'{"lease_ids": [1], "worker": "w"}'
    fail("database or disk is full")
    said = post(server, "/lease/renew", body)
    assert said.status_code == 500 and "disk is full" in said.json()["error"] and "free space" in said.json()["hint"]
    fail("no such table: groups")
    said = post(server, "/lease/renew", body)
    assert said.status_code == 500 and said.text == "Internal Server Error", "its traceback is in the log"


def test_the_flow_of_one_step(server: Server, hub: HubClient) -> None:
    hub.engine_state("engine0", 0, "ready")
    leases = hub.lease("w", 4, engine="engine0").leases
    assert [lease.prompt_index for lease in leases] == [0, 1, 2, 3]
    assert hub.renew([0, 99], "w") == [99]
    hub.give_back([3])
    hub.skip(2, "too long")
    assert hub.put_group(unpack_group(group(0))) == "accepted"
    assert hub.release("w") == 1
    assert hub.batch(0, wait_s=0) == NextBatch(None, "groups for step 0: 1 of 4, 0 in flight")
    for lease in hub.lease("w", 3).leases:
        hub.put_group(unpack_group(group(lease.lease_id)))
    served = hub.batch(0).batch
    assert [unpack_group(blob).lease_id for blob in served.groups] == [0, 1, 3, 4]
    assert served.stats.arrived_groups == 4
    assert hub.announce(1, 1) == []
    hub.ack(0, 1, checkpoint_step=1)
    assert hub.target("engine0") == Target(1, False, False, False, False)
    beat = {"name": "rollout", "pid": 1, "state": "ready", "waiting": None, "progress": {}}
    assert post(server, "/status", json.dumps(beat).encode()).json() == {"stop": False, "save": False}
    state = hub.state()
    assert state.counts.consumed_groups == 4
    assert state.engines["engine0"] == EngineReport(0, "ready")
    assert server.statuses == [beat]


def test_metrics_are_lines_with_time_and_nothing_that_is_not_json(server: Server, hub: HubClient) -> None:
    hub.metrics([{"step": 3, "process": "trainer", "kl": math.nan, "loss": 0.5}, {"step": 4, "process": "trainer"}])
    lines = [json.loads(line) for line in server.metrics.read_text().splitlines()]
    assert [line["step"] for line in lines] == [3, 4]
    assert (lines[0]["kl"], lines[0]["loss"]) == (None, 0.5)
    assert abs(lines[0]["time"] - time.time()) < 60


def test_a_long_poll_answers_when_something_changes_not_when_time_is_up(server: Server, hub: HubClient) -> None:
    def later() -> None:
        time.sleep(0.2)
        for lease in server.store.lease("w", 4).leases:
            server.store.put(group(lease.lease_id))

    thread = threading.Thread(target=later)
    thread.start()
    begun = time.monotonic()
    assert hub.batch(0, wait_s=10.0).batch
    assert 0.15 < time.monotonic() - begun < 8.0
    thread.join()

    waiting = threading.Timer(0.2, lambda: server.store.announce(5, 5))
    waiting.start()
    begun = time.monotonic()
    assert hub.target("engine0", have=4, wait_s=10.0).version == 5
    assert time.monotonic() - begun < 8.0

    threading.Timer(0.2, server.store.request_stop).start()
    begun = time.monotonic()
    assert hub.eval_next(wait_s=10.0).stop
    assert time.monotonic() - begun < 8.0


def test_a_client_that_is_gone_gets_no_lease(server: Server) -> None:
    server.store.lease("w", 8)
    body = {"worker": "dead", "n": 8, "wait_s": 8.0}
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(server.url + "/lease", json=body, headers={"Authorization": f"Bearer {TOKEN}"}, timeout=0.3)
    server.store.give_back([0, 1])
    time.sleep(0.3)
    assert server.store.counts().queued == 2


def test_the_async_client_waits_out_a_restart_of_the_hub(server: Server, tmp_path: Path) -> None:
    port = int(server.url.rsplit(":", 1)[1])

    async def play() -> Any:
        async with AsyncHubClient(server.url, TOKEN) as hub:
            assert len((await hub.lease("w", 2)).leases) == 2
            await asyncio.to_thread(server.thread.stop)
            server.store.close()
            asking = asyncio.create_task(hub.lease("w", 3))
            await asyncio.sleep(0.4)
            again = Server(open_store(tmp_path), tmp_path, port)
            try:
                return await asking
            finally:
                await asyncio.to_thread(again.thread.stop)

    assert [lease.lease_id for lease in asyncio.run(play()).leases] == [0, 1, 2]


def test_a_hub_that_is_gone_ends_in_words(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client_module, "RETRY_S", 0.3)
    with (
        HubClient("http://127.0.0.1:9", TOKEN) as hub,
        pytest.raises(RunFailed, match=r"did not answer for 0\.3 s") as error,
    ):
        hub.state()
    assert "--resume" in str(error.value.hint)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"pinned": None}, "`pinned` = null: input should be a valid boolean"),
        ({"version": "7"}, '`version` = "7": input should be a valid integer'),
        ({"new": 1}, "there is no `new`"),
        ({"stop": ...}, "`stop` is missing"),
    ],
)
def test_an_answer_of_another_version_ends_in_words(change: dict[str, Any], words: str) -> None:
    document = asdict(Target(1, False, False, False, False)) | change
    body = json.dumps({key: value for key, value in document.items() if value is not ...}).encode()
    with pytest.raises(RunFailed) as error:
        unpack_answer(Target, body, "application/json", "POST /engine/target")
    assert words in str(error.value) and "POST /engine/target" in str(error.value)


def test_a_batch_of_16_groups_of_8_samples_takes_milliseconds(tmp_path: Path) -> None:
    running = Server(open_store(tmp_path, batch_groups=16), tmp_path)
    try:
        with HubClient(running.url, TOKEN) as hub:
            for lease in hub.lease("w", 16).leases:
                samples = [
                    Sample(
                        i, [Segment(0, np.arange(32, dtype=np.int32), np.zeros(32, np.float32))], "stop", i % 2, "right"
                    )
                    for i in range(8)
                ]
                running.store.put(pack_group(Group(lease.lease_id, "p", np.arange(16, dtype=np.int32), samples)))
            took = []
            for _ in range(20):
                begun = time.perf_counter()
                assert len(hub.batch(0).batch.groups) == 16
                took.append(time.perf_counter() - begun)
        assert sorted(took)[10] < 0.5, f"median {sorted(took)[10] * 1000:.1f} ms"
    finally:
        running.thread.stop()
