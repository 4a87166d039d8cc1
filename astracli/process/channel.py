"""Documents and file descriptors between a process and its child, over one socket pair."""

from __future__ import annotations

import json
import os
import select
import socket
import struct
import subprocess
import sys
from typing import Any

_LENGTH = struct.Struct("<Q")


def child(module: str, *arguments: str) -> tuple[subprocess.Popen[bytes], socket.socket]:
    """Start `python -m MODULE SOCKET_FD ARGUMENTS`: the child, which ends when the socket is closed, and our end."""
    ours, theirs = socket.socketpair()
    command = [sys.executable, "-m", module, str(theirs.fileno()), *arguments]
    # idle threads, beside which nobody forks; and nothing is imported from the working directory
    env = os.environ | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "PYTHONSAFEPATH": "1"}
    with theirs:
        return subprocess.Popen(command, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL, env=env), ours


def send(channel: socket.socket, doc: dict[str, Any], *handles: int | None) -> None:
    blob = json.dumps(doc).encode()
    socket.send_fds(channel, [_LENGTH.pack(len(blob))], [handle for handle in handles if handle is not None])
    channel.sendall(blob)


def readable(channel: socket.socket, wait_s: float = 0.0) -> bool:
    """Something can be received, or the other side is gone; waits up to `wait_s` for it."""
    ready = select.poll()
    ready.register(channel, select.POLLIN)
    return bool(ready.poll(1000 * wait_s))


def receive(channel: socket.socket) -> tuple[dict[str, Any], int | None]:
    """A document that comes with one descriptor or none. Raises ConnectionError when the other side is gone."""
    doc, handles = receive_many(channel, 1)
    return doc, handles[0] if handles else None


def receive_many(channel: socket.socket, most: int = 16) -> tuple[dict[str, Any], list[int]]:
    """Raises ConnectionError when the other side is gone."""
    head, handles, _, _ = socket.recv_fds(channel, _LENGTH.size, most)
    head += _exactly(channel, _LENGTH.size - len(head)) if head else b""
    if not head:
        raise ConnectionError("the other side has closed")
    doc: dict[str, Any] = json.loads(_exactly(channel, _LENGTH.unpack(head)[0]))
    return doc, handles


def _exactly(channel: socket.socket, size: int) -> bytes:
    found = bytearray()
    while len(found) < size:
        chunk = channel.recv(min(1 << 20, size - len(found)))
        if not chunk:
            raise ConnectionError("the other side has closed")
        found += chunk
    return bytes(found)
