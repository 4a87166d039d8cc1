"""The requests that an SGLang server answers before it counts as ready, so that it compiles nothing while it serves.

SGLang draws plain samples with torch. Once a batch holds a request with `top_p` below 1, or a greedy one beside others,
it draws with flashinfer's sampling kernels; where these are not in flashinfer's cache, the scheduler compiles them at
that moment, and every request waits. (SGLang 0.5.17: `Sampler._sample_from_probs` in `srt/layers/sampler.py`;
`SamplingParams` turns temperature 0 into `top_k = 1`.)
"""

from __future__ import annotations

from typing import Any

import httpx

from astracli.config.recipe import Recipe

TOKENS = 4
"""New tokens of each request: the first comes from the prefill, the others from decode batches."""
PROMPT = [1]


def samplings(recipe: Recipe) -> list[tuple[float, float]]:
    """The different (temperature, top_p) that a run of this recipe draws with; temperature 0 is greedy."""
    found = [(recipe.rollout.temperature, recipe.rollout.top_p), (recipe.eval.temperature, recipe.eval.top_p)]
    if recipe.eval.greedy:
        found.append((0.0, 1.0))
    return list(dict.fromkeys(found))


def need_kernels(found: list[tuple[float, float]]) -> bool:
    """Whether a batch of such requests is drawn by kernels that may have to be compiled."""
    greedy = [temperature == 0.0 for temperature, _ in found]
    return any(top_p < 1.0 for _, top_p in found) or (any(greedy) and not all(greedy))


def body(found: list[tuple[float, float]]) -> dict[str, Any]:
    """One call of `/generate` whose requests share their batches."""
    return {
        "input_ids": [PROMPT] * len(found),
        "sampling_params": [
            {"temperature": temperature, "top_p": top_p, "max_new_tokens": TOKENS, "ignore_eos": True}
            for temperature, top_p in found
        ],
        "rid": [f"first-{place}" for place in range(len(found))],
        "return_logprob": True,
    }


def ask(url: str, token: str, found: list[tuple[float, float]], timeout_s: float) -> str | None:
    """Have them answered by the server at `url`; what went wrong, or None."""
    headers = {"Authorization": f"Bearer {token}"}
    try:
        reply = httpx.post(
            f"{url}/generate", json=body(found), headers=headers, timeout=timeout_s, trust_env=False
        )  # fmt: skip
    except httpx.TransportError as error:
        return f"{type(error).__name__} {error}".strip()
    return None if reply.status_code == 200 else f"{reply.status_code} {reply.text[:300]}"
