"""Which kernel runs the trainer's gated delta rule on these GPUs: compute capability x fla x Triton x TileLang."""

from __future__ import annotations

from astracli.engines import registry as engines
from astracli.machine.facts import Capability, Machine
from astracli.models.adapter import ModelAdapter

HOPPER: Capability = (9, 0)
FLA_NATIVE = ((0, 6), (3, 7, 1))
"""flash-linear-attention and triton from which the gated backward works on Hopper by itself."""
FLA_OLD_TRITON = (3, 4)
"""Triton below this is right with every flash-linear-attention."""
TILELANG_FFI: dict[tuple[int, ...], tuple[tuple[int, ...], ...]] = {(0, 1, 11): ((0, 1, 10), (0, 1, 11))}
"""TileLang -> the versions of apache-tvm-ffi that it loads with (0.1.9 and 0.1.15 lack a symbol)."""
TILELANG = "`pip install tilelang==0.1.11 apache-tvm-ffi==0.1.11` beside a CUDA toolkit with nvcc"

SLOW = "the delta rule runs in plain torch, several times slower"


def choose(
    adapter: ModelAdapter, facts: Machine, device: str, capability: Capability | None
) -> tuple[str, str, str | None]:
    """(kernel, reason, warning or None) of the trainer's delta rule; forward and backward are one autograd function."""
    if not adapter.hybrid:
        return "none", "a dense model has no delta rule", None
    if device == "cpu":
        return "torch", "the chunk rule in torch: GPU kernels are never used on a CPU, even when installed", None
    if capability is None:
        return "auto", "decided where the GPUs are", None
    lacking = next((name for name in ("flash-linear-attention", "triton") if not facts.version_of(name)), None)
    if lacking is not None:
        reason = f"{lacking} cannot be imported"
        return "torch", reason, f"{reason}: {SLOW}; `pip install {lacking}`"
    return gated_backward(facts, capability)


def gated_backward(facts: Machine, capability: Capability) -> tuple[str, str, str | None]:
    """(kernel, reason, warning or None) where flash-linear-attention and triton are there."""
    if capability[0] != HOPPER[0]:
        return "fla", f"right on compute capability {_join(capability)} with every version", None
    fla, triton = facts.version_of("flash-linear-attention"), facts.version_of("triton")
    words = f"flash-linear-attention {_join(fla)} with triton {_join(triton)}"
    if (fla >= FLA_NATIVE[0] and triton >= FLA_NATIVE[1]) or triton < FLA_OLD_TRITON:
        return "fla", f"{words} has a right gated backward on Hopper", None
    broken = tilelang_flaw(facts)
    if facts.usable("tilelang") and facts.compilers.nvcc and broken is None:
        return "fla+tilelang", f"{words} needs TileLang on Hopper, and it and nvcc are there", None
    reason = f"{words} raises in the gated backward on Hopper (fla issue 640)"
    if facts.usable("tilelang") and broken is not None:
        reason += f", and {broken}"
    return "torch", reason, f"{reason}: {SLOW}; {native(facts)}, or {TILELANG}"


def native(facts: Machine) -> str:
    """The command that brings versions whose gated backward works on Hopper by itself. One that leaves an engine of
    this environment without the torch that it is built for is not named."""
    if facts.version_of("triton") >= FLA_NATIVE[1]:
        return "`pip install 'flash-linear-attention>=0.6'`"
    for engine in (item.plugin for item in engines.installed()):
        if engine is not None and engine.package and engine.upgrade and facts.usable(engine.package):
            return engine.upgrade
    return "`pip install 'torch>=2.13' 'flash-linear-attention>=0.6'` (that torch brings triton>=3.7.1)"


def tilelang_flaw(facts: Machine) -> str | None:
    """Why the installed TileLang does not load; None when it does, is not there, or nothing is known of its parts."""
    needed = TILELANG_FFI.get(facts.version_of("tilelang") or ())
    if needed is None or "apache-tvm-ffi" not in facts.packages:
        return None
    has = facts.version_of("apache-tvm-ffi")
    if has in needed:
        return None
    own, ways = _join(facts.version_of("tilelang")), " or ".join(map(_join, needed))
    return f"tilelang {own} loads with apache-tvm-ffi {ways} alone, {_join(has) or 'none'} is installed"


def _join(version: tuple[int, ...]) -> str:
    return ".".join(str(part) for part in version)
