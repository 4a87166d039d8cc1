"""Malformed requests that carry the token, and strangers, at every listener of a run. Real sockets, seeded
(`bench/faults/requests.py`)."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from hub_tools import group, ids, open_store

sys.path.append(str(Path(__file__).parents[1] / "bench"))

from faults import requests, served
from faults.requests import Listener
from faults.world import Row

from astracli.errors import RunFailed
from astracli.hub.types import BadRequest
from astracli.rl.types import DIGEST_BYTES, unpack_group
from astracli.runs import metrics

SEED = 20261201


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[served.Hub, list[Listener]]]:
    with served.all_of(tmp_path_factory.mktemp("served")) as found:
        yield found


def test_malformed_requests_are_refused_with_a_reason(world: tuple[served.Hub, list[Listener]]) -> None:
    """Never a 500, nothing on the terminal; what was taken is understood by whoever reads it."""
    hub, listeners = world
    rows = requests.tried(listeners, SEED, 60)
    assert {row.where: row.problems for row in rows if row.problems} == {}
    assert all("4xx" in row.outcome for row in rows) and len(rows) == 6
    hub.understood(Row("", ""))


def test_strangers_and_pages_reach_no_listener(world: tuple[served.Hub, list[Listener]]) -> None:
    client = httpx.Client()
    for listener in world[1]:
        method, path, body = listener.alive
        token = {"Authorization": f"Bearer {listener.token}"}
        for headers, status in (
            ({}, 401), ({"Authorization": "Bearer x"}, 401), (token | {"Origin": "null"}, 403),
            (token | {"Host": "evil.test"}, 421), (token, 200),
        ):  # fmt: skip
            reply = client.request(method, listener.url + path, content=body, headers=headers)
            assert (reply.status_code, status == 200 or reply.headers["connection"] == "close") == (status, True)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"lease_id": float("inf")}, "is no int"),
        ({"lease_id": True}, "is no int"),
        ({"meta": [1]}, "is no dict"),
        ({"prompt": "text"}, "is no bytes"),
        ({"samples": {"a": 1}}, "is no list"),
        ({"reward": float("nan")}, "is no finite number"),
        ({"verdict": "great"}, "is none of right, wrong"),
        ({"parts": {"a": "b"}}, "is no finite number"),
        ({"segments": [[2**40, b"", b""]]}, "is no version"),
        ({"text": None}, "is no str"),
    ],
)
def test_a_group_of_other_types_is_none(change: dict[str, object], words: str) -> None:
    """Its checksum is right."""
    import msgpack
    import xxhash

    document = msgpack.unpackb(group(0)[:-DIGEST_BYTES])
    for where in (document, document["samples"][0]):
        if change.keys() <= where.keys() | {"parts"} or "parts" in change:
            where.update(change)
    packed = msgpack.packb(document)
    with pytest.raises(ValueError, match=f"not a packed group: .*{words}"):
        unpack_group(packed + xxhash.xxh3_64_digest(packed))


def test_a_record_without_a_step_that_counts_is_left_out(tmp_path: Path) -> None:
    """One that lies in a file is passed over by everybody who reads it."""
    file = tmp_path / "metrics.jsonl"
    file.write_text("".join(json.dumps({"step": step, "loss": 1.0}) + "\n" for step in (1, "x", [2], None, True, 3)))
    assert metrics.series(metrics.read(file), "loss") == [(1, 1.0), (3, 1.0)]


def test_an_acknowledgement_beyond_the_last_step_does_not_spin(tmp_path: Path) -> None:
    store = open_store(tmp_path, own_batches=True, steps=5)
    with pytest.raises(RunFailed, match="was acknowledged, but has no batch"):
        store.ack(2**62, 1)
    store.ack(4, 5)
    with pytest.raises(BadRequest, match="not a packed group"):
        store.put(b"??")
    assert ids(store.lease("w", -5)) == []
