"""The embedded engine's weights: copies in the wire's dtypes, written into the model's fp32 parameters.

The copies are what deltas apply to and what digests are taken from. The parameters hold their values exactly: bf16
values in fp32 arithmetic, and unrounded fp32 where the wire says float32.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from astracli.adapter import WireTensor
from astracli.errors import AstraError, RunFailed
from astracli.weights import staged

Loader = Callable[[Path], tuple[Any, Mapping[str, WireTensor]]]
"""Checkpoint directory -> (model, its `adapter.wire_tensors`)."""


@dataclass(frozen=True)
class UpdateOutcome:
    success: bool
    message: str
    outcome: dict[str, Any] = field(default_factory=dict)
    """`changed` elements, and where the time went: decode_s (possibly before the call), apply_s, verify_s, write_s."""


class EngineWeights:
    """Version, wire copies and parameters of one model. `problem` says why nothing may be served; None: all is well."""

    def __init__(self, model: Any, wire: Mapping[str, WireTensor], *, version: int = 0, problem: str | None = None):
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
        self._write()

    def _write(self) -> None:
        with torch.no_grad():
            for name, parameter in self._parameters.items():
                parameter.copy_(self.copies[name])

    def apply_staged(self, stage_dir: Path, version: int, prepared: staged.Prepared | None = None) -> UpdateOutcome:
        """Apply what is staged under `stage_dir`, check every resulting tensor, then serve it as `version`.

        `prepared`: the plan, decoded beforehand. A failure leaves the engine not serving until a full payload has been
        applied.
        """
        try:
            result = staged.apply(stage_dir, self.copies, self.have, prepared)
            if result.version != version:
                raise RunFailed(f"version {result.version} is staged in `{stage_dir}`, not {version}")
        except (AstraError, OSError, ValueError) as error:
            return self._failed(version, str(error))
        started = time.monotonic()
        self._write()
        self._serve(version)
        told = {name: getattr(result, name) for name in ("changed", "decode_s", "apply_s", "verify_s")}
        return UpdateOutcome(True, f"version {version} applied", told | {"write_s": time.monotonic() - started})

    def load_directory(self, path: Path, version: int, load: Loader) -> UpdateOutcome:
        """Take every wire tensor from a checkpoint directory, read through the adapter; then serve it as `version`."""
        started = time.monotonic()
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
