"""vLLM as an `Engine`: what a recipe gets, what it cannot serve, its part of `astra doctor`. Imports no vLLM."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from astracli.config.recipe import Recipe
from astracli.engines.contract import ASKED, Case, Engine, Serving, Start, known
from astracli.engines.vllm import failure_hints, names
from astracli.engines.vllm.memory import VllmMemory
from astracli.engines.vllm.settings import NAME, VllmTable, own
from astracli.errors import UserError
from astracli.machine.facts import Capability, dotted, version_tuple
from astracli.machine.findings import Check, PlanProblem, flaw
from astracli.models.preflight import Obstacle

GROUP = "serving"
LOWEST = (0, 20, 2)
"""Its sources and those of 0.33.0 are what this package was written against."""
HYBRIDS = (0, 33)
"""0.20.2 registers no text model of Qwen3.5 (`model_executor/models/registry.py`); 0.33.0 does."""
TORCH: dict[tuple[int, ...], str] = {(0, 20): "2.11.0", (0, 33): "2.14.0"}
"""Release -> the torch that its metadata asks for, exactly."""
INSTALL = (
    "`pip install -c constraints/vllm.txt vllm xxhash zstandard psutil` in an environment of its own, and name its "
    "Python in resources.engine.python"
)
BACKENDS: dict[str, tuple[Capability, str | None]] = {
    "flash_attn": ((8, 0), None),
    "flashinfer": ((8, 0), "flashinfer-python"),
    "triton_attn": ((8, 0), None),
}
"""Attention backend -> (lowest compute capability in bf16, package it needs)."""


class Vllm(Engine):
    name = NAME
    settings = VllmTable
    summary = "vLLM, for GPUs"
    package = "vllm"
    memory = VllmMemory()
    cache_modes = frozenset({"abort", "retract", "in_place"})
    """`VllmEngine` salts each request by its weights."""
    hints = failure_hints.KNOWN

    def start(self, recipe: Recipe) -> Start:
        """The process that watches the server runs in our environment; it starts the server in the engine's own."""
        return Start("astracli.engines.vllm.server")

    def choose(self, case: Case) -> Serving:
        assert case.recipe is not None
        rollout = case.recipe.rollout
        if case.device != "cuda":
            raise UserError("vllm serves on GPUs here, and this recipe runs on a CPU", "take rollout.engine = embedded")
        if rollout.temperature != 1.0 and rollout.top_p != 1.0:
            raise UserError(
                f"rollout.temperature = {rollout.temperature:g} with rollout.top_p = {rollout.top_p:g}: vllm reports "
                "log-probabilities before temperature or after top-p, and the trainer needs those in between",
                "`--set rollout.top_p=1` or `--set rollout.temperature=1`, or take rollout.engine = sglang",
            )
        return Serving(self._attention(case, own(case.recipe).attention_backend))

    def _attention(self, case: Case, asked: str) -> tuple[str, str]:
        key = "rollout.vllm.attention_backend"
        if asked == "auto":
            return "auto", "vLLM chooses by itself"
        known(key, asked, ("auto", *BACKENDS), "vllm")
        lowest, package = BACKENDS[asked]
        if case.capability is not None and case.capability < lowest:
            where = f"compute capability {dotted(case.capability)}"
            raise UserError(f"{key} = {asked} does not run on {where}", f"it needs {dotted(lowest)} or newer GPUs")
        facts = case.environment
        if package is not None and facts is not None and facts.usable("vllm") and not facts.usable(package):
            raise UserError(f"{key} = {asked}: {package} cannot be imported", f"`--set {key}=auto`")
        return asked, ASKED

    def problems(self, case: Case) -> Iterator[PlanProblem]:
        if case.foreign or case.recipe is None or case.facts.usable("vllm"):
            return
        message = f"recipe `{case.recipe.name}` generates with vllm, which is not installed here"
        yield PlanProblem("package", "package vllm", message, INSTALL)

    def obstacles(self, case: Case) -> Iterable[Obstacle]:
        facts, adapter = case.environment, case.adapter
        version = None if facts is None else facts.package("vllm").version
        if adapter is None or not adapter.hybrid or version is None or version_tuple(version) >= HYBRIDS:
            return ()
        message = f"vllm {version} holds no text model of the hybrid `{adapter.name}`"
        return (Obstacle("a vLLM that serves hybrids", message, "install vllm 0.33, or take rollout.engine = sglang"),)

    def checks(self, case: Case) -> Iterator[Check]:
        facts = case.environment
        if facts is None:
            yield Check("vllm", GROUP, "warn", "not in this document", "the engine's own environment is not judged")
            return
        if not facts.usable("vllm"):
            value, why, fix = flaw(facts, "vllm") or ("not installed", "the recipe generates with it", INSTALL)
            needed = case.wanted and bool(case.facts.gpus)
            if needed:
                yield Check("vllm", GROUP, "fail", value, why, fix)
            else:
                yield Check("vllm", GROUP, "skip", value)
            return
        version = str(facts.package("vllm").version)
        if version_tuple(version) < LOWEST:
            why = "pauses that keep requests and versions by timestamps are known of 0.20.2 and 0.33.0"
            yield Check("vllm", GROUP, case.bad(), version, why, "`pip install 'vllm>=0.20.2'`")
        else:
            yield Check("vllm", GROUP, "ok", version)
        wants, has = TORCH.get(version_tuple(version)[:2]), facts.package("torch").version
        if wants is not None:
            met = str(has).partition("+")[0] == wants
            why = "" if met else "its kernels are built for exactly this torch"
            fix = "" if met else f"`pip install vllm=={version}` in an environment of its own"
            shown = f"torch {has}" if met else f"torch {has or 'absent'} for {wants}"
            yield Check("vllm pins", GROUP, "ok" if met else case.bad(), shown, why, fix)
        reads = facts.package("transformers").version
        if reads is not None and (old := names.old_transformers(reads)) is not None:
            yield Check("vllm transformers", GROUP, case.bad(), reads, *old)
        for obstacle in self.obstacles(case):
            yield Check("vllm hybrids", GROUP, case.bad(), version, obstacle.message, obstacle.hint)


ENGINE = Vllm()
