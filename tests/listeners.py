"""Where processes listen, as the kernel says: /proc/PID/fd against /proc/net/tcp. For tests; also `python listeners.py`
in a child that has just joined."""

from __future__ import annotations

import ipaddress
import os
from collections.abc import Iterable
from pathlib import Path

LISTEN = "0A"


def listening(pids: Iterable[int]) -> list[tuple[str, int]]:
    """(address, port) of every TCP socket on which one of the processes listens."""
    own = {os.readlink(fd) for pid in pids for fd in _open(pid)}
    found = []
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == LISTEN and f"socket:[{fields[9]}]" in own:
                address, port = fields[1].split(":")
                found.append((_address(address), int(port, 16)))
    return found


def beyond_loopback(pids: Iterable[int]) -> list[tuple[str, int]]:
    return [(address, port) for address, port in listening(pids) if not ipaddress.ip_address(address).is_loopback]


def _open(pid: int) -> list[str]:
    try:
        return [str(fd) for fd in Path(f"/proc/{pid}/fd").iterdir() if fd.is_symlink() and _socket(fd)]
    except OSError:
        return []


def _socket(fd: Path) -> bool:
    try:
        return os.readlink(fd).startswith("socket:")
    except OSError:
        return False


def _address(text: str) -> str:
    """The kernel prints words of four bytes, each in the machine's own order."""
    words = [bytes.fromhex(text[i : i + 8])[::-1] for i in range(0, len(text), 8)]
    return str(ipaddress.ip_address(b"".join(words)))
