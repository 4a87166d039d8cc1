"""Fetches files of published versions: over HTTP, or by a hard link from the publisher's disk.

Downloads resume: what arrived stays in a `.part` file and the rest is asked for by range. A large file comes in pieces
over several connections: one alone does not fill a link of long delay. When publisher and receiver share a disk, a
large file is linked instead, or copied by the kernel. Either way the caller checks what it got.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import shutil
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx

from astracli.errors import RunFailed, disk_failed
from astracli.weights import WeightCorrupt
from astracli.weights.format.manifest import NONCE, version_name

_READ = 1 << 18
"""Bytes asked of the socket at a time."""
PIECES_FROM, PIECE, CONNECTIONS = 64 << 20, 16 << 20, 4
"""A file of so many bytes comes in pieces of so many, over so many connections."""
_TIMEOUT_S = 30.0
"""For a connection, and for the next bytes of an answer."""


class Gone(Exception):
    """The server has no such file: pruned, or never published."""


class _Again(Exception):
    """An answer that may be another one next time."""


_PASSING = (httpx.TransportError, http.client.HTTPException, OSError, _Again)


@dataclass
class Downloader:
    """Requests to one server of versions, with the run's token."""

    url: str
    token: str
    retries: int
    """Connection errors in a row without a new byte."""
    link_bytes: int | None
    """A file of so many bytes or more is taken from the publisher's own disk where that is this one; None: never."""
    downloaded: int = 0
    """Bytes that came over the network."""
    linked: int = 0
    """Bytes that did not have to."""
    _store: Path | None = field(default=None, init=False, repr=False)
    _client: httpx.Client = field(init=False, repr=False)
    _lock: threading.Lock = field(default_factory=threading.Lock, init=False, repr=False)

    def __post_init__(self) -> None:
        self._client = httpx.Client(headers=self._headers(), timeout=_TIMEOUT_S, trust_env=False, follow_redirects=True)

    def close(self) -> None:
        self._client.close()

    def _headers(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {self.token}"}

    def listing(self) -> dict[int, dict[str, Any]]:
        """Version -> {kind: {"file", "base_version", "bytes", "xxh3"}} of all that are published."""
        reply = self.get(f"{self.url}/weights").json()
        self._store = _shared(reply.get("store"))
        return {int(version): kinds for version, kinds in reply["detail"].items()}

    def address(self, version: int, name: str) -> str:
        return f"{self.url}/weights/{version}/{name}"

    def get(self, url: str) -> httpx.Response:
        """A small answer. Raises RunFailed or `Gone`."""
        failures = 0
        while True:
            try:
                reply = self._client.get(url)
                _raise_for(reply.status_code, url)
                return reply
            except _PASSING as error:
                failures += 1
                if failures > self.retries:
                    raise RunFailed(f"cannot reach `{url}`: {error!r}, {failures} times in a row") from error
                time.sleep(min(0.05 * 2**failures, 2.0))

    # ---- from the same disk ----

    def link(self, version: int, name: str, size: int, path: Path) -> bool:
        """Whether a large file could be had without the network. A link outlives the publisher's own name for it; the
        publisher never writes to a file that has its final name."""
        if self._store is None or self.link_bytes is None or size < self.link_bytes:
            return False
        source, part = self._store / version_name(version) / name, path.with_name(f"{path.name}.link")
        part.unlink(missing_ok=True)
        for way in (os.link, shutil.copyfile):  # a stage on another file system is still cheaper to copy to
            try:
                way(source, part)
            except OSError:
                with contextlib.suppress(OSError):
                    part.unlink(missing_ok=True)
                continue
            os.replace(part, path)
            self.linked += size
            return True
        return False

    # ---- over the network ----

    def fetch(self, version: int, name: str, size: int, path: Path) -> None:
        """A whole file. What an earlier attempt left in its `.part` file stays; the rest is asked for by range."""
        url, part = self.address(version, name), path.with_name(f"{path.name}.part")
        try:
            if size >= PIECES_FROM:
                self._in_pieces(url, part, size)
            else:
                if _size(part) > size:
                    part.unlink()
                with open(part, "ab", buffering=0) as file:
                    self._stretch(url, file.write, _size(part), size)
        except WeightCorrupt:
            part.unlink(missing_ok=True)
            raise
        os.replace(part, path)

    def _in_pieces(self, url: str, part: Path, size: int) -> None:
        """Into a file of the whole size from the start; which pieces are there stands in a file beside it."""
        note = part.with_name(f"{part.name}.pieces")
        there = _noted(note) if _size(part) == size else set()
        todo = deque(low for low in range(0, size, PIECE) if low not in there)
        failed: list[Exception] = []

        def work() -> None:
            while todo and not failed:
                with contextlib.suppress(IndexError):  # another one took the last
                    low = todo.popleft()
                    at = [low]

                    def put(data: bytes, at: list[int] = at) -> None:
                        at[0] += os.pwrite(file.fileno(), data, at[0])

                    try:
                        self._stretch(url, put, low, min(low + PIECE, size))
                    except Exception as error:
                        failed.append(error)
                        return
                    there.add(low)

        with open(part, "r+b" if there else "wb") as file:
            file.truncate(size)
            threads = [threading.Thread(target=work, name="piece", daemon=True) for _ in range(CONNECTIONS)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        if failed:
            with contextlib.suppress(OSError):
                note.write_text(json.dumps(sorted(there)))
            raise failed[0]
        note.unlink(missing_ok=True)

    def _stretch(self, url: str, put: Callable[[bytes], Any], low: int, high: int) -> None:
        """The bytes from `low` to `high`, in their order to `put`; what breaks off goes on where it did."""
        at, failures = low, 0

        def taken(data: bytes) -> None:
            nonlocal at
            put(data)
            at += len(data)
            with self._lock:
                self.downloaded += len(data)

        while at < high:
            before = at
            try:
                self.stream(url, taken, at, high)
            except _PASSING as error:
                if (failed := disk_failed(error)) is not None:
                    raise failed from error
                failures = 1 if at > before else failures + 1
                if failures > self.retries:
                    raise RunFailed(f"cannot fetch `{url}`: {error!r}, {failures} times in a row") from error
                time.sleep(min(0.05 * 2**failures, 2.0))

    def stream(self, url: str, put: Callable[[bytes], Any], low: int, high: int) -> None:
        """By the standard library's client, which reads a socket three times as fast as the one for small answers."""
        where = urlsplit(url)
        secure = where.scheme == "https"
        kind = http.client.HTTPSConnection if secure else http.client.HTTPConnection
        with contextlib.closing(kind(where.hostname or "", where.port, timeout=_TIMEOUT_S)) as connection:
            connection.request("GET", where.path, headers=self._headers() | {"Range": f"bytes={low}-{high - 1}"})
            reply = connection.getresponse()
            _raise_for(reply.status, url)
            if reply.status != 206:
                raise RunFailed(f"`{url}` answered {reply.status} to a range request", "a proxy in between?")
            if not (reply.getheader("content-range") or "").startswith(f"bytes {low}-{high - 1}/"):
                raise WeightCorrupt(f"`{url}` answered range `{reply.getheader('content-range')}`")
            left = high - low
            while left and (chunk := reply.read1(_READ)):  # as it comes: it stays when the line breaks
                put(chunk)
                left -= len(chunk)
        if left:
            raise _Again(f"the connection ended {left} bytes early")


def _noted(note: Path) -> set[int]:
    """Where the pieces begin that an earlier attempt brought."""
    try:
        return {int(low) for low in json.loads(note.read_text())}
    except (OSError, ValueError, TypeError):
        return set()


def _size(file: Path) -> int:
    return file.stat().st_size if file.exists() else 0


def _shared(store: Any) -> Path | None:
    """The publisher's directory, when it is the same one here: the server's answer, which needed the token, names a
    random text that stands there in a file."""
    try:
        directory = Path(store["directory"])
        same = (directory / NONCE).read_text() == store["nonce"] != ""
    except (OSError, KeyError, TypeError, ValueError):
        return None
    return directory if same else None


def _raise_for(code: int, url: str) -> None:
    """401 and other refusals end the fetch, 404 means gone, 416 a file that changed, 5xx may be tried again."""
    if code == 401:
        raise RunFailed(f"`{url}` refuses the token", "engine and hub must belong to the same run")
    if code == 404:
        raise Gone(url)
    if code == 416:
        raise WeightCorrupt(f"`{url}` is shorter than its manifest says")
    if code >= 500:
        raise _Again(f"`{url}` answered {code}")
    if code >= 400:
        raise RunFailed(f"`{url}` answered {code}")
