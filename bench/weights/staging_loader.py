"""Runs inside SGLang for `into_sglang.py full`: moves the memory in which full versions wait, between two versions.

Custom weight loaders like ours, to be called in a pause; they change no weight.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from astracli.engines import loader as engine_loader
from astracli.weights.receive.staging import Staging, Where


def gpu(model: Any, named_tensors: Iterable[Any] = ()) -> None:
    _move(model, "gpu")


def host(model: Any, named_tensors: Iterable[Any] = ()) -> None:
    _move(model, "host")


def file(model: Any, named_tensors: Iterable[Any] = ()) -> None:
    _move(model, "file")


def _move(model: Any, where: Where) -> None:
    engine = engine_loader.loaded_models[model]
    engine.staging.free()
    engine.staging = Staging(where, engine._device, kept=True)
