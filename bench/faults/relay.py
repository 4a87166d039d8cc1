"""A relay between the processes of a run: what passes can be slow, cut off, held back, refused, or wrong by a byte."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

CHUNK = 16 << 10


@dataclass
class Weather:
    """What the relay does to what passes. May change at any time."""

    delay_s: float = 0.0
    """Before each chunk is passed on."""
    bytes_per_s: float = 0.0
    """0: as fast as it goes."""
    refuse: bool = False
    """New connections are closed at once."""
    hold: bool = False
    """Nothing passes."""
    flip_every: int = 0
    """One byte is changed somewhere in so many, on average; 0: none."""


@dataclass
class Relay:
    """Listens until `close`. `folder`: where connections say where they want to go (`hook/sitecustomize.py`)."""

    folder: Path
    draw: Random
    weather: Weather = field(default_factory=Weather)
    target: int | None = None
    """A port of this machine to which everything goes; None: as each connection says."""
    flips: list[str] = field(default_factory=list)
    """What was changed: to or from which port, and the bytes around it."""

    def __post_init__(self) -> None:
        self.folder.mkdir(parents=True)
        self._socket = socket.create_server(("127.0.0.1", 0), backlog=512)
        self.port: int = self._socket.getsockname()[1]
        self._open: set[socket.socket] = set()
        self._lock = threading.Lock()
        self._left = 0
        (self.folder / "port").write_text(str(self.port))
        threading.Thread(target=self._serve, daemon=True).start()

    def cut(self) -> int:
        """End every connection that there is. -> how many"""
        with self._lock:
            for sock in self._open:
                with suppress(OSError):
                    sock.shutdown(socket.SHUT_RDWR)
            return len(self._open) // 2

    def close(self) -> None:
        self._socket.close()
        self.cut()

    def _serve(self) -> None:
        while True:
            try:
                near, address = self._socket.accept()
            except OSError:
                return
            threading.Thread(target=self._join, args=(near, address[1]), daemon=True).start()

    def _join(self, near: socket.socket, source: int) -> None:
        target = self.folder / str(source)
        with near, socket.socket() as far:
            if self.weather.refuse:
                return
            try:
                port = self.target
                if port is None:
                    port = int(target.read_text())
                    target.unlink()
                far.connect(("127.0.0.1", port))
            except (OSError, ValueError):
                return
            for sock in (near, far):
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            with self._lock:
                self._open |= {near, far}
            back = threading.Thread(target=self._pump, args=(far, near, f"from {port}"), daemon=True)
            back.start()
            self._pump(near, far, f"to {port}")
            back.join()
            with self._lock:
                self._open -= {near, far}

    def _pump(self, source: socket.socket, sink: socket.socket, way: str) -> None:
        with suppress(OSError):
            while data := source.recv(CHUNK):
                self._wait(lambda: self.weather.hold)
                if pause := self.weather.delay_s + len(data) / (self.weather.bytes_per_s or float("inf")):
                    time.sleep(pause)
                sink.sendall(self._damaged(data, way))
        with suppress(OSError):
            sink.shutdown(socket.SHUT_WR)

    def _wait(self, what: Callable[[], bool]) -> None:
        while what():
            time.sleep(0.02)

    def _damaged(self, data: bytes, way: str) -> bytes:
        """`data`, with one byte changed when it is this chunk's turn."""
        if not self.weather.flip_every:
            return data
        with self._lock:
            if not self._left:
                self._left = self.draw.randint(1, 2 * self.weather.flip_every)
            self._left -= len(data)
            if self._left > 0:
                return data
            self._left = 0
            place, change = self.draw.randrange(len(data)), self.draw.randrange(1, 256)
        wrong = bytearray(data)
        wrong[place] ^= change
        around = data[max(0, place - 40) : place + 10]
        self.flips.append(f"{way}, byte {place} of {len(data)}: {around!r}")
        return bytes(wrong)
