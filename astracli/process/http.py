"""A small HTTP/1.1 client of one server, for thousands of requests at once.

Connections stay open and are taken last in, first out; a request opens one when none is free. There is no pool that is
searched and no limit: what a client costs for each request decides whether a fast engine is kept busy. It speaks plain
HTTP, signs and checks bodies (`intact`), follows no redirect and uses no proxy. A client belongs to one event loop.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass
from urllib.parse import urlsplit

from astracli.process import intact

IDLE_S = 4.0
"""A connection that has been idle for longer is not used again: servers close theirs after some seconds (uvicorn: 5),
and a request that meets this is lost."""
LARGEST_LINE = 1 << 26
"""Bytes of the longest line that `stream` yields: all tokens of a completion."""
CONNECT_S = 30.0


class HttpError(Exception):
    """The server cannot be reached, or its connection broke."""


class ConnectTimeout(HttpError, TimeoutError):
    """The server took no connection in time: it is there, and busy."""


@dataclass(frozen=True)
class Reply:
    status_code: int
    content: bytes
    media_type: str = ""

    @property
    def text(self) -> str:
        return self.content.decode("utf-8", "replace")


@dataclass(eq=False)
class _Connection:
    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter
    idle_since: float = 0.0

    @property
    def usable(self) -> bool:
        alive = not self.reader.at_eof() and not self.writer.is_closing()
        return alive and time.monotonic() - self.idle_since < IDLE_S


class Http:
    """`url`: `http://host:port`, perhaps with a path. Raises HttpError, and TimeoutError after `timeout` seconds."""

    def __init__(self, url: str, token: str):
        parts = urlsplit(url)
        self._host, self.port = parts.hostname or "127.0.0.1", parts.port or 80
        self._path = parts.path.rstrip("/")
        self._head = f"host: {parts.netloc}\r\nauthorization: Bearer {token}\r\naccept: */*\r\n"
        self._idle: deque[_Connection] = deque()

    async def request(self, method: str, path: str, body: bytes | None = None, *, timeout: float | None) -> Reply:
        async with asyncio.timeout(timeout), self._asked(method, path, body) as answer:
            return await answer.all()

    @asynccontextmanager
    async def stream(self, method: str, path: str, body: bytes) -> AsyncIterator[Streamed]:
        """An answer that comes in lines."""
        async with self._asked(method, path, body) as answer:
            yield Streamed(answer)

    @asynccontextmanager
    async def _asked(self, method: str, path: str, body: bytes | None) -> AsyncIterator[_Answer]:
        """A connection goes back when its answer has been read to the end; in any other case it is closed, by which the
        server knows that nobody waits."""
        connection, answer = await self._sent(method, path, body)
        try:
            yield answer
            if answer.reusable:
                connection.idle_since = time.monotonic()
                self._idle.append(connection)
                return
        except BaseException:
            connection.writer.transport.abort()
            raise
        connection.writer.close()

    async def _sent(self, method: str, path: str, body: bytes | None) -> tuple[_Connection, _Answer]:
        """Send a request and read the head of its answer. One that meets a connection that the server has closed
        meanwhile, as idle, goes out again."""
        while True:
            connection, used_before = self._unused(), True
            if connection is None:
                connection, used_before = await self._opened(), False
            answer = _Answer(connection.reader)
            try:
                with _told():
                    connection.writer.write(self._request(method, path, body))
                    await connection.writer.drain()
                    await answer.head(method)
                return connection, answer
            except HttpError as error:
                connection.writer.transport.abort()
                if not (used_before and isinstance(error, _NoAnswer)):
                    raise
            except BaseException:
                connection.writer.transport.abort()
                raise

    def _request(self, method: str, path: str, body: bytes | None) -> bytes:
        kind = f"{intact.HEADER}: {intact.digest(body or b'')}\r\n"
        if body is not None:
            kind += f"content-type: application/json\r\ncontent-length: {len(body)}\r\n"
        return f"{method} {self._path}{path} HTTP/1.1\r\n{self._head}{kind}\r\n".encode() + (body or b"")

    def _unused(self) -> _Connection | None:
        while self._idle:
            connection = self._idle.pop()
            if connection.usable:
                return connection
            connection.writer.close()
        return None

    async def _opened(self) -> _Connection:
        try:
            async with asyncio.timeout(CONNECT_S):
                return _Connection(*await asyncio.open_connection(self._host, self.port, limit=LARGEST_LINE))
        except TimeoutError as error:
            raise ConnectTimeout(f"no connection within {CONNECT_S:g} s") from error
        except OSError as error:
            raise HttpError(str(error) or type(error).__name__) from error

    async def close(self) -> None:
        while self._idle:
            writer = self._idle.pop().writer
            writer.close()
            with suppress(OSError):
                await writer.wait_closed()


class _NoAnswer(HttpError):
    """The connection was closed before the first byte of an answer."""


@contextmanager
def _told() -> Iterator[None]:
    """What goes wrong with a connection is an HttpError."""
    try:
        yield
    except (OSError, EOFError, ValueError, asyncio.LimitOverrunError) as error:
        nothing = isinstance(error, ConnectionError) or (
            isinstance(error, asyncio.IncompleteReadError) and not error.partial
        )
        raise (_NoAnswer if nothing else HttpError)(str(error) or "the connection was closed") from error


class _Answer:
    """Status, headers and body of an answer, as they are read."""

    def __init__(self, reader: asyncio.StreamReader):
        self._reader = reader
        self.status = 0
        self._headers: dict[str, str] = {}
        self._length: int | None = 0
        """Bytes of the body; None: until the connection is closed."""
        self._chunked = self._kept = self._read = False

    @property
    def reusable(self) -> bool:
        return self._read and self._kept

    async def head(self, method: str) -> None:
        """Read status and headers. Raises ValueError for what is no HTTP."""
        while self.status < 200:  # 100 Continue and its like
            lines = (await self._reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
            protocol, status, *_ = lines[0].split(" ")
            if not protocol.startswith("HTTP/1."):
                raise ValueError(f"no HTTP: {lines[0][:60]!r}")
            self.status = int(status)
        headers = self._headers
        for line in filter(None, lines[1:]):
            name, _, value = line.partition(":")
            headers[name.strip().lower()] = value.strip()
        self._kept = headers.get("connection", "").lower() != "close" and protocol != "HTTP/1.0"
        self._chunked = "chunked" in headers.get("transfer-encoding", "").lower()
        length = headers.get("content-length")
        self._length = int(length) if length is not None else None
        if self.status in (204, 304) or method == "HEAD":
            self._chunked, self._length = False, 0

    async def all(self) -> Reply:
        """Raises HttpError when request or answer were changed on their way."""
        content = b"".join([part async for part in self.parts()])
        if intact.REFUSED in self._headers:
            raise HttpError(f"the request: {intact.WORDS}")
        if intact.damaged(content, self._headers.get(intact.HEADER)):
            raise HttpError(f"the answer: {intact.WORDS}")
        return Reply(self.status, content, self._headers.get("content-type", ""))

    async def parts(self) -> AsyncIterator[bytes]:
        """The body."""
        with _told():
            if self._chunked:
                while size := int((await self._reader.readuntil(b"\r\n")).split(b";")[0], 16):
                    yield (await self._reader.readexactly(size + 2))[:-2]
                while await self._reader.readuntil(b"\r\n") != b"\r\n":
                    pass  # trailers
            elif self._length is not None:
                yield await self._reader.readexactly(self._length)
            else:
                self._kept = False
                while part := await self._reader.read(1 << 16):
                    yield part
        self._read = True


@dataclass
class Streamed:
    """An answer as it comes."""

    _answer: _Answer

    @property
    def status_code(self) -> int:
        return self._answer.status

    async def read(self) -> Reply:
        return await self._answer.all()

    async def lines(self) -> AsyncIterator[bytes]:
        """Lines without their end."""
        held: list[bytes] = []
        async for part in self._answer.parts():
            *ended, rest = part.split(b"\n")
            for line in ended:
                yield (b"".join([*held, line])).rstrip(b"\r")
                held = []
            if rest:
                held.append(rest)
        if held:
            yield b"".join(held)
