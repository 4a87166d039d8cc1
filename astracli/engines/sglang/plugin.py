"""SGLang as core sees it. Everything that names SGLang, its options, loaders and quirks lies in this folder."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from astracli.engines.contract import Case, Engine, Serving, Start
from astracli.engines.sglang import attention, doctor, failure_hints
from astracli.engines.sglang.memory import SglangMemory
from astracli.engines.sglang.settings import NAME, SglangTable
from astracli.errors import UserError

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
    cache_modes = frozenset({"abort"})
    """Without one, or with its requests gone, it is emptied at each version. Otherwise those in its queue bear the salt
    of the version that they were sent to, and would find what that computed."""
    hints = (*failure_hints.KNOWN, *failure_hints.SLOW)

    def start(self, recipe: Recipe) -> Start:
        """The process that watches the server runs in our environment; it starts the server in the engine's own."""
        return Start("astracli.engines.sglang.server")

    def choose(self, case: Case) -> Serving:
        chosen = attention.attention(case)
        assert case.recipe is not None and case.adapter is not None
        if chosen[0] == "trtllm_mha" and case.adapter.hybrid and case.recipe.rollout.prefix_cache == "on":
            raise UserError(
                "rollout.prefix_cache = on: SGLang keeps no prefixes of a hybrid with the attention trtllm_mha",
                "`--set rollout.sglang.attention_backend=triton`, or `--set rollout.prefix_cache=auto`",
            )
        return Serving(
            chosen,
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
