"""The child that measures: reads a list of probes on stdin, answers each with one JSON line.

Another environment's interpreter, which may lack astracli, can run this file for `imports` (it needs the standard
library only) and `attention` (torch): the serving backend is installed where the engine is. All other probes are in
`measures.py`.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any

Row = dict[str, Any]
"""{"name", "status", "value"}"""
TOKENS = 64
TOLERANCE = {"cpu": 1e-5, "cuda": 2e-2}


def main() -> None:
    """Whatever a library prints goes to stderr; stdout carries answers only."""
    if sys.path[0] == os.path.dirname(os.path.abspath(__file__)):
        del sys.path[0]  # run by its path: `kernels` and others beside this file are also names of packages
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for probe in json.load(sys.stdin):
        try:
            rows = run(probe["kind"], probe["arguments"])
        except Exception as error:  # a broken kernel may raise anything; that is the finding
            rows = [{"name": probe["name"], "status": "fail", "value": words(error)}]
        print(json.dumps(rows), file=answers, flush=True)


def run(kind: str, arguments: dict[str, Any]) -> list[Row]:
    if kind == "imports":
        return imports(arguments["wanted"])
    if kind == "attention":
        return attention(**arguments)
    from astracli.doctor import measures

    return measures.MEASURES[kind](**arguments)


def imports(wanted: dict[str, str]) -> list[Row]:
    """`{package: "module:attribute"}`: really imported, and the attribute callable."""
    rows = []
    for package, target in wanted.items():
        module, _, attribute = target.partition(":")
        try:
            good = callable(getattr(import_module(module), attribute))
            value = f"{attribute} {'is callable' if good else 'is not callable'}"
        except Exception as error:  # an import may raise anything
            good, value = False, words(error)
        rows.append({"name": package, "status": "ok" if good else "fail", "value": value})
    return rows


def words(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]


def attention(config: Mapping[str, Any], device: str, chosen: list[str]) -> list[Row]:
    """Each chosen backend that can be called by itself, at the recipe's heads, causal, against an explicit softmax."""
    import torch

    text = config.get("text_config") or config
    heads, kv_heads = text["num_attention_heads"], text.get("num_key_value_heads") or text["num_attention_heads"]
    dim = text.get("head_dim") or text["hidden_size"] // heads
    generator = torch.Generator().manual_seed(0)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    q, k, v = (torch.randn(TOKENS, n, dim, generator=generator).to(device, dtype) for n in (heads, kv_heads, kv_heads))
    reference = explicit_softmax(q, k, v)
    rows = []
    for name in chosen:
        backend = BACKENDS.get(name)
        if backend is None:
            rows.append({"name": f"attention {name}", "status": "skip", "value": "runs inside the engine only"})
            continue
        error = relative(backend(q, k, v), reference)
        shown = f"relative, {heads} heads on {kv_heads} of {dim}"
        rows.append(row(f"attention {name}", error, TOLERANCE[device], shown))
    return rows


def explicit_softmax(q_THD: Any, k_TGD: Any, v_TGD: Any) -> Any:
    """Causal attention in fp32, T tokens, H query heads on G key heads."""
    import torch

    group = q_THD.shape[1] // k_TGD.shape[1]
    q, k, v = q_THD.float(), k_TGD.float().repeat_interleave(group, 1), v_TGD.float().repeat_interleave(group, 1)
    scores = torch.einsum("thd,shd->hts", q, k) / q.shape[-1] ** 0.5
    hidden = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)
    return torch.einsum("hts,shd->thd", scores.masked_fill(hidden, float("-inf")).softmax(-1), v)


def _sdpa(q: Any, k: Any, v: Any) -> Any:
    import torch

    q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)[0].transpose(0, 1)


def _flashinfer(q: Any, k: Any, v: Any) -> Any:
    return import_module("flashinfer").single_prefill_with_kv_cache(q, k, v, causal=True)


def _flash_attention_2(q: Any, k: Any, v: Any) -> Any:
    return import_module("flash_attn").flash_attn_func(q[None], k[None], v[None], causal=True)[0]


BACKENDS: dict[str, Callable[[Any, Any, Any], Any]] = {
    "sdpa": _sdpa,
    "flashinfer": _flashinfer,
    "flash_attention_2": _flash_attention_2,
}


def relative(found: Any, reference: Any) -> float:
    """Largest |difference| over the largest |reference|; NaN counts as infinite."""
    error = float((found.float() - reference.float()).abs().max() / reference.float().abs().max().clamp_min(1e-12))
    return error if error == error else float("inf")


def row(name: str, figure: float, allowed: float, shown: str) -> Row:
    good = figure <= allowed
    return {"name": name, "status": "ok" if good else "fail", "value": f"{figure:.1e} (at most {allowed:.0e}), {shown}"}


if __name__ == "__main__":
    main()
