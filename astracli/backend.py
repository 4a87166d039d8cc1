"""Which device, engine, attention and kernels a run gets on a machine, each with its reason.

The knowledge is in tables; `choose` only reads them. A combination that is known to fail is refused here with the
reason and the ways out, before anything starts. What a machine merely lacks is the plan's to say.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from astracli import backend_delta_rule, machine
from astracli.adapter import ModelAdapter
from astracli.errors import UserError
from astracli.machine import usable
from astracli.recipe import Recipe

Capability = tuple[int, int]
Facts = Mapping[str, Any]

OLDEST: Capability = (8, 0)
"""bf16 arithmetic begins here."""

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

TRAINER: dict[str, tuple[tuple[str, ...], str | None]] = {
    "sdpa": (("cpu", "cuda"), None),
    "eager": (("cpu", "cuda"), None),
    "flash_attention_2": (("cuda",), "flash-attn"),
}
"""Trainer attention -> (devices, package it needs)."""

COMPILED = {"fa3": "flash_ops"}
"""SGLang attention backend -> the compiled kernels that it needs of its package."""

PACKS = ("auto", "sdpa")
"""Values of train.attention under which a packed row gets its own attention function."""

ASKED = "the recipe asks for it"
SGLANG_ENV = {"SGLANG_RETURN_ORIGINAL_LOGPROB": "1"}
"""Log-probabilities before temperature: what the trainer compares with."""
SGLANG_CPU_ENV = {"SGLANG_USE_CPU_ENGINE": "1"}
"""What tells SGLang that it is to run without a GPU."""


@dataclass(frozen=True)
class Backend:
    """One decision, as `--dry-run` and `doctor` show it."""

    what: str
    choice: str
    reason: str


@dataclass(frozen=True)
class BackendChoice:
    device: Literal["cpu", "cuda"]
    engine: Literal["embedded", "sglang"]
    serving_attention: str
    """`auto` = decided where the GPUs are."""
    linear_attention: str
    """Engine kernel of the linear-attention layers; `none` for a dense model."""
    trainer_attention: str
    gdn_forward: str
    """`torch`, `fla`, `fla+tilelang`, `auto` (decided where the GPUs are) or `none` (dense)."""
    gdn_backward: str
    env: Mapping[str, str] = field(default_factory=dict)
    """Set for every process of the run."""
    reasons: tuple[Backend, ...] = ()
    warnings: tuple[str, ...] = ()

    def settings(self) -> dict[str, Any]:
        """The decisions as plain JSON; `attention` is what trainer and embedded engine load the model with."""
        return {
            "device": self.device,
            "engine": self.engine,
            "attention": self.trainer_attention,
            "serving_attention": self.serving_attention,
            "linear_attention": self.linear_attention,
            "gdn_forward": self.gdn_forward,
            "gdn_backward": self.gdn_backward,
        }


def choose(
    adapter: ModelAdapter, facts: Facts, recipe: Recipe, config: Mapping[str, Any] | None = None
) -> BackendChoice:
    """Decide for this machine. Raises UserError for a combination that cannot work anywhere or fails on these GPUs."""
    device, why_device = _device(recipe)
    engine, why_engine = _engine(recipe, device)
    capability = lowest_capability(facts) if device == "cuda" else None
    serving, why_serving = _serving(adapter, facts, recipe, engine, device, capability)
    linear, why_linear = _linear(adapter, recipe, engine, device)
    trainer, why_trainer = _trainer(facts, recipe, device)
    gdn, why_gdn, warning = backend_delta_rule.choose(adapter, facts, device, capability)
    layout, why_layout = packing(recipe, adapter, device)
    reasons = (
        Backend("device", device, why_device),
        Backend("engine", engine, why_engine),
        Backend("serving attention", serving, why_serving),
        Backend("serving linear attention", linear, why_linear),
        Backend("trainer attention", trainer, why_trainer),
        Backend("micro-batches", layout, why_layout),
        Backend("delta rule, forward", gdn, why_gdn),
        Backend("delta rule, backward", gdn, why_gdn),
    )
    env = {"CUDA_VISIBLE_DEVICES": ""} if device == "cpu" else {}
    if engine == "sglang":
        env |= SGLANG_ENV | (SGLANG_CPU_ENV if device == "cpu" else {})
    warnings = (warning,) if warning else ()
    return BackendChoice(device, engine, serving, linear, trainer, gdn, gdn, env, reasons, warnings)


def capability_of(gpu: Mapping[str, Any]) -> Capability:
    major, _, minor = gpu["compute_capability"].partition(".")
    return int(major), int(minor or 0)


def lowest_capability(facts: Facts) -> Capability | None:
    """The lowest of the visible GPUs; None without any."""
    return min((capability_of(gpu) for gpu in machine.visible_gpus(facts)), default=None)


def _dotted(capability: Capability) -> str:
    return f"{capability[0]}.{capability[1]}"


def _device(recipe: Recipe) -> tuple[Literal["cpu", "cuda"], str]:
    asked = recipe.resources
    gpus = asked.rollout_gpus + asked.train_gpus
    if asked.device == "cpu" and gpus:
        key, count = next((k, n) for k in ("rollout_gpus", "train_gpus") if (n := getattr(asked, k)))
        raise UserError(
            f"resources.{key} = {count} asks for GPUs, but resources.device = cpu",
            "add `--set resources.device=cuda` to train on GPUs; on a CPU `resources.engines` and "
            "`resources.train_ranks` count processes",
        )
    if asked.device == "cpu":
        return "cpu", "the recipe says resources.device = cpu"
    if asked.device == "cuda" and gpus == 0:
        raise UserError(
            "resources.device = cuda, but resources.rollout_gpus and resources.train_gpus are both 0",
            "add `--set resources.rollout_gpus=1 --set resources.train_gpus=1`, or `--set resources.device=cpu`",
        )
    if gpus:
        return "cuda", f"the recipe asks for GPUs (rollout {asked.rollout_gpus}, train {asked.train_gpus})"
    return "cpu", "the recipe asks for no GPU"


def _engine(recipe: Recipe, device: str) -> tuple[Literal["embedded", "sglang"], str]:
    asked = recipe.rollout.engine
    if device == "cpu":
        if asked == "sglang":
            return "sglang", f"{ASKED}: SGLang's CPU backend, which computes in bf16"
        return "embedded", "the engine that runs on a CPU" if asked == "auto" else ASKED
    if asked == "auto":
        return "sglang", "the engine for GPUs"
    return asked, ASKED


def _serving(
    adapter: ModelAdapter, facts: Facts, recipe: Recipe, engine: str, device: str, capability: Capability | None
) -> tuple[str, str]:
    asked = recipe.rollout.attention_backend
    key = "rollout.attention_backend"
    if engine == "sglang" and device == "cpu":
        _known(key, asked, ("auto", *SERVING_ON_CPU), "sglang on a CPU")
        return (SERVING_ON_CPU[0], "SGLang's attention for every CPU") if asked == "auto" else (asked, ASKED)
    if engine == "embedded":
        _known(key, asked, ("auto", "sdpa", "eager"), "the embedded engine")
        return ("sdpa", "exact and quick in the embedded engine") if asked == "auto" else (asked, ASKED)
    if asked != "auto":
        _known(key, asked, ("auto", *SERVING), "sglang")
        return asked, _check_serving(adapter, facts, recipe, asked, key, capability)
    if capability is None or capability < OLDEST:
        return "auto", "decided by compute capability where the GPUs are"
    candidates, reason = next((names, why) for start, names, why in reversed(SERVING_DEFAULTS) if capability >= start)
    passed_over: list[str] = []
    for name in candidates:
        lack = _forbidden(adapter, name, capability) or lacks(facts, recipe, name)
        if lack is None:
            over = f"; {', '.join(passed_over)}" if passed_over else ""
            return name, f"{reason} (this GPU: {_dotted(capability)}{over})"
        passed_over.append(f"no {name}: {lack}")
    raise UserError(
        f"no attention backend serves `{adapter.name}` on compute capability {_dotted(capability)}",
        "install flashinfer: `pip install flashinfer-python`",
    )


def serving_options(adapter: ModelAdapter, capability: Capability) -> tuple[list[str], dict[str, str]]:
    """(attention backends that serve this family on these GPUs, {refused one: reason})."""
    running = [name for name, (low, high, _) in SERVING.items() if low <= capability < high]
    refused = {name: reason for name in running if (reason := _forbidden(adapter, name, capability)) is not None}
    return [name for name in running if name not in refused], refused


def lacks(facts: Facts, recipe: Recipe, name: str) -> str | None:
    """What the engine's environment lacks for attention backend `name`; None when it is there, or nothing is known."""
    package = SERVING[name][2]
    if recipe.resources.engine.foreign:
        engine = facts.get("engine")
        if not engine or engine["error"] is not None:
            return None
        facts = {**facts, "packages": engine["packages"]}
    if package is None or (name in COMPILED and package not in facts["packages"]):
        return None
    if not usable(facts, package):
        return f"{package} cannot be imported"
    compiled = facts["packages"][package].get("compiled")
    if name in COMPILED and compiled is not None and COMPILED[name] not in compiled:
        return f"this build of {package} has no {COMPILED[name]}"
    return None


def _check_serving(
    adapter: ModelAdapter, facts: Facts, recipe: Recipe, name: str, key: str, capability: Capability | None
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
        raise UserError(f"{key} = {name} does not run on compute capability {_dotted(capability)}", hint)
    reason = _forbidden(adapter, name, capability)
    if reason is not None:
        where = f"`{adapter.name}` on compute capability {_dotted(capability)}"
        raise UserError(f"{key} = {name} is refused for {where}: {reason}", hint)
    if name in COMPILED and (lack := lacks(facts, recipe, name)) is not None:
        raise UserError(f"{key} = {name}: {lack}", hint)
    return ASKED


def _forbidden(adapter: ModelAdapter, name: str, capability: Capability) -> str | None:
    for entry in adapter.forbidden:
        everywhere = not entry.compute_capabilities
        if entry.backend == name and (everywhere or _dotted(capability) in entry.compute_capabilities):
            return entry.reason
    return None


def _linear(adapter: ModelAdapter, recipe: Recipe, engine: str, device: str) -> tuple[str, str]:
    asked = recipe.rollout.linear_attention_backend
    if not adapter.hybrid:
        return "none", "a dense model has no linear attention"
    if engine == "embedded":
        _known("rollout.linear_attention_backend", asked, ("auto", "torch"), "the embedded engine")
        return "torch", "the delta rule in torch, one step a token"
    if asked != "auto":
        return asked, ASKED if asked == "triton" else f"{ASKED} (only triton has been measured)"
    where = "every GPU" if device == "cuda" else "a CPU too, where it takes SGLang's own CPU kernels"
    return "triton", f"SGLang's default on {where}"


def _trainer(facts: Facts, recipe: Recipe, device: str) -> tuple[str, str]:
    asked = recipe.train.attention
    if asked == "auto":
        return "sdpa", "torch's own attention: exact on both devices, nothing to install"
    _known("train.attention", asked, ("auto", *TRAINER), "the trainer")
    devices, package = TRAINER[asked]
    if device not in devices:
        raise UserError(f"train.attention = {asked} does not run on a CPU", "use `--set train.attention=auto`")
    if package is not None and machine.visible_gpus(facts) and not usable(facts, package):
        stub = facts["packages"].get(package, {}).get("importable_spec")
        what = "is only an empty namespace folder" if stub else "is not installed"
        raise UserError(
            f"train.attention = {asked} needs {package}, which {what}",
            f"`pip install {package}`, or `--set train.attention=auto`",
        )
    return asked, ASKED


def packing(recipe: Recipe, adapter: ModelAdapter, device: str) -> tuple[str, str]:
    """(`packed` or `padded`, the reason). Raises UserError when a recipe asks for packed rows that would leak."""
    asked, attention = recipe.train.packing, recipe.train.attention
    obstacle = None
    if adapter.hybrid and adapter.install_varlen is None:
        obstacle = f"adapter `{adapter.name}` cannot reset its recurrent state inside a row (install_varlen)"
    elif attention not in PACKS:
        obstacle = f"train.attention = {attention} does not know the boundaries of a packed row"
    if asked == "packed" and obstacle is not None:
        raise UserError(f"train.packing = packed: {obstacle}", "use `--set train.packing=padded`")
    if recipe.train.row_boundaries == "ignored":
        return _without_boundaries(asked, obstacle, adapter)
    if asked != "auto":
        return asked, "the recipe asks for it"
    if device == "cpu":
        return "padded", "right-padded rows are quicker than short segments on a CPU"
    return ("padded", obstacle) if obstacle is not None else ("packed", "one row a micro-batch, nothing is padded")


def _without_boundaries(asked: str, obstacle: str | None, adapter: ModelAdapter) -> tuple[str, str]:
    """The ablation needs rows with boundaries, and layers that carry state over them."""
    if adapter.hybrid and asked != "padded" and obstacle is None:
        return "packed", "an ablation: train.row_boundaries = ignored lets state run from one sample into the next"
    why = "train.packing = padded joins no samples" if adapter.hybrid else f"adapter `{adapter.name}` is no hybrid"
    raise UserError(
        f"train.row_boundaries = ignored has nothing to leak through: {obstacle or why}",
        "leave it at `reset`, or pack a hybrid's rows with `--set train.packing=packed`",
    )


def _known(key: str, value: str, names: tuple[str, ...], who: str) -> None:
    if value not in names:
        near = difflib.get_close_matches(value, names, n=1)
        guess = f"; did you mean `{near[0]}`?" if near else ""
        hint = f"`--set {key}=auto` lets astra choose"
        raise UserError(f"{key} = {value}: {who} takes {', '.join(names)}{guess}", hint)
