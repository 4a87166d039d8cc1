"""Which attention SGLang serves a model with on these GPUs: what runs there, is allowed for it, and is installed.

The knowledge is in tables: what SGLang takes by itself on a compute capability; where a backend runs, what it needs.
"""

from __future__ import annotations

from collections.abc import Iterator

from astracli.config.recipe import Recipe
from astracli.engines.contract import ASKED, Case, known
from astracli.engines.sglang.settings import own
from astracli.errors import UserError
from astracli.machine.facts import OLDEST, Capability, Machine, dotted
from astracli.models.adapter import Forbidden, ModelAdapter

SERVING_DEFAULTS: tuple[tuple[Capability, tuple[str, ...], str], ...] = (
    ((8, 0), ("flashinfer", "triton"), "SGLang below 9.0: flashinfer where it can be imported, else triton"),
    (
        (9, 0),
        ("fa3", "flashinfer", "triton"),
        "SGLang on Hopper: fa3 where its kernels are, else flashinfer, else triton",
    ),
    ((10, 0), ("trtllm_mha", "triton"), "SGLang from 10.0: trtllm_mha where flashinfer can be imported, else triton"),
    ((12, 0), ("flashinfer", "triton"), "SGLang from 12.0: flashinfer where it can be imported, else triton"),
)
"""(from this compute capability on, candidates in order, reason)."""

SERVING: dict[str, tuple[Capability, Capability, str | None]] = {
    "flashinfer": ((8, 0), (99, 0), "flashinfer-python"),
    "triton": ((8, 0), (99, 0), None),
    "fa3": ((8, 0), (10, 0), "sglang-kernel"),
    "trtllm_mha": ((10, 0), (99, 0), "flashinfer-python"),
    "torch_native": ((8, 0), (99, 0), None),
}
"""SGLang attention backend -> (lowest capability, first capability too high, package it needs)."""

SERVING_ON_CPU = ("torch_native", "intel_amx")
"""SGLang attention backends without a GPU, the one that every CPU has first."""

COMPILED = {"fa3": "flash_ops"}
"""SGLang attention backend -> the compiled kernels that it needs of its package."""


def attention(case: Case) -> tuple[str, str]:
    """(attention backend, the reason). Raises UserError for one that cannot serve."""
    adapter, facts, recipe, capability = case.adapter, case.facts, case.recipe, case.capability
    assert adapter is not None and recipe is not None
    asked = own(recipe).attention_backend
    key = "rollout.sglang.attention_backend"
    if case.device == "cpu":
        known(key, asked, ("auto", *SERVING_ON_CPU), "sglang on a CPU")
        return (SERVING_ON_CPU[0], "SGLang's attention for every CPU") if asked == "auto" else (asked, ASKED)
    if asked != "auto":
        known(key, asked, ("auto", *SERVING), "sglang")
        return asked, _check_serving(adapter, facts, recipe, asked, key, capability)
    if capability is None or capability < OLDEST:
        return "auto", "decided by compute capability where the GPUs are"
    candidates, reason = next((names, why) for start, names, why in reversed(SERVING_DEFAULTS) if capability >= start)
    passed: list[str] = []
    for name in candidates:
        lack = not_by_auto(adapter, name, capability) or lacks(facts, recipe, name)
        if lack is None:
            over = f"; {', '.join(passed)}" if passed else ""
            return name, f"{reason} (this GPU: {dotted(capability)}{over})"
        passed.append(f"no {name}: {lack}")
    raise UserError(
        f"no attention backend serves `{adapter.name}` on compute capability {dotted(capability)}",
        "install flashinfer: `pip install flashinfer-python`",
    )


def serving_options(adapter: ModelAdapter, capability: Capability) -> tuple[list[str], dict[str, str]]:
    """(attention backends that serve this family on these GPUs, {refused one: reason})."""
    running = [name for name, (low, high, _) in SERVING.items() if low <= capability < high]
    refused = {name: reason for name in running if (reason := _forbidden(adapter, name, capability)) is not None}
    return [name for name in running if name not in refused], refused


def lacks(facts: Machine, recipe: Recipe, name: str) -> str | None:
    """What the engine's environment lacks for attention backend `name`; None when it is there, or nothing is known."""
    package = SERVING[name][2]
    engine = facts.as_engine(recipe.resources.engine.foreign)
    if engine is None or package is None or (name in COMPILED and package not in engine.packages):
        return None
    if not engine.usable(package):
        return f"{package} cannot be imported"
    compiled = engine.package(package).compiled
    if name in COMPILED and compiled is not None and COMPILED[name] not in compiled:
        return f"this build of {package} has no {COMPILED[name]}"
    return None


def _check_serving(
    adapter: ModelAdapter, facts: Machine, recipe: Recipe, name: str, key: str, capability: Capability | None
) -> str:
    """The reason to take what the recipe asks for. Raises UserError where it is known to fail."""
    if capability is None:
        return "the recipe asks for it (no GPU here to check it against)"
    lowest, too_high, _ = SERVING[name]
    ways = ", ".join(
        f"`{other}`"
        for other, (low, high, _) in SERVING.items()
        if low <= capability < high and other != name and _forbidden(adapter, other, capability) is None
    )
    hint = f"set {key} to `auto`, or to one of {ways}"
    if not lowest <= capability < too_high:
        raise UserError(f"{key} = {name} does not run on compute capability {dotted(capability)}", hint)
    reason = _forbidden(adapter, name, capability)
    if reason is not None:
        where = f"`{adapter.name}` on compute capability {dotted(capability)}"
        raise UserError(f"{key} = {name} is refused for {where}: {reason}", hint)
    if name in COMPILED and (lack := lacks(facts, recipe, name)) is not None:
        raise UserError(f"{key} = {name}: {lack}", hint)
    return ASKED


def not_by_auto(adapter: ModelAdapter, name: str, capability: Capability) -> str | None:
    """Why `auto` does not take a backend for this family on these GPUs; None when it may."""
    return next((entry.reason for entry in _entries(adapter, name, capability)), None)


def _forbidden(adapter: ModelAdapter, name: str, capability: Capability) -> str | None:
    """Why a backend is refused to a recipe that asks for it; None when it is not."""
    return next((entry.reason for entry in _entries(adapter, name, capability) if entry.refused), None)


def _entries(adapter: ModelAdapter, name: str, capability: Capability) -> Iterator[Forbidden]:
    for entry in adapter.forbidden:
        everywhere = not entry.compute_capabilities
        if entry.backend == name and (everywhere or dotted(capability) in entry.compute_capabilities):
            yield entry


def linear_attention(case: Case) -> tuple[str, str]:
    """(the kernel of the linear-attention layers, the reason)"""
    assert case.adapter is not None and case.recipe is not None
    asked = own(case.recipe).linear_attention_backend
    if not case.adapter.hybrid:
        return "none", "a dense model has no linear attention"
    if asked != "auto":
        return asked, ASKED if asked == "triton" else f"{ASKED} (only triton has been measured)"
    where = "every GPU" if case.device == "cuda" else "a CPU too, where it takes SGLang's own CPU kernels"
    return "triton", f"SGLang's default on {where}"
