"""The packages of an interpreter, as plain JSON values.

The standard library only: the source of this file also runs in the engine's own interpreter (`doctor/gather.py`), which
has neither astracli nor psutil.
"""

from __future__ import annotations

import importlib.util
import platform
import re
from importlib import metadata
from pathlib import Path
from typing import Any

PACKAGES = {
    "torch": "torch",
    "transformers": "transformers",
    "safetensors": "safetensors",
    "datasets": "datasets",
    "accelerate": "accelerate",
    "huggingface-hub": "huggingface_hub",
    "numpy": "numpy",
    "math-verify": "math_verify",
    "typer": "typer",
    "pydantic": "pydantic",
    "sglang": "sglang",
    "vllm": "vllm",
    "flashinfer-python": "flashinfer",
    "flashinfer": "flashinfer",
    "flash-attn": "flash_attn",
    "flash-linear-attention": "fla",
    "causal-conv1d": "causal_conv1d",
    "triton": "triton",
    "tilelang": "tilelang",
    "apache-tvm-ffi": "tvm_ffi",
    "sglang-kernel": "sgl_kernel",
}
"""Distribution -> the module that it installs."""

MODEL_FILES = {"transformers": "models", "sglang": "srt/models"}
"""Package -> the folder in it that holds one entry a model family."""

COMPILED = {"sgl_kernel": ("flash_ops",)}
"""Module -> shared libraries that a build of it may lack. flash_ops: FlashAttention-3, for Hopper."""


def describe(families: list[str] | None = None) -> dict[str, Any]:
    """`{"packages", "torch_cuda"}` of this interpreter. With `families`, model types, it also says which of them the
    packages in `MODEL_FILES` have code for, and what SGLang pins."""
    packages = {name: package(name, module) for name, module in PACKAGES.items()}
    if families is not None:
        for name, folder in MODEL_FILES.items():
            packages[name]["models"] = model_files(PACKAGES[name], folder, families)
        packages["sglang"]["pins"] = exact_pins("sglang")
    return {"packages": packages, "torch_cuda": torch_cuda()}


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def _origin(module: str) -> tuple[bool, Path | None]:
    """(whether Python finds the module, the file that an import would run). Nothing is imported."""
    try:
        spec = importlib.util.find_spec(module)
    except (ImportError, ValueError):
        spec = None
    file = Path(spec.origin) if spec is not None and spec.origin else None
    return spec is not None, file if file is not None and file.is_file() else None


def package(name: str, module: str) -> dict[str, Any]:
    """The version by its metadata, and where the module would be imported from."""
    known, origin = _origin(module)
    found: dict[str, Any] = {"version": _version(name), "module": module, "importable_spec": known}
    if module in COMPILED and origin is not None:
        found["compiled"] = [name for name in COMPILED[module] if any(origin.parent.glob(f"**/{name}*.so"))]
    return found | {"origin": str(origin) if origin is not None else None}


def exact_pins(name: str) -> dict[str, dict[str, str | None]]:
    """The `other==version` requirements of a distribution, without those of extras, each with the installed version."""
    lines = (metadata.requires(name) if _version(name) is not None else None) or []
    found: dict[str, dict[str, str | None]] = {}
    for line in lines:
        match = re.match(r"([A-Za-z0-9._-]+)(\[[^]]*\])?\s*\(?==\s*([^\s;,)]+)", line)
        if match is not None and "extra" not in line.partition(";")[2]:
            found[match.group(1)] = {"wants": match.group(3), "has": _version(match.group(1))}
    return found


def model_files(module: str, folder: str, names: list[str]) -> list[str] | None:
    """The `names` for which a package has `folder/NAME` or `folder/NAME.py`; None when the package is missing."""
    _, origin = _origin(module)
    if origin is None:
        return None
    place = origin.parent / folder
    return [name for name in names if (place / name).is_dir() or (place / f"{name}.py").is_file()]


def torch_cuda() -> str | None:
    """The CUDA version that torch was built for, read from the text of torch/version.py."""
    _, origin = _origin("torch")
    try:
        text = (origin.parent / "version.py").read_text() if origin is not None else ""
    except OSError:
        return None
    match = re.search(r"^cuda\b[^=]*=\s*['\"]([\d.]+)['\"]", text, re.MULTILINE)
    return match.group(1) if match else None


def libc() -> str | None:
    """`glibc 2.36`; None where it is not known."""
    return " ".join(platform.libc_ver()).strip() or None
