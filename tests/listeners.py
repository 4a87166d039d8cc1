"""Where processes listen, as the kernel says: /proc/PID/fd against /proc/PID/net/tcp."""

from __future__ import annotations

import ipaddress
import os
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

LISTEN = "0A"


def listening(pids: Iterable[int]) -> list[tuple[str, int]]:
    """(address, port) of every TCP socket on which one of the processes listens, in its own network namespace."""
    found = []
    for pid in pids:
        own = _open(pid)
        for line in (line for table in ("tcp", "tcp6") for line in _lines(Path(f"/proc/{pid}/net/{table}"))):
            fields = line.split()
            if fields[3] == LISTEN and f"socket:[{fields[9]}]" in own:
                address, port = fields[1].split(":")
                found.append((_address(address), int(port, 16)))
    return found


def _lines(table: Path) -> list[str]:
    try:
        return table.read_text().splitlines()[1:]
    except OSError:  # the process has ended
        return []


def beyond_loopback(pids: Iterable[int]) -> list[tuple[str, int]]:
    return [(address, port) for address, port in listening(pids) if not ipaddress.ip_address(address).is_loopback]


def _open(pid: int) -> set[str]:
    """What its descriptors are, `socket:[INODE]`."""
    found = set()
    with suppress(OSError):
        for fd in Path(f"/proc/{pid}/fd").iterdir():
            with suppress(OSError):
                found.add(os.readlink(fd))
    return found


def _address(text: str) -> str:
    """The kernel prints words of four bytes, each in the machine's own order."""
    words = [bytes.fromhex(text[i : i + 8])[::-1] for i in range(0, len(text), 8)]
    return str(ipaddress.ip_address(b"".join(words)))
