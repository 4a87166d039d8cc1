"""Weight loader that runs inside a foreign engine's process, which calls `apply_staged` and `settle`.

The engine's own `load_weights` knows how HF tensors are fused and where each part goes. It is run once with tensors
whose content nobody reads, while `copy_` and slice assignment are intercepted (`placement.py`): that yields, for every
HF tensor, the parameter memory that holds it. From then on a version is a scatter into that memory, and a read-back is
one pass of digests over it. Before each the model is asked where its parameters lie; when one has moved or was
replaced, the mapping is recorded anew.

The process reads these environment variables, set by whoever starts the engine: ASTRA_STAGE_DIR (where versions are
staged), ASTRA_START_VERSION (what the engine was started with, default 0; empty for random weights),
ASTRA_VERIFY_INTERVAL (read back under HF names every n-th version, default 0 = never), ASTRA_STAGING (what a full
version waits in: `gpu`, `host`, `file`; default host), ASTRA_STAGING_KEPT (1: that memory is kept for the next one).
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import time
import weakref
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch

from astracli.engines.readback import Readback
from astracli.errors import AstraError
from astracli.weights import WeightMismatch
from astracli.weights.format.manifest import TensorEntry
from astracli.weights.receive import apply
from astracli.weights.receive.decoder import DecoderProcess
from astracli.weights.receive.placement import PlacementRecorder
from astracli.weights.receive.reading import READBACK, RESULT, Prepared, prepare
from astracli.weights.receive.resident import Resident
from astracli.weights.receive.staging import Staging, beside
from astracli.weights.receive.watcher import StageWatcher

_SWITCH_S = 2e-4
"""How long the scheduler may hold the interpreter while one of our threads wants it a hundred times: Python's 5 ms each
became seconds."""


class _Quick:
    """Within it the interpreter changes resident every 0.2 ms; in any number of threads at once."""

    def __init__(self) -> None:
        self._lock, self._inside, self._before = threading.Lock(), 0, 0.0

    def __enter__(self) -> None:
        with self._lock:
            if not self._inside:
                self._before = sys.getswitchinterval()
                sys.setswitchinterval(_SWITCH_S)
            self._inside += 1

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._inside -= 1
            if not self._inside:
                sys.setswitchinterval(self._before)


quickly = _Quick()


class LoadedModel:
    """What this process knows of one model: its version, where its weights lie, and the thread that decodes ahead."""

    def __init__(self, model: Any, stage_dir: Path):
        start = os.environ.get("ASTRA_START_VERSION", "0")
        self.version: int | None = int(start) if start else None
        self._model = weakref.ref(model)
        self._device = next((p.device for p in model.parameters()), torch.device("cpu"))
        self._stream = torch.cuda.Stream(self._device) if self._device.type == "cuda" else None
        self._readback = Readback()
        self._lock = threading.Lock()
        self._resident: Resident | None = None
        self._known: tuple[Any, ...] = ()
        where: Any = os.environ.get("ASTRA_STAGING", "host")
        kept = os.environ.get("ASTRA_STAGING_KEPT") == "1"
        self.staging = Staging(where, self._device, kept=kept)
        self.decoder = DecoderProcess()
        self.watcher = StageWatcher(stage_dir, self.load, self.warm, self.decoder.prepare)

    # ---- before the pause ----

    def warm(self) -> None:
        """Start the decoder, compile what the first pause needs."""
        self.decoder.start()
        if self._stream is not None:
            from astracli.weights.device import scatter_kernels

            with beside(self._device, self._stream):
                scatter_kernels.warm(self._device)

    def load(self, prepared: Prepared) -> None:
        """Bring a decoded version to the device, or as near as there is room; for the first one, find out where the
        weights lie."""
        if prepared.manifests:
            resident = self.place(prepared.manifests[-1].tensors)
            resident.load(prepared)
            with quickly:
                resident.stage(prepared, self.staging)

    # ---- in the pause ----

    def place(self, entries: Sequence[TensorEntry]) -> Resident:
        """Where the model keeps `entries` now, with the tables for their digests. Recorded for other names, dtypes or
        shapes than before, and when a parameter lies elsewhere than before. Raises WeightMismatch."""
        model = self._model()
        if model is None:  # gone with its engine, while the watcher had a version for it
            raise WeightMismatch("the model is not there any more")
        with self._lock:
            known = (_identity(entries), _lying(model))
            if self._resident is None or self._known != known:
                with quickly:
                    resident = Resident(PlacementRecorder().record(model, entries))
                    resident.plan(entry.name for entry in entries)
                self._resident, self._known = resident, known
            return self._resident

    # ---- after the pause ----

    def settle(self) -> None:
        """Until no read-back is under way: it must see the weights of one version, and memory that is there."""
        self._readback.settle()
        if self._stream is not None:
            self._stream.synchronize()  # of one that failed behind its launch

    def leave_gpu(self) -> None:
        """Give up what is decoded ahead, and the GPU memory in which it waits."""
        self.watcher.take()
        self.staging.leave_gpu()

    def start_readback(self, stage_dir: Path, entries: Sequence[TensorEntry], version: int) -> None:
        """Read the weights back in a thread, while the engine generates again; the outcome is `readback.json`."""
        begin = time.perf_counter()
        quick = contextlib.ExitStack()
        quick.enter_context(quickly)  # here, or the thread would first wait Python's 5 ms

        def read(spent: dict[str, float]) -> dict[str, str]:
            spent["wait_s"] = time.perf_counter() - begin
            with quick, beside(self._device, self._stream):
                return self.read_back(entries, spent)

        def failed(_: str) -> None:
            self.version = None

        self._readback.start(stage_dir, entries, version, read=read, failed=failed)

    def read_back(self, entries: Sequence[TensorEntry], spent: dict[str, float]) -> dict[str, str]:
        """{HF name: digest} of what the engine's parameters hold now. Their memory is read where it lies: no second
        copy of the model."""
        begin = time.perf_counter()
        resident = self.place(entries)
        spent["place_s"] = time.perf_counter() - begin
        found = resident.digests(entry.name for entry in entries)
        spent |= resident.spent
        return found


def _identity(entries: Iterable[TensorEntry]) -> list[tuple[str, str, tuple[int, ...]]]:
    return [(entry.name, entry.dtype, entry.shape) for entry in entries]


def _lying(model: Any) -> list[tuple[str, int, torch.dtype, tuple[int, ...]]]:
    """Every parameter's place and form. Gives the interpreter away nowhere: under a millisecond for 4.2 B."""
    return [(name, p.data_ptr(), p.dtype, tuple(p.shape)) for name, p in model.named_parameters()]


loaded_models: WeakKeyDictionary[Any, LoadedModel] = WeakKeyDictionary()


def apply_staged(model: Any, named_tensors: Iterable[Any] = ()) -> None:
    """Apply what is staged under ASTRA_STAGE_DIR to `model`. The call's own tensors are empty: it only triggers.

    The outcome is `result.json` in the stage directory. Whatever fails is reported there and not raised, because an
    exception in a loader kills the server; the caller reads the file before it lets the engine serve
    (`EngineClient.apply_staged`). From the first call on (`Subscriber.wake` stages one that changes nothing), a thread
    decodes what is staged while the engine generates, and when a read-back is due (`readback` in the result), one reads
    the weights back after the call (`Subscriber.readback`).
    """
    begin = time.perf_counter()
    stage_dir = Path(os.environ["ASTRA_STAGE_DIR"])
    engine = loaded_models.get(model)
    if engine is None:
        engine = loaded_models[model] = LoadedModel(model, stage_dir)
    engine.settle()
    for old in (RESULT, READBACK):  # a read-back that nobody waited for any more is of no use
        (stage_dir / old).unlink(missing_ok=True)
    have, engine.version = engine.version, None  # unknown until proven
    try:
        prepared = apply.current(stage_dir, engine.watcher.take())
        entries = prepared.manifests[-1].tensors if prepared.manifests else ()
        record_s, resident = time.perf_counter(), engine.place(entries) if entries else None
        with engine.staging.applied() if prepared.brings_tensors else contextlib.nullcontext():
            if resident is not None and not resident.fits(prepared):  # a parameter has moved since it was loaded
                prepared = prepare(stage_dir)
            record_s = time.perf_counter() - record_s
            waited = resident.waits(prepared) if resident is not None else None
            result = apply.perform(prepared, resident.placed if resident else {}, have, resident)
        interval = int(os.environ.get("ASTRA_VERIFY_INTERVAL", "0"))
        due = bool(interval and entries and result.version % interval == 0)
        spent = {f"digest_{part}": seconds for part, seconds in resident.spent.items()} if resident else {}
        more: dict[str, Any] = {"record_s": record_s, **spent, "loader_s": time.perf_counter() - begin, "readback": due}
        if waited is not None:
            more["staging"] = waited
        apply.succeed(stage_dir, result, more)
        engine.version = result.version
        if due:
            engine.start_readback(stage_dir, entries, result.version)
    except AstraError as error:
        apply.fail(stage_dir, error)
    except Exception as error:  # a model's load_weights may raise anything, and so may a device
        apply.fail(stage_dir, WeightMismatch(f"{type(error).__name__}: {error}"))


def settle(model: Any, named_tensors: Iterable[Any] = ()) -> None:
    """Before the engine's GPU is given away: wait until nothing of ours reads the weights any more (no read-back begins
    before the next `apply_staged`), and give the memory up in which versions wait on the GPU."""
    engine = loaded_models.get(model)
    if engine is not None:
        engine.settle()
        engine.leave_gpu()
