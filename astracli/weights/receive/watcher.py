"""Decoding a staged payload while the engine still generates, so that the pause holds only applying and checking.

`watching.json` in the stage directory tells the subscriber how far it is: `{"pid", "plan", "ok", "seconds"}`, `plan`
being the xxh3-64 of the `next.json` that was decoded last.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import xxhash

from astracli.errors import AstraError
from astracli.process.atomic import write_atomic
from astracli.weights.receive import reading

WATCHING = "watching.json"
_POLL_S = 0.02


class StageWatcher:
    """A daemon thread that decodes whatever a stage directory announces, and keeps the newest.

    `then` takes over what was decoded, in the same thread: an engine on a GPU brings it to the device. `first` is what
    the thread does before anything else, `prepare` what decodes.
    """

    def __init__(
        self,
        stage_dir: Path,
        then: Callable[[reading.Prepared], None] = lambda prepared: None,
        first: Callable[[], None] = lambda: None,
        prepare: Callable[[Path], reading.Prepared] = reading.prepare,
    ):
        self.stage_dir = stage_dir
        self._then, self._first, self._prepare = then, first, prepare
        self._lock = threading.Lock()
        self.prepared: reading.Prepared | None = None
        self._seen: tuple[int, int] | None = None
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="stage", daemon=True)
        self._thread.start()

    def take(self) -> reading.Prepared | None:
        """The newest decoded plan, waiting for one that is being decoded. None: nothing usable is decoded yet.

        The caller must check that it is still the plan that is staged; `apply.current` does.
        """
        with self._lock:
            prepared, self.prepared = self.prepared, None
            return prepared

    def close(self) -> None:
        self._closed.set()
        self._thread.join()
        (self.stage_dir / WATCHING).unlink(missing_ok=True)

    def _watch(self) -> None:
        self._say("", True, 0.0)
        try:
            self._first()
        except Exception as error:  # what is not ready now will be made, or fail and be reported, in the pause
            print(f"warning: preparing for weight updates: {error!r}", file=sys.stderr, flush=True)
        while not self._closed.wait(_POLL_S):
            try:
                status = (self.stage_dir / reading.NEXT).stat()
            except OSError:
                continue
            if self._seen == (status.st_ino, status.st_mtime_ns):
                continue
            self._seen = (status.st_ino, status.st_mtime_ns)
            begin, plan = time.perf_counter(), b""
            with self._lock:
                self.prepared = None  # room for the next
                try:
                    plan = (self.stage_dir / reading.NEXT).read_bytes()
                    prepared = self._prepare(self.stage_dir)
                    self._then(prepared)
                    self.prepared = prepared
                except (AstraError, OSError):
                    pass  # applying it meets the same error and reports it
                except Exception as error:  # the same; a thread that ended would make every later version wait for it
                    print(f"warning: decoding ahead: {error!r}", file=sys.stderr, flush=True)
            self._say(plan_hash(plan), self.prepared is not None, time.perf_counter() - begin)

    def _say(self, plan: str, ok: bool, seconds: float) -> None:
        doc = {"pid": os.getpid(), "plan": plan, "ok": ok, "seconds": seconds}
        with contextlib.suppress(OSError):  # the directory is gone: the run is over
            write_atomic(self.stage_dir / WATCHING, json.dumps(doc).encode())


def plan_hash(plan: bytes) -> str:
    digest: str = xxhash.xxh3_64_hexdigest(plan)
    return digest


def watched(stage_dir: Path) -> bool:
    """Whether an engine's watcher is alive."""
    return _said(stage_dir) is not None


def decoded(stage_dir: Path, plan: bytes) -> float | None:
    """Seconds that the engine's watcher took for `plan`; None while it is at it. 0 when nobody watches."""
    doc = _said(stage_dir)
    if doc is None:
        return 0.0
    return float(doc["seconds"]) if doc["plan"] == plan_hash(plan) else None


def _said(stage_dir: Path) -> dict[str, Any] | None:
    """What a living watcher wrote last."""
    try:
        doc: dict[str, Any] = json.loads((stage_dir / WATCHING).read_bytes())
        os.kill(int(doc["pid"]), 0)
    except (OSError, ValueError, KeyError):
        return None
    return doc
