"""`astra doctor RECIPE --warm`: fills the caches of compiled and tuned kernels, for the image of a machine.

It is a run of one step in a temporary directory: the recipe's model, engines and trainer, so every process starts as it
will, compiles what it compiles, and ends. The trainer computes made-up rows of the recipe's lengths (`training/
warm_up.py`); the engines answer one short arithmetic problem each time the step asks, so no data has to be there.
"""

from __future__ import annotations

import json
import os
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from astracli.config import recipe_io
from astracli.config.recipe import Recipe
from astracli.errors import RunFailed, UserError
from astracli.launch import run
from astracli.process.atomic import write_atomic
from astracli.runs import metrics

if TYPE_CHECKING:
    from astracli.kernels.gpu.tuned import Origin

TOKENS = 16
"""New tokens of an answer."""
CACHES: Mapping[str, tuple[str, str]] = {
    "triton": ("TRITON_CACHE_DIR", "~/.triton/cache"),
    "torch inductor": ("TORCHINDUCTOR_CACHE_DIR", "{tmp}/torchinductor_{user}"),
    "torch extensions": ("TORCH_EXTENSIONS_DIR", "~/.cache/torch_extensions"),
    "flashinfer": ("FLASHINFER_WORKSPACE_BASE", "~/.cache/flashinfer"),
    "tilelang": ("TILELANG_CACHE_DIR", "~/.tilelang/cache"),
    "tvm-ffi": ("TVM_FFI_CACHE_DIR", "~/.cache/tvm-ffi"),
    "deep_gemm": ("DG_JIT_CACHE_DIR", "~/.deep_gemm"),
    "CUDA": ("CUDA_CACHE_PATH", "~/.nv/ComputeCache"),
}
"""Name -> (variable that moves it, its usual place)."""


@dataclass(frozen=True)
class Cache:
    name: str
    place: str
    before: int
    after: int
    """Bytes in its files."""


@dataclass(frozen=True)
class Warmed:
    caches: tuple[Cache, ...]
    """Those that hold anything."""
    seconds: Mapping[str, float]

    def document(self) -> dict[str, Any]:
        return {"caches": [vars(cache) for cache in self.caches], "seconds": dict(self.seconds)}


def places(environment: Mapping[str, str] = os.environ) -> dict[str, Path]:
    """Where each cache is on this machine."""
    words = {"tmp": tempfile.gettempdir(), "user": environment.get("USER", "root")}
    return {
        name: Path(environment.get(variable) or os.path.expanduser(usual.format(**words)))
        for name, (variable, usual) in CACHES.items()
    }


def size(folder: Path) -> int:
    """Bytes of the files below it; 0 where there is none."""
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file() and not file.is_symlink())


def short(recipe: Recipe) -> Recipe:
    """The recipe of the one step: processes, lengths of rows and kernels are its own; problems, answers and the number
    of groups are not. Raises UserError."""
    document = recipe_io.to_document(recipe)
    document["data"] = {"source": "arithmetic"}
    document["rollout"] |= {
        "env": "single_turn",
        "max_new_tokens": min(TOKENS, recipe.rollout.max_new_tokens), "max_dropped_batches": 0,
    }  # fmt: skip
    document["train"] |= {"steps": 1, "batch_groups": 1, "minibatches": 1, "warmup_steps": 0, "replay_ratio": 0}
    document["algorithm"]["drop_equal_groups"] = False
    document["eval"] = {"every": 0}
    document["checkpoint"] = {"every": 0}
    document["metrics"] = {}
    return recipe_io.check(document, recipe.name)


def warm(recipe: Recipe, tuned_out: Path | None = None) -> Warmed:
    """Fill the caches. `tuned_out`: where a document of what Triton has tuned goes (`kernels/gpu/tuned.py`). Raises
    UserError before the start, RunFailed after it."""
    origin = None if tuned_out is None else _origin(recipe)
    there, began = places(), time.monotonic()
    before = {name: size(folder) for name, folder in there.items()}
    with tempfile.TemporaryDirectory(prefix="astra-warm-") as folder:
        run_dir = Path(folder) / "run"
        code, made = run.train_run(short(recipe), command=recipe.command, run_dir=run_dir, warm=True)
        if code:
            raise RunFailed("it was interrupted before everything was compiled", "give the same command again")
        seconds = _seconds(metrics.read(made.metrics_jsonl))
    if tuned_out is not None and origin is not None:
        _write_tuned(tuned_out, there["triton"], origin, recipe)
    every = [Cache(name, str(place), before[name], size(place)) for name, place in there.items()]
    return Warmed(tuple(c for c in every if c.after), {"all": time.monotonic() - began, **seconds})


def _origin(recipe: Recipe) -> Origin:
    from astracli.kernels.gpu import tuned

    origin = tuned.here() if recipe.resources.device != "cpu" else None
    if origin is None:
        raise UserError(
            "--tuned-out: Triton tunes nothing here: that takes a GPU, a recipe that trains on it, and fla",
            "leave it out, or `pip install flash-linear-attention` where there is a GPU",
        )
    return origin


def _write_tuned(out: Path, cache: Path, origin: Origin, recipe: Recipe) -> None:
    import torch

    from astracli.kernels.gpu import tuned

    load = f"{recipe.model.path}, {recipe.train.tokens_per_microbatch} tokens"
    doc = tuned.document(cache, origin, torch.cuda.get_device_name(), load)
    try:
        write_atomic(out, json.dumps(doc, indent=1) + "\n")
    except OSError as error:
        raise UserError(f"cannot write `{out}`: {(error.strerror or str(error)).lower()}") from None


def _seconds(records: Any) -> dict[str, float]:
    """Of the trainer: made-up rows, and the first step behind them."""
    steps: list[Mapping[str, float]] = [r for r in records if r.get("process") == "trainer" and "train_s" in r]
    step = steps[0] if steps else {}
    names = {"warm_up_s": "made-up rows", "train_s": "first step"}
    return {words: step[name] for name, words in names.items() if name in step}
