"""Decoding a staged payload while the engine still generates, so that the pause holds only applying and checking."""

from __future__ import annotations

import threading
from pathlib import Path

from astracli.errors import AstraError
from astracli.weights import staged

_POLL_S = 0.05


class StageWatcher:
    """A daemon thread that decodes whatever a stage directory announces, and keeps the newest."""

    def __init__(self, stage_dir: Path):
        self.stage_dir = stage_dir
        self._lock = threading.Lock()
        self._prepared: staged.Prepared | None = None
        self._seen: tuple[int, int] | None = None
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="stage", daemon=True)
        self._thread.start()

    def take(self) -> staged.Prepared | None:
        """The newest decoded plan, waiting for one that is being decoded. None: nothing usable is decoded yet.

        The caller must check that it is still the plan that is staged; `staged.apply` does.
        """
        with self._lock:
            prepared, self._prepared = self._prepared, None
            return prepared

    def close(self) -> None:
        self._closed.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._closed.wait(_POLL_S):
            try:
                status = (self.stage_dir / staged.NEXT).stat()
            except OSError:
                continue
            if self._seen == (status.st_ino, status.st_mtime_ns):
                continue
            self._seen = (status.st_ino, status.st_mtime_ns)
            with self._lock:
                try:
                    self._prepared = staged.prepare(self.stage_dir)
                except (AstraError, OSError, ValueError):
                    self._prepared = None  # applying it meets the same error and reports it
