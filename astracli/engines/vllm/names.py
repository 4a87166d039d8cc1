"""Where vLLM finds what we put into its processes, and what has to be there. Imports neither torch nor vLLM."""

from __future__ import annotations

from astracli.machine.facts import version_tuple

WORKER = "astracli.engines.vllm.worker.AstraWorker"
"""The extension of its worker."""
EXECUTOR = "astracli.engines.vllm.executor.FileExecutor"
STORE = "ASTRA_RANK_STORE"
"""Environment of the server: the file by which its ranks meet, as a URL."""
TRANSFORMERS = (5, 5, 1)
"""The lowest that reads config.json as astra and transformers 5 write it."""


def old_transformers(version: str) -> tuple[str, str] | None:
    """(why this version of transformers does not do, the way out); None for one that does.

    0.20.2 takes 4.56 as well. That one knows no `rope_parameters`, and vLLM then puts the class's own `rope_theta` over
    them: another model, without a word. (0.20.2: `patch_rope_parameters` in `transformers_utils/config.py`)
    """
    if version_tuple(version) >= TRANSFORMERS:
        return None
    way = "`pip install 'transformers>=5.5.1'` in the engine's environment"
    return "it does not read `rope_parameters` of config.json, and vLLM would serve another model", way
