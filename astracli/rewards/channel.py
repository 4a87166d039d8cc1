"""Frames between a grading process and its owner: every wait has a limit, every frame a size.

A frame is its length (4 bytes, big endian) and its bytes. The owner sends pickles, since a row may hold anything that
Python has; what comes back is msgpack, because a reward may write to every descriptor of its process: it is read as
data and checked, and a frame that is none ends the process.
"""

from __future__ import annotations

import pickle
import select
import socket
import struct
import time
from typing import Any

import msgpack

REPLY_BYTES = 1 << 20
"""The largest frame that a grading process may send. A grade with its traceback is a few kilobytes."""
_HEAD = struct.Struct(">I")
_REQUEST_BYTES = 1 << 30
_HELD_BYTES = 200
"""Of short frames, about ten: the owner reads them while the next are made."""


class GarbledError(Exception):
    """What came is no frame of a grading process."""


class OwnerEnd:
    """The owner's end of a connected socket. Used by one thread at a time."""

    def __init__(self, sock: socket.socket):
        self._socket = sock
        sock.setblocking(False)
        self.fileno = sock.fileno()
        self._read = bytearray()

    def close(self) -> None:
        self._socket.close()

    def send(self, document: Any, limit_s: float) -> None:
        """Raises TimeoutError when the other side has not taken it after so many seconds, OSError when it is gone."""
        data = pickle.dumps(document, pickle.HIGHEST_PROTOCOL)
        if len(data) > _REQUEST_BYTES:
            raise ValueError(f"{len(data)} bytes to grade at once, at most {_REQUEST_BYTES}")
        rest, deadline = memoryview(_HEAD.pack(len(data)) + data), time.monotonic() + limit_s
        while rest:
            try:
                rest = rest[self._socket.send(rest) :]
            except BlockingIOError:
                self._await(write=True, deadline=deadline)

    def waiting(self) -> bool:
        """Whether a whole frame lies here already."""
        return len(self._read) >= 4 and len(self._read) >= 4 + self._length()

    def receive(self, limit_s: float) -> Any:
        """The next frame. Raises TimeoutError after `limit_s` seconds, EOFError when the process has closed its end,
        GarbledError."""
        deadline = time.monotonic() + limit_s
        while not self.waiting():
            try:
                chunk = self._socket.recv(1 << 16)
            except BlockingIOError:
                self._await(write=False, deadline=deadline)
                continue
            except OSError:
                chunk = b""
            if not chunk:
                raise EOFError
            self._read += chunk
        end = 4 + self._length()
        payload = bytes(self._read[4:end])
        del self._read[:end]
        try:
            return msgpack.unpackb(payload, unicode_errors="surrogatepass")
        except (ValueError, TypeError, RecursionError, msgpack.exceptions.UnpackException):
            raise GarbledError("it wrote something that is no grade to its owner's socket") from None

    def _length(self) -> int:
        length = int(_HEAD.unpack_from(self._read)[0])
        if length > REPLY_BYTES:
            raise GarbledError("it wrote something that is no grade to its owner's socket")
        return length

    def _await(self, *, write: bool, deadline: float) -> None:
        left = deadline - time.monotonic()
        poll = select.poll()
        poll.register(self.fileno, select.POLLOUT if write else select.POLLIN)
        if left <= 0 or not poll.poll(1000 * left):
            raise TimeoutError


class WorkerEnd:
    """The grading process's end: it may wait for its owner, whose death ends it."""

    def __init__(self, fd: int):
        self._socket = socket.socket(fileno=fd)
        self.fileno = fd
        self._held = bytearray()

    def send(self, frame: Any) -> None:
        self.hold(frame)
        self.flush()

    def hold(self, frame: Any) -> None:
        """To be sent with the next `flush`: before anything that may take long or never end."""
        data = msgpack.packb(frame, unicode_errors="surrogatepass")
        self._held += _HEAD.pack(len(data)) + data
        if len(self._held) > _HELD_BYTES:
            self.flush()

    def flush(self) -> None:
        held, self._held = self._held, bytearray()
        self._socket.sendall(held)

    def receive(self) -> Any:
        """The next document. Raises EOFError when the owner has closed its end."""
        (length,) = _HEAD.unpack(self._exactly(4))
        return pickle.loads(self._exactly(length))

    def _exactly(self, count: int) -> bytearray:
        data = bytearray(count)
        view, there = memoryview(data), 0
        while there < count:
            got = self._socket.recv_into(view[there:])
            if not got:
                raise EOFError
            there += got
        return data
