"""The embedded engine's weights: copies in the wire's dtypes, written into the model's fp32 parameters.

The copies are what deltas apply to and what the digests of every update are taken from. The parameters hold their
values exactly: bf16 values in fp32 arithmetic, and unrounded fp32 where the wire says float32. That they do is the
second check: the parameters are read back under HF names, beside generation, and their digests are the trainer's.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from astracli.engines.contract import UpdateReply
from astracli.engines.readback import Readback
from astracli.errors import AstraError, RunFailed
from astracli.models.adapter import WireTensor
from astracli.weights.format.digest import digest_tensor, to_hex
from astracli.weights.receive import apply
from astracli.weights.receive.reading import READBACK, Prepared

Loader = Callable[[Path], tuple[Any, Mapping[str, WireTensor]]]
"""Checkpoint directory -> (model, its `adapter.wire_tensors`)."""


class EngineWeights:
    """Version, wire copies and parameters of one model. `problem` says why nothing may be served; None: all is well."""

    def __init__(
        self, model: Any, wire: Mapping[str, WireTensor], *, version: int = 0, problem: str | None = None,
        verify_interval: int = 0,
    ):  # fmt: skip
        """`verify_interval`: the parameters are read back at every n-th version; 0 = never."""
        parameters = dict(model.named_parameters())
        self.parameters: dict[str, Tensor] = {tensor.name: parameters[name] for name, tensor in wire.items()}
        self.copies: dict[str, Tensor] = {
            tensor.name: parameters[name].detach().to(getattr(torch, tensor.dtype), copy=True).contiguous()
            for name, tensor in wire.items()
        }
        self.have: int | None = version
        """Version of the copies; None after a failed update, when only a full payload can help."""
        self.version = version
        self.problem = problem
        self._verify_interval = verify_interval
        self.readback = Readback()
        self.write_parameters()

    def write_parameters(self) -> None:
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.copy_(self.copies[name])

    def apply_staged(self, stage_dir: Path, version: int, prepared: Prepared | None = None) -> UpdateReply:
        """Apply what is staged under `stage_dir`, check every resulting tensor, then serve it as `version`.

        `prepared`: the plan, decoded beforehand. A failure leaves the engine not serving until a full payload has been
        applied. When a read-back is due, a thread makes it after this call; what it finds is `readback.json` in
        `stage_dir`, and other weights than the trainer's are a failure as well.
        """
        self.readback.settle()
        (stage_dir / READBACK).unlink(missing_ok=True)
        try:
            prepared = apply.current(stage_dir, prepared)
            result = apply.apply(stage_dir, self.copies, self.have, prepared)
            if result.version != version:
                raise RunFailed(f"version {result.version} is staged in `{stage_dir}`, not {version}")
        except (AstraError, OSError, ValueError) as error:
            return self._failed(version, str(error))
        started = time.monotonic()
        self.write_parameters()
        self.have = self.version = version
        self.problem = None
        told = {name: getattr(result, name) for name in ("changed", "decode_s", "apply_s", "verify_s")}
        told["write_s"] = time.monotonic() - started
        due = bool(self._verify_interval and prepared.manifests and version % self._verify_interval == 0)
        if due:
            self.readback.start(
                stage_dir,
                prepared.manifests[-1].tensors,
                version,
                read=lambda spent: self.read_back(),
                failed=lambda message: self._failed(version, message),
            )
        return UpdateReply(True, f"version {version} applied", told | {"readback": due})

    def read_back(self) -> dict[str, str]:
        """{HF name: digest of what the parameter holds}; "" for one that holds other values than its copy, bit for bit.
        (Rounded to the wire's dtype they could look the same, and NaNs different.)"""
        found = {}
        for name, parameter in self.parameters.items():
            copy = self.copies[name]
            same = torch.equal(parameter.detach().view(torch.int32), copy.to(parameter.dtype).view(torch.int32))
            found[name] = to_hex(digest_tensor(copy)) if same else ""
        return found

    def _failed(self, version: int, message: str) -> UpdateReply:
        self.have = None
        self.problem = f"the update to version {version} failed: {message}"
        return UpdateReply(False, message)
