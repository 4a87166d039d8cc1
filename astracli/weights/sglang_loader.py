"""Weight loader that runs inside SGLang: `--custom-weight-loader astracli.weights.sglang_loader.apply_staged`.

The engine's own `load_weights` knows how HF tensors are fused and where each part goes. It is run once with tensors
whose content nobody reads, while `copy_` and slice assignment are intercepted: that yields, for every HF tensor, the
parameter memory that holds it. From then on a version is a scatter into that memory. Recorded anew and read where it
lies, the same mapping gives the weights back under HF names, which proves a version by the engine's own account.

The process reads three environment variables, set by whoever starts the engine:
ASTRA_STAGE_DIR (where versions are staged), ASTRA_START_VERSION (what the engine was started with, default 0; empty for
random weights), ASTRA_VERIFY_INTERVAL (read back under HF names every n-th version, default 0 = never).
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import time
import weakref
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch.overrides import TorchFunctionMode

from astracli.errors import AstraError
from astracli.weights import WeightMismatch, staged
from astracli.weights.decoder import DecoderProcess
from astracli.weights.manifest import TensorEntry
from astracli.weights.resident import Resident
from astracli.weights.staged import Placement, Prepared
from astracli.weights.watcher import StageWatcher

_SWITCH_S = 2e-4
"""How long the scheduler may hold the interpreter while a read-back wants it: at Python's 5 ms one took seconds."""
_MAX_RUNS = 1 << 16  # contiguous runs that one copy may fall into


class PlacementRecorder(TorchFunctionMode):
    """Records where the model keeps every HF tensor. Changes no weight.

    Sees every `dst.copy_(src)` and `dst[index] = src` whose source is one of the tensors being fed, and lets none run.
    """

    def __init__(self) -> None:
        super().__init__()
        self.fed: dict[int, tuple[str, torch.Tensor]] = {}
        self.found: dict[str, list[Placement]] = {}

    def feed(self, name: str, tensor: torch.Tensor) -> tuple[str, torch.Tensor]:
        if tensor.numel():
            self.fed[tensor.untyped_storage().data_ptr()] = (name, tensor)
        return name, tensor

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.Tensor.copy_:
            source = args[1] if len(args) > 1 else kwargs["src"]
            if name := self._name(source):
                self.moved(name, args[0], source)
                return args[0]
        if func is torch.Tensor.__setitem__ and (name := self._name(args[2])):
            target = args[0][args[1]]
            if target.untyped_storage().data_ptr() != args[0].untyped_storage().data_ptr():
                raise WeightMismatch(f"`{name}` is written through an index that is no slice")
            self.moved(name, target, args[2])
            return None
        return func(*args, **kwargs)

    def _name(self, source: Any) -> str:
        if not isinstance(source, torch.Tensor) or not source.numel():
            return ""
        return self.fed.get(source.untyped_storage().data_ptr(), ("", source))[0]

    def record(self, model: Any, entries: Iterable[TensorEntry]) -> dict[str, list[Placement]]:
        """{HF name: placements in ascending order}. Raises WeightMismatch naming tensors that the model did not take
        whole, exactly once: a name that it does not know is otherwise skipped without a word."""
        entries = list(entries)
        self.found = {entry.name: [] for entry in entries}
        with torch.no_grad(), self:
            # never written, so never given physical memory
            model.load_weights(self.feed(e.name, torch.empty(e.shape, dtype=getattr(torch, e.dtype))) for e in entries)
        self.fed.clear()
        problems = []
        for entry in entries:
            places = self.found[entry.name] = _merged(sorted(self.found[entry.name], key=lambda p: p.offset))
            ends = [0, *(p.end for p in places)]
            if any(p.offset != end for p, end in zip(places, ends, strict=False)) or ends[-1] != entry.numel:
                problems.append(f"{entry.name} ({sum(p.view.numel() for p in places)} of {entry.numel} elements)")
        if problems:
            raise WeightMismatch(
                f"the engine's load_weights does not place {len(problems)} tensors: {', '.join(problems[:5])}",
                "the published names must be those that this engine's model class loads",
            )
        return self.found

    def moved(self, name: str, target: torch.Tensor, source: torch.Tensor) -> None:
        """`source`, a view of the tensor fed as `name`, is to be written to `target`."""
        if target.numel() != source.numel() or target.dtype != source.dtype:
            raise WeightMismatch(
                f"`{name}`: {source.dtype}{list(source.shape)} is loaded into {target.dtype}{list(target.shape)}",
                "publish this tensor in the dtype in which the engine holds it",
            )
        self.found[name] += [Placement(view, offset) for view, offset in _runs(target.detach(), source)]
        if len(self.found[name]) > _MAX_RUNS:
            raise WeightMismatch(f"`{name}` lies in more than {_MAX_RUNS} places")


def read_back_digests(model: Any, entries: Iterable[TensorEntry]) -> dict[str, str]:
    """{HF name: digest} of what the engine holds, through its own mapping asked anew.

    The mapping is recorded again, not remembered, and the digest is taken where the parameters lie: no second copy of
    the model, which a `load_weights` that collects its input before it loads would otherwise need. Runs beside the
    engine's own work, on a stream of its own.
    """
    entries = list(entries)
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    with torch.no_grad(), contextlib.ExitStack() as stack:
        if device.type == "cuda":
            stack.enter_context(torch.cuda.device(device))
            stack.enter_context(torch.cuda.stream(torch.cuda.Stream(device)))
        return Resident(PlacementRecorder().record(model, entries)).digests([entry.name for entry in entries])


def _runs(target: torch.Tensor, source: torch.Tensor) -> Iterator[tuple[torch.Tensor, int]]:
    """(flat view of `target`, offset in the fed tensor) for the contiguous runs that both sides share."""
    if target.is_contiguous() and source.is_contiguous():
        yield target.view(-1), int(source.storage_offset())
    elif target.shape == source.shape and len(target) <= _MAX_RUNS:
        for one, other in zip(target, source, strict=True):
            yield from _runs(one, other)
    else:
        raise WeightMismatch(f"no contiguous runs in {list(target.shape)} loaded from {list(source.shape)}")


def _merged(places: list[Placement]) -> list[Placement]:
    """Neighbours that also lie side by side in memory become one."""
    merged: list[Placement] = []
    for place in places:
        last = merged[-1] if merged else None
        if last is not None and place.offset == last.end and _adjacent(last.view, place.view):
            length = last.view.numel() + place.view.numel()
            merged[-1] = Placement(last.view.as_strided((length,), (1,), last.view.storage_offset()), last.offset)
        else:
            merged.append(place)
    return merged


def _adjacent(one: torch.Tensor, two: torch.Tensor) -> bool:
    same = one.untyped_storage().data_ptr() == two.untyped_storage().data_ptr()
    return same and one.storage_offset() + one.numel() == two.storage_offset()


class _Engine:
    """What this process knows of one model: its version, where its weights lie, and the thread that decodes ahead."""

    def __init__(self, model: Any, stage_dir: Path):
        start = os.environ.get("ASTRA_START_VERSION", "0")
        self.version: int | None = int(start) if start else None
        self.hands: Resident | None = None
        self._model = weakref.ref(model)
        self._proving: threading.Thread | None = None
        self._names: list[tuple[str, str, tuple[int, ...]]] = []
        self._addresses: list[tuple[dict[str, Any], str, int]] = []
        self._decoder = DecoderProcess()
        self.watcher = StageWatcher(stage_dir, self.load, self.warm, self._decoder.prepare)

    def warm(self) -> None:
        """Start the decoder, compile what the first pause needs."""
        self._decoder.start()
        model = self._model()
        device = next((p.device for p in model.parameters()), None) if model is not None else None
        if device is not None and device.type == "cuda":
            from astracli.weights import kernels

            with torch.cuda.device(device), torch.cuda.stream(torch.cuda.Stream(device)):
                kernels.warm(device)

    def load(self, prepared: Prepared) -> None:
        """Bring a decoded version to the device, once it is known where the weights lie."""
        if self.hands is not None and prepared.manifests and self._names == _identity(prepared.manifests[-1].tensors):
            staged.load(prepared, self.hands)

    def settle(self) -> None:
        """Until no read-back is under way: it must see the weights of one version."""
        if self._proving is not None:
            self._proving.join()
            self._proving = None

    def prove(self, stage_dir: Path, entries: Sequence[TensorEntry], version: int) -> None:
        """Read the weights back in a thread, while the engine generates again; the outcome is `proof.json`."""

        def run() -> None:
            begin, before = time.perf_counter(), sys.getswitchinterval()
            sys.setswitchinterval(_SWITCH_S)
            try:
                found = read_back_digests(self._model(), entries)
                wrong = [e.name for e in entries if found.get(e.name) != e.digest]
                message = f"read back under HF names, {len(wrong)} tensors differ: {', '.join(wrong[:5])}"
            except Exception as error:
                wrong, message = ["?"], f"the read-back failed: {type(error).__name__}: {error}"
            finally:
                sys.setswitchinterval(before)
            if wrong:
                self.version = None
            doc = {"version": version, "ok": not wrong, "message": message if wrong else ""}
            staged.write_proof(stage_dir, {**doc, "seconds": time.perf_counter() - begin})

        self._proving = threading.Thread(target=run, name="read-back", daemon=True)
        self._proving.start()

    def record(self, entries: Sequence[TensorEntry]) -> None:
        """Find out where the model keeps `entries`; again only for other names, dtypes or shapes than before.

        Raises WeightMismatch when a parameter lies elsewhere by now (SGLang's own work after loading may replace some):
        what was decoded for the old places is lost, and the next call, of a full version, asks for the new ones.
        """
        if any(getattr(slots.get(name), "data_ptr", int)() != at for slots, name, at in self._addresses):
            self.hands, self._names, self._addresses = None, [], []
            raise WeightMismatch("the engine has moved its parameters since they were found", "send a full payload")
        if self._names != _identity(entries):
            model: Any = self._model()
            self.hands = Resident(PlacementRecorder().record(model, entries))
            self._names = _identity(entries)
            held = ((module._parameters, name) for module in model.modules() for name in module._parameters)
            self._addresses = [(slots, name, p.data_ptr()) for slots, name in held if (p := slots[name]) is not None]


def _identity(entries: Iterable[TensorEntry]) -> list[tuple[str, str, tuple[int, ...]]]:
    return [(entry.name, entry.dtype, entry.shape) for entry in entries]


_engines: WeakKeyDictionary[Any, _Engine] = WeakKeyDictionary()


def apply_staged(model: Any, named_tensors: Iterable[Any] = ()) -> None:
    """Apply what is staged under ASTRA_STAGE_DIR to `model`. The call's own tensors are empty: it only triggers.

    The outcome is `result.json` in the stage directory. Whatever fails is reported there and not raised, because an
    exception in a loader kills the server; the caller reads the file before it lets the engine serve
    (`Subscriber.outcome`). From the first call on (`Subscriber.wake` stages one that changes nothing), a thread decodes
    what is staged while the engine generates, and when a read-back is due (`proof` in the result), one reads the
    weights back after the call (`Subscriber.proof`).
    """
    begin = time.perf_counter()
    stage_dir = Path(os.environ["ASTRA_STAGE_DIR"])
    engine = _engines.get(model)
    if engine is None:
        engine = _engines[model] = _Engine(model, stage_dir)
    engine.settle()
    have, engine.version = engine.version, None  # unknown until proven
    try:
        prepared = engine.watcher.take()
        if prepared is None or not staged.is_staged(stage_dir, prepared):
            prepared = staged.prepare(stage_dir)
        entries = prepared.manifests[-1].tensors if prepared.manifests else ()
        record_s = time.perf_counter()
        if entries:
            engine.record(entries)
        record_s = time.perf_counter() - record_s
        places = engine.hands.placed if engine.hands is not None else {}
        result = staged.apply(stage_dir, places, have, prepared, engine.hands)
        interval = int(os.environ.get("ASTRA_VERIFY_INTERVAL", "0"))
        due = bool(interval and entries and result.version % interval == 0)
        more = {"record_s": record_s, "loader_s": time.perf_counter() - begin, "proof": due}
        staged.succeed(stage_dir, result, more)
        engine.version = result.version
        if due:
            engine.prove(stage_dir, entries, result.version)
    except AstraError as error:
        staged.fail(stage_dir, error)
    except Exception as error:  # a model's load_weights may raise anything, and so may a device
        staged.fail(stage_dir, WeightMismatch(f"{type(error).__name__}: {error}"))
