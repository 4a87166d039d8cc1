"""The second check of an update, beside generation: the weights are read back under HF names, and their digests must
be the trainer's. Imports what the loader inside an engine may import, and nothing more."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from astracli.weights.format.manifest import TensorEntry
from astracli.weights.receive import apply


class Readback:
    """One read-back at a time, in a thread; its outcome is `readback.json` in the stage directory."""

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None

    def start(
        self,
        stage_dir: Path,
        entries: Sequence[TensorEntry],
        version: int,
        *,
        read: Callable[[dict[str, float]], Mapping[str, str]],
        failed: Callable[[str], object],
    ) -> None:
        """Begin that of `version`, whose manifest has `entries`.

        `read(spent)` returns {HF name: digest} of what the engine holds, and may put seconds into `spent`.
        `failed(message)` is called when these are other weights, before the outcome is written.
        """
        begun = time.perf_counter()

        def run() -> None:
            spent: dict[str, float] = {}
            message = ""
            try:
                found = read(spent)
                if wrong := [entry.name for entry in entries if found[entry.name] != entry.digest]:
                    message = f"read back under HF names, {len(wrong)} tensors differ: {', '.join(wrong[:5])}"
            except Exception as error:  # whoever waits for the read-back would wait in vain
                message = f"the read-back failed: {type(error).__name__}: {error}"
            if message:
                failed(message)
            outcome = {"version": version, "ok": not message, "message": message, **spent}
            apply.write_readback(stage_dir, {**outcome, "readback_s": time.perf_counter() - begun})

        self._thread = threading.Thread(target=run, name="read-back", daemon=True)
        self._thread.start()

    def settle(self) -> None:
        """Until no read-back is under way: it must see the weights of one version."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
