"""Malformed requests that carry the token, from a seeded generator, to every listener of a run.

The hub with its routes for agents, an agent's relay, the embedded engine, the server around vLLM (with the tests'
stand-in for vLLM): each is served here, in this process, as a run serves it. A request is a good one with something
wrong in it: its JSON, its bytes, a packed group whose checksum is right, its path, method, headers, framing.

Each is answered: taken, or refused with 4xx and a reason; 503 with a reason from an engine that does not serve. Then
the listener still answers a good request, and nothing was written to the terminal.
"""

from __future__ import annotations

import http.client
import json
import os
import socket
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from random import Random
from typing import Any
from urllib.parse import urlsplit

from faults.malformed import mangled
from faults.world import Row

TOKEN = "token-of-the-run"
WAIT_S = 10.0
"""For an answer to a whole request. Long polls are cut to a tenth of a second."""
UNFINISHED_S = 0.3
"""For one to a request whose framing is wrong: the server may wait for the rest."""
VALUES: tuple[Any, ...] = (
    None, True, False, -1, 0, 1, 2**31, 2**63 - 1, 2**63, -(2**63), 10**400, 0.5, 1e308, float("nan"), float("inf"),
    "", "a", "0", "9" * 400, "\x00", "\x1b[2J", "\ud800", "../../etc/passwd", "x" * 70_000, "\U0001f600", "=1+1",
    [], [[]], [None], [1, "a", None], {}, {"": {}}, {"a": {"b": [1]}}, "aGVsbG8=", "NaN", "abort", "staged",
)  # fmt: skip
LEASES = 400
"""The hub that is asked has granted so many; a group for one that is settled is a duplicate."""
METHODS = ("GET", "PUT", "POST", "DELETE", "HEAD", "OPTIONS", "PATCH", "TRACE", "CONNECT", "FOO", "get", "")
TAILS = (
    "/",
    "//",
    "/..",
    "/%00",
    "/%ff%fe",
    "?" + "a" * 8000,
    "/%2e%2e/%2e%2e/etc/passwd",
    ";x",
    "#",
    "/" + "y" * 3000,
)
HEADERS = (
    "Content-Type: text/plain", "Content-Type: \xff", "Content-Encoding: gzip", "Expect: 100-continue",
    "Range: bytes=0-1,3-2", "Range: bytes=-0", "Range: bytes=99999999999999999999999-", "Range: items=1",
    "Range: bytes=" + ",".join(f"{i}-{i + 1}" for i in range(0, 4000, 2)), "If-Range: \xff", "Accept: \x01",
    "Host: 127.0.0.1", "Authorization: Bearer \xff", "X-A: " + "b" * 60_000, "Connection: upgrade", "Upgrade: h2c",
    "Connection: Upgrade, HTTP2-Settings", "Cookie: a=b", "Content-Length: 5", "Content-Length: -1",
    "Content-Length: 1e3", "Content-Length: " + "9" * 5000, "Transfer-Encoding: chunked", "Transfer-Encoding: gzip",
    "X-Forwarded-For: 10.0.0.1", "X-Http-Method-Override: PUT", "x-astra-xxh3: 0", "x-astra-digest: 0",
)  # fmt: skip


@dataclass
class Listener:
    """A server of a run, and a good request for each of its routes."""

    name: str
    url: str
    good: Sequence[tuple[str, str, bytes]]
    """(method, path, body)"""
    token: str = TOKEN
    binary: frozenset[str] = frozenset()
    """Paths whose body is msgpack behind a checksum."""
    after: Callable[[], object] = lambda: None
    """Called after each: what a request may have stopped goes on."""
    alive: tuple[str, str, bytes] = ("POST", "/state", b"{}")


@dataclass
class Answer:
    status: int | None
    """None: the connection was closed without one."""
    body: bytes = b""
    problem: str = ""
    headers: dict[str, str] = field(default_factory=dict)


def send(url: str, data: bytes, method: str, wait_s: float = WAIT_S) -> Answer:
    """Bytes to a server, and its answer."""
    parts = urlsplit(url)
    with socket.create_connection((parts.hostname or "", parts.port or 0), timeout=wait_s) as sock:
        with suppress(ConnectionError, TimeoutError):  # it may answer, and close, before it has read all
            sock.sendall(data)
        reply = http.client.HTTPResponse(sock, method=method if method == "HEAD" else "GET")
        try:
            reply.begin()
            return Answer(reply.status, reply.read(), headers=dict(reply.getheaders()))
        except TimeoutError:
            return Answer(None, problem=f"no answer within {wait_s:g} s" if wait_s == WAIT_S else "")
        except (http.client.HTTPException, ConnectionError) as error:
            return Answer(None, problem="" if isinstance(error, ConnectionError) else repr(error)[:200])


def request(listener: Listener, method: str, path: str, body: bytes, *more: str, length: bool = True) -> bytes:
    head = [f"{method} {path} HTTP/1.1", "Host: 127.0.0.1", f"Authorization: Bearer {listener.token}", *more]
    if length and not any(line.lower().startswith(("content-length", "transfer-encoding")) for line in more):
        head.append(f"Content-Length: {len(body)}")
    return "\r\n".join([*head, "Connection: close", "", ""]).encode("latin-1", "replace") + body


# ---- what is wrong


def odd_value(value: Any, draw: Random) -> Any:
    """A copy of plain values with one of them, at any depth, replaced, left out, or doubled under another name."""
    if isinstance(value, dict) and value and draw.random() < 0.8:
        key = draw.choice(list(value))
        kind = draw.randrange(8)
        if kind == 0:
            return {k: v for k, v in value.items() if k != key}
        if kind == 1:
            return value | {f"{key}_": value[key]}
        return value | {key: odd_value(value[key], draw)}
    if isinstance(value, list) and value and draw.random() < 0.7:
        place = draw.randrange(len(value))
        if draw.random() < 0.2:
            return value + value[place:] * draw.randint(1, 3)
        return [odd_value(each, draw) if i == place else each for i, each in enumerate(value)]
    return draw.choice(VALUES)


def _packed(body: bytes, draw: Random) -> bytes:
    """A group with something odd in it, under a checksum that is right."""
    import msgpack
    import xxhash

    from astracli.rl.types import DIGEST_BYTES

    good = msgpack.unpackb(body[:-DIGEST_BYTES]) | {"lease_id": draw.randrange(LEASES)}
    document = odd_value(good, draw)
    try:
        packed = msgpack.packb(document, unicode_errors="surrogatepass")
    except OverflowError:
        packed = draw.randbytes(40)
    return bytes(packed + xxhash.xxh3_64_digest(packed))


def wrong(listener: Listener, draw: Random) -> tuple[str, str, bytes, float]:
    """(what, method, the request's bytes, seconds for an answer)"""
    method, path, body = draw.choice(list(listener.good))
    kind = draw.randrange(12)
    if kind < 6 and method in ("POST", "PUT"):
        if path in listener.binary:
            changed = _packed(body, draw)
        else:
            changed = json.dumps(odd_value(json.loads(body), draw)).encode()
        return f"{path}: {changed[:120]!r}", method, request(listener, method, path, changed), WAIT_S
    if kind < 8:
        changed = mangled(body or b"{}", draw)
        return f"{path}: bytes {changed[:80]!r}", method, request(listener, method, path, changed), WAIT_S
    if kind == 8:
        other = draw.choice(METHODS)
        return f"{other} {path}", other, request(listener, other, path, body), UNFINISHED_S
    if kind == 9:
        tail = draw.choice(TAILS)
        return f"{path}{tail[:40]}", method, request(listener, method, path + tail, body), UNFINISHED_S
    if kind == 10:
        lines = draw.sample(HEADERS, draw.randint(1, 2))
        what = f"{path}: {', '.join(line[:50] for line in lines)}"
        return what, method, request(listener, method, path, body, *lines), UNFINISHED_S
    whole = request(listener, method, path, body)
    return f"{path}: mangled head", method, mangled(whole[:400], draw) + whole[400:], UNFINISHED_S


# ---- looked at


def judged(answer: Answer, method: str) -> str:
    """What is wrong with an answer; "" when nothing is."""
    if answer.status is None:
        return answer.problem
    if answer.status >= 500 and answer.status != 503:
        return f"{answer.status}: {answer.body[:200]!r}"
    if answer.status >= 400 and method != "HEAD" and not answer.body.strip():
        return f"{answer.status} without a reason"
    return "a traceback" if b"Traceback" in answer.body else ""


@contextmanager
def terminal() -> Iterator[Callable[[], str]]:
    """What this process writes to its standard streams, from any thread."""
    with tempfile.TemporaryFile() as file, ExitStack() as stack:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        for number in (1, 2):
            kept = os.dup(number)
            stack.callback(os.close, kept)
            stack.callback(os.dup2, kept, number)
            os.dup2(file.fileno(), number)

        def said() -> str:
            for stream in (sys.stdout, sys.stderr):
                stream.flush()
            file.seek(0)
            return file.read().decode("utf-8", "replace")

        yield said


def tried(listeners: Sequence[Listener], seed: int, count: int) -> list[Row]:
    """`count` requests to each of the listeners; a row for each listener, its problems with what causes them."""
    rows = []
    for listener in listeners:
        row, ends = Row("malformed requests", listener.name), dict[str, int]()
        with terminal() as said:
            for number in range(count):
                draw = Random(f"{seed}/{listener.name}/{number}")
                what, method, data, wait_s = wrong(listener, draw)
                answer = send(listener.url, data, method, wait_s)
                if found := judged(answer, method):
                    row.problems.append(f"{number} {what[:160]}: {found}")
                key = "no answer" if answer.status is None else f"{answer.status // 100}xx"
                ends[key] = ends.get(key, 0) + 1
                listener.after()
            alive = send(listener.url, request(listener, *listener.alive), listener.alive[0])
            words = said()
        if alive.status != 200:
            row.problems.append(f"a good request afterwards: {alive.status} {alive.problem} {alive.body[:200]!r}")
        if words:
            row.problems.append(f"on the terminal: {words[:3000]}")
        row.outcome = ", ".join(f"{number} {key}" for key, number in sorted(ends.items()))
        rows.append(row)
    return rows
