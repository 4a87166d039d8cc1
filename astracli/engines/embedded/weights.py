"""The embedded engine's weights: copies in the wire's dtypes, written into the model's fp32 parameters.

The copies are what deltas apply to and what the digests of every update are taken from. The parameters hold their
values exactly: bf16 values in fp32 arithmetic, and unrounded fp32 where the wire says float32. That they do is the
second check: the parameters are read back under HF names, beside generation, and their digests are the trainer's.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from astracli.errors import AstraError, RunFailed
from astracli.models.adapter import WireTensor
from astracli.weights.format.digest import digest_tensor, to_hex
from astracli.weights.format.manifest import Manifest
from astracli.weights.receive import apply
from astracli.weights.receive.reading import READBACK, Prepared

Loader = Callable[[Path], tuple[Any, Mapping[str, WireTensor]]]
"""Checkpoint directory -> (model, its `adapter.wire_tensors`)."""


@dataclass(frozen=True)
class UpdateOutcome:
    success: bool
    message: str
    outcome: dict[str, Any] = field(default_factory=dict)
    """`changed` elements, where the time went: decode_s (possibly before the call), apply_s, verify_s, write_s; and
    whether a read-back follows (`readback`)."""


class EngineWeights:
    """Version, wire copies and parameters of one model. `problem` says why nothing may be served; None: all is well."""

    def __init__(
        self, model: Any, wire: Mapping[str, WireTensor], *, version: int = 0, problem: str | None = None,
        verify_interval: int = 0,
    ):  # fmt: skip
        """`verify_interval`: the parameters are read back at every n-th version; 0 = never."""
        parameters = dict(model.named_parameters())
        self._parameters: dict[str, Tensor] = {tensor.name: parameters[name] for name, tensor in wire.items()}
        self.copies: dict[str, Tensor] = {
            tensor.name: parameters[name].detach().to(getattr(torch, tensor.dtype), copy=True).contiguous()
            for name, tensor in wire.items()
        }
        self.have: int | None = version
        """Version of the copies; None after a failed update, when only a full payload can help."""
        self.version = version
        self.problem = problem
        self._verify_interval = verify_interval
        self._readback_thread: threading.Thread | None = None
        self._write()

    def _write(self) -> None:
        with torch.no_grad():
            for name, parameter in self._parameters.items():
                parameter.copy_(self.copies[name])

    def apply_staged(self, stage_dir: Path, version: int, prepared: Prepared | None = None) -> UpdateOutcome:
        """Apply what is staged under `stage_dir`, check every resulting tensor, then serve it as `version`.

        `prepared`: the plan, decoded beforehand. A failure leaves the engine not serving until a full payload has been
        applied. When a read-back is due, a thread makes it after this call; what it finds is `readback.json` in
        `stage_dir`, and other weights than the trainer's are a failure as well.
        """
        self.settle()
        (stage_dir / READBACK).unlink(missing_ok=True)
        try:
            prepared = apply.current(stage_dir, prepared)
            result = apply.apply(stage_dir, self.copies, self.have, prepared)
            if result.version != version:
                raise RunFailed(f"version {result.version} is staged in `{stage_dir}`, not {version}")
        except (AstraError, OSError, ValueError) as error:
            return self._failed(version, str(error))
        started = time.monotonic()
        self._write()
        self._serve(version)
        told = {name: getattr(result, name) for name in ("changed", "decode_s", "apply_s", "verify_s")}
        told["write_s"] = time.monotonic() - started
        due = bool(self._verify_interval and prepared.manifests and version % self._verify_interval == 0)
        if due:
            self._start_readback(stage_dir, prepared.manifests[-1], version)
        return UpdateOutcome(True, f"version {version} applied", told | {"readback": due})

    def read_back(self) -> dict[str, str]:
        """{HF name: digest of what the parameter holds}; "" for one that holds other values than its copy, bit for bit.
        (Rounded to the wire's dtype they could look the same, and NaNs different.)"""
        found = {}
        for name, parameter in self._parameters.items():
            copy = self.copies[name]
            same = torch.equal(parameter.detach().view(torch.int32), copy.to(parameter.dtype).view(torch.int32))
            found[name] = to_hex(digest_tensor(copy)) if same else ""
        return found

    def _start_readback(self, stage_dir: Path, manifest: Manifest, version: int) -> None:
        """Read the weights back in a thread, while the engine generates again."""
        begun = time.perf_counter()

        def run() -> None:
            try:
                found = self.read_back()
                wrong = [tensor.name for tensor in manifest.tensors if found[tensor.name] != tensor.digest]
                message = f"read back under HF names, {len(wrong)} tensors differ: {', '.join(wrong[:5])}"
            except Exception as error:  # whoever waits for the read-back would wait in vain
                wrong, message = ["?"], f"the read-back failed: {type(error).__name__}: {error}"
            if wrong:
                self._failed(version, message)
            doc = {"version": version, "ok": not wrong, "message": message if wrong else ""}
            apply.write_readback(stage_dir, {**doc, "readback_s": time.perf_counter() - begun})

        self._readback_thread = threading.Thread(target=run, name="read-back", daemon=True)
        self._readback_thread.start()

    def settle(self) -> None:
        """Until no read-back is under way: it must see the weights of one version."""
        if self._readback_thread is not None:
            self._readback_thread.join()
            self._readback_thread = None

    def load_directory(self, path: Path, version: int, load: Loader) -> UpdateOutcome:
        """Take every wire tensor from a checkpoint directory, read through the adapter; then serve it as `version`."""
        started = time.monotonic()
        self.settle()
        try:
            model, wire = load(path)
            parameters = dict(model.named_parameters())
            fresh = {tensor.name: parameters[name].detach() for name, tensor in wire.items()}
            different = sorted(fresh.keys() ^ self.copies.keys()) + sorted(
                name for name in fresh.keys() & self.copies.keys() if fresh[name].shape != self.copies[name].shape
            )
            if different:
                raise RunFailed(f"`{path}` does not hold this model: {', '.join(different[:8])}")
        except (AstraError, OSError, ValueError) as error:
            return self._failed(version, str(error))
        with torch.no_grad():
            for name, copy in self.copies.items():
                copy.copy_(fresh[name])
        self._write()
        self._serve(version)
        return UpdateOutcome(True, f"version {version} loaded from {path}", {"apply_s": time.monotonic() - started})

    def relabel(self, version: int) -> None:
        """Call the present weights `version`."""
        self.version = version
        if self.have is not None:
            self.have = version

    def _serve(self, version: int) -> None:
        self.have = self.version = version
        self.problem = None

    def _failed(self, version: int, message: str) -> UpdateOutcome:
        self.have = None
        self.problem = f"the update to version {version} failed: {message}"
        return UpdateOutcome(False, message)
