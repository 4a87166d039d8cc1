"""SGLang as core sees it. Everything that names SGLang, its options, loaders and quirks lies in this folder."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from astracli.engines.contract import Case, Engine, Serving, Start
from astracli.engines.sglang import attention, doctor, failure_hints
from astracli.engines.sglang.memory import SglangMemory
from astracli.engines.sglang.settings import NAME, SglangTable

if TYPE_CHECKING:
    from astracli.config.recipe import Recipe
    from astracli.engines.sglang.client import SglangClient

ENV = {"SGLANG_RETURN_ORIGINAL_LOGPROB": "0"}
"""Log-probabilities after temperature, whatever the shell says: what the trainer compares with."""
CPU_ENV = {"SGLANG_USE_CPU_ENGINE": "1"}
"""What tells SGLang that it is to run without a GPU."""


class Sglang(Engine):
    name = NAME
    settings = SglangTable
    summary = "the engine for GPUs"
    auto_on = frozenset({"cuda"})
    package = "sglang"
    upgrade = "`pip install -c constraints/cuda.txt 'astracli[gpu,sglang]'` (a newer SGLang with its torch and triton)"
    memory = SglangMemory()
    hints = (*failure_hints.KNOWN, *failure_hints.SLOW)

    def start(self, recipe: Recipe) -> Start:
        """The process that watches the server runs in our environment; it starts the server in the engine's own."""
        return Start("astracli.engines.sglang.server")

    def choose(self, case: Case) -> Serving:
        return Serving(
            attention.attention(case),
            attention.linear_attention(case),
            "SGLang's CPU backend, which computes in bf16" if case.device == "cpu" else "",
            ENV | (CPU_ENV if case.device == "cpu" else {}),
            "SGLang reports log-probabilities after temperature, as the trainer computes them",
        )

    def client(self, url: str, token: str, *, name: str, stage_dir: Path) -> SglangClient:
        from astracli.engines.sglang.client import SglangClient

        return SglangClient(url, token, name=name, stage_dir=stage_dir)

    problems = staticmethod(doctor.problems)
    checks = staticmethod(doctor.checks)
    probes = staticmethod(doctor.probes)


ENGINE = Sglang()
