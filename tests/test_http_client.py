"""The HTTP client of engines and hub, before a server of real sockets that says what it is told to say; and the thread
of an engine's control calls."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
from fake_engine import FakeEngine

from astracli.engines.client import EngineClient
from astracli.engines.control import ControlThread
from astracli.process import intact
from astracli.process.http import Http, HttpError

Heard = tuple[asyncio.StreamReader, asyncio.StreamWriter]


async def against(serve: Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]], ask: Callable) -> int:
    """Run `ask(http)` before a server that calls `serve` for each connection. -> how many connections there were."""
    connections = 0

    async def one(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal connections
        connections += 1
        await serve(reader, writer)
        writer.close()

    server = await asyncio.start_server(one, "127.0.0.1", 0)
    http = Http(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}", "secret")
    try:
        await ask(http)
    finally:
        await http.close()
        server.close()
    return connections


async def read(reader: asyncio.StreamReader) -> tuple[str, bytes]:
    """(head, body) of a request; ("", b"") when there is none."""
    try:
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
    except asyncio.IncompleteReadError:
        return "", b""
    length = next((int(line.split(":")[1]) for line in head.split("\r\n") if line.startswith("content-length")), 0)
    return head, await reader.readexactly(length)


def plain(body: bytes, more: str = "") -> bytes:
    return f"HTTP/1.1 200 OK\r\nContent-Length: {len(body)}\r\n{more}\r\n".encode() + body


async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while (asked := await read(reader))[0]:
        writer.write(plain(asked[0].split(" ")[1].encode() + b" " + asked[1]))


def test_one_connection_serves_requests_one_after_the_other_and_each_of_many_at_once_has_its_own() -> None:
    async def ask(http: Http) -> None:
        for number in range(5):
            reply = await http.request("POST", f"/{number}", b"x" * number, timeout=5)
            assert (reply.status_code, reply.content) == (200, f"/{number} ".encode() + b"x" * number)

    async def ask_at_once(http: Http) -> None:
        for _ in range(2):
            replies = await asyncio.gather(*(http.request("POST", f"/{i}", b"", timeout=5) for i in range(300)))
            assert [reply.content for reply in replies] == [f"/{i} ".encode() for i in range(300)]

    assert asyncio.run(against(echo, ask)) == 1
    assert asyncio.run(against(echo, ask_at_once)) == 300


def test_the_token_goes_with_every_request() -> None:
    heads = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        heads.append((await read(reader))[0])
        writer.write(plain(b""))

    asyncio.run(against(serve, lambda http: http.request("GET", "/x", timeout=5)))
    assert heads[0].startswith("GET /x HTTP/1.1\r\n") and "authorization: Bearer secret\r\n" in heads[0]


@pytest.mark.parametrize(
    "answer",
    [
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n4;x=y\r\nd\r\ne\r\n0\r\nTrailer: 1\r\n\r\n",
        b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 OK\r\nconnection: close\r\n\r\nabcd\r\ne",
        b"HTTP/1.0 200 OK\r\ncontent-length: 7\r\n\r\nabcd\r\ne",
    ],
    ids=["chunked", "until it is closed", "HTTP/1.0"],
)
def test_a_body_is_read_to_its_end_however_that_is_told(answer: bytes) -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read(reader)
        writer.write(answer)
        await writer.drain()

    async def ask(http: Http) -> None:
        assert (await http.request("GET", "/", timeout=5)).content == b"abcd\r\ne"

    asyncio.run(against(serve, ask))


def test_a_stream_gives_whole_lines_whatever_the_pieces() -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read(reader)
        writer.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
        for piece in (b"data: {1", b"}\n", b"\ndata: {2}\r\nda", b"ta: {3}"):
            writer.write(f"{len(piece):x}\r\n".encode() + piece + b"\r\n")
            await writer.drain()
        writer.write(b"0\r\n\r\n")

    async def ask(http: Http) -> None:
        async with http.stream("POST", "/", b"{}") as streamed:
            assert streamed.status_code == 200
            assert [line async for line in streamed.lines()] == [b"data: {1}", b"", b"data: {2}", b"data: {3}"]

    asyncio.run(against(serve, ask))


def test_a_request_on_a_connection_that_the_server_had_closed_goes_out_again() -> None:
    asked = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """The first answer promises to keep the connection; the next request on it is not answered."""
        asked.append(await read(reader))
        writer.write(plain(b"first" if len(asked) == 1 else b"again"))
        if len(asked) == 1:
            await read(reader)

    async def ask(http: Http) -> None:
        assert (await http.request("POST", "/", b"1", timeout=5)).content == b"first"
        assert (await http.request("POST", "/", b"2", timeout=5)).content == b"again"

    assert asyncio.run(against(serve, ask)) == 2
    assert [body for _, body in asked] == [b"1", b"2"]


@pytest.mark.parametrize("answer", [b"", b"HTTP/1.1 200 OK\r\ncontent-length: 9\r\n\r\nabc", b"SSH-2.0\r\n\r\n"])
def test_what_breaks_off_on_a_new_connection_is_an_error_and_is_asked_once(answer: bytes) -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read(reader)
        writer.write(answer)

    async def ask(http: Http) -> None:
        with pytest.raises(HttpError):
            await http.request("POST", "/", b"", timeout=5)

    assert asyncio.run(against(serve, ask)) == 1


def test_who_gives_up_closes_the_connection_and_a_server_that_is_not_there_is_an_error() -> None:
    closed = asyncio.Event()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read(reader)
        assert not await reader.read(1)
        closed.set()

    async def ask(http: Http) -> None:
        with pytest.raises(TimeoutError):
            await http.request("POST", "/", b"", timeout=0.05)
        await asyncio.wait_for(closed.wait(), 5)

    assert asyncio.run(against(serve, ask)) == 1

    async def nobody() -> None:
        with pytest.raises(HttpError):
            await Http("http://127.0.0.1:9", "secret").request("GET", "/", timeout=5)

    asyncio.run(nobody())


def test_an_update_goes_through_while_the_callers_event_loop_stands_still(tmp_path: Path) -> None:
    engine = FakeEngine("secret", readbacks=True).start()
    seen = []

    async def go() -> None:
        async with EngineClient(engine.url, "secret") as client:
            await client.model_info()
            done = []
            task = asyncio.create_task(
                client.update(4, "in_place", flush=False, applied=lambda reply: done.append(reply.outcome["readback"]))
            )
            await asyncio.sleep(0)
            deadline = time.monotonic() + 20
            while engine.version != 4 or engine.paused:  # nothing else runs in this loop
                assert time.monotonic() < deadline
                time.sleep(0.001)
            reply = await task
            seen.extend([reply.success, 0 < reply.outcome["pause_s"] < 20, done])

    try:
        asyncio.run(go())
    finally:
        engine.stop()
    assert seen == [True, True, [True]]
    assert engine.events == ["pause in_place with 0 running", "applied 4"]


def test_an_update_that_fails_leaves_the_engine_paused_and_says_nothing_of_it() -> None:
    engine = FakeEngine("secret", refusals=1).start()

    async def go() -> None:
        async with EngineClient(engine.url, "secret") as client:
            reply = await client.update(4, "abort", flush=True, applied=lambda reply: pytest.fail("applied"))
            assert not reply.success and engine.paused

    try:
        asyncio.run(go())
    finally:
        engine.stop()


def test_a_call_that_is_cancelled_cleans_up_before_its_caller_goes_on() -> None:
    events: list[str] = []

    async def work() -> None:
        try:
            events.append("began")
            await asyncio.sleep(60)
        finally:
            await asyncio.sleep(0.01)
            events.append("cleaned up")

    async def go() -> None:
        control = ControlThread()
        task = asyncio.create_task(control.run(work()))
        while not events:
            await asyncio.sleep(0.001)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        events.append("caller")
        control.close()

    asyncio.run(go())
    assert events == ["began", "cleaned up", "caller"]


def test_an_engine_may_say_nan(tmp_path: Path) -> None:
    """json.dumps writes it, and strict readers refuse it."""
    meta = {"id": "a", "finish_reason": {"type": "stop"}, "weight_version": "2", "output_token_logprobs": []}
    meta |= {"output_token_logprobs": [[float("nan"), 5, None], [-0.5, 6, None]], "e2e_latency": 1.5}
    body = json.dumps([{"output_ids": [5, 6], "meta_info": meta}]).encode()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read(reader)
        writer.write(plain(body))

    async def ask(http: Http) -> None:
        from astracli.engines.contract import GenRequest

        async with EngineClient(f"http://127.0.0.1:{http.port}", "secret") as client:
            (result,) = await client.generate([GenRequest([1, 2], 5)])
        assert result.tokens.tolist() == [5, 6] and result.logprobs[1] == -0.5 and result.logprobs[0] != 0
        assert result.engine_s == 1.5

    asyncio.run(against(serve, ask))


@pytest.mark.parametrize("more", [f"{intact.HEADER}: 0123456789abcdef\r\n", f"{intact.REFUSED}: 1\r\n"])
def test_what_was_changed_on_its_way_is_an_error(more: str) -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head, body = await read(reader)
        assert f"{intact.HEADER}: {intact.digest(body)}\r\n" in head
        writer.write(plain(b"{}", more))

    async def ask(http: Http) -> None:
        with pytest.raises(HttpError, match="changed on its way"):
            await http.request("POST", "/", b"{}", timeout=5)

    asyncio.run(against(serve, ask))
