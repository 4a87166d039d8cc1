"""Which Gated DeltaNet backward is right on this GPU, and how fast: fla, and the torch chunk rule, plain and compiled.

    python bench/trainer/delta_rule.py [--heads 32] [--dim 128] [--tokens 2048] [--timed-tokens 8192] [--json]

Inputs are drawn like a trained layer's (unit keys, decay near 1), in bf16, packed as several sequences in one row. The
reference is the delta rule token by token in fp64, each sequence alone. Printed per variant: relative error
|x - ref| / |ref| of the output and of every gradient, and the median time of forward + backward over one packed row.
A variant that raises is listed with what it said. On a CPU only the torch rule runs (use small shapes).
"""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from shared import median_s, options, say, show

Rule = Callable[..., torch.Tensor]
NAMES = ("q", "k", "v", "g", "beta")


def inputs(tokens: int, heads: int, dim: int, device: str, seed: int) -> list[torch.Tensor]:
    """q, k, v [1, T, H, D] bf16, g [1, T, H] fp32 (log decay), beta [1, T, H] bf16; q and k have unit length."""
    draw = torch.Generator(device=device).manual_seed(seed)
    q, k, v = (torch.randn(1, tokens, heads, dim, generator=draw, device=device) for _ in range(3))
    g = -F.softplus(torch.randn(1, tokens, heads, generator=draw, device=device) - 3.0)
    beta = torch.randn(1, tokens, heads, generator=draw, device=device).sigmoid()
    return [F.normalize(q, dim=-1).bfloat16(), F.normalize(k, dim=-1).bfloat16(), v.bfloat16(), g, beta.bfloat16()]


def token_by_token(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, g: torch.Tensor, beta: torch.Tensor
) -> torch.Tensor:
    """S_t = exp(g_t) S_{t-1} + k_t (beta_t (v_t - k_t^T exp(g_t) S_{t-1}))^T; o_t = q_t^T S_t / sqrt(D)."""
    state = q.new_zeros(q.shape[0], q.shape[2], q.shape[3], v.shape[3])
    out = []
    for t in range(q.shape[1]):
        state = state * g[:, t, :, None, None].exp()
        correction = beta[:, t, :, None] * (v[:, t] - torch.einsum("bhk,bhkv->bhv", k[:, t], state))
        state = state + k[:, t, :, :, None] * correction[:, :, None, :]
        out.append(torch.einsum("bhk,bhkv->bhv", q[:, t], state) / q.shape[3] ** 0.5)
    return torch.stack(out, 1)


def per_sequence(rule: Rule) -> Rule:
    """A rule for one sequence as a rule for a packed row."""

    def packed(*tensors: torch.Tensor, cu_seqlens: torch.Tensor) -> torch.Tensor:
        ends = cu_seqlens.tolist()
        return torch.cat([rule(*(x[:, a:b] for x in tensors)) for a, b in pairwise(ends)], 1)

    return packed


def variants(device: str, compiled: bool) -> dict[str, Rule]:
    from transformers.models.qwen3_5.modeling_qwen3_5 import torch_chunk_gated_delta_rule

    # newer transformers wrap the function so that it calls fla's kernel where fla is installed
    in_torch = inspect.unwrap(torch_chunk_gated_delta_rule)

    def chunk(q: Any, k: Any, v: Any, g: Any, beta: Any) -> torch.Tensor:
        out: torch.Tensor = in_torch(q, k, v, g=g, beta=beta)[0]
        return out

    found: dict[str, Rule] = {"torch chunk rule": per_sequence(chunk)}
    if device == "cuda":
        if compiled:
            found["torch chunk rule, compiled"] = per_sequence(torch.compile(chunk, dynamic=True))

        def fla(*tensors: torch.Tensor, cu_seqlens: torch.Tensor) -> torch.Tensor:
            from fla.ops.gated_delta_rule import chunk_gated_delta_rule

            q, k, v, g, beta = tensors
            out: torch.Tensor = chunk_gated_delta_rule(q, k, v, g=g, beta=beta, cu_seqlens=cu_seqlens)[0]
            return out

        found["fla chunk rule"] = fla
    return found


def gradients(
    rule: Rule, tensors: list[torch.Tensor], weight: torch.Tensor, cu: torch.Tensor
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    leaves = [x.detach().clone().requires_grad_() for x in tensors]
    out = rule(*leaves, cu_seqlens=cu)
    (out.to(weight.dtype) * weight).sum().backward()
    return out.detach(), [x.grad for x in leaves if x.grad is not None]


def error(x: torch.Tensor, reference: torch.Tensor) -> float:
    return float((x.double() - reference).norm() / reference.norm())


def main() -> None:
    parser = options(__doc__, heads=32, dim=128, tokens=2048, timed_tokens=8192, repeats=5)
    parser.add_argument("--compile", action="store_true", help="also the compiled torch rule; compiling takes minutes")
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    shares = torch.tensor([0.0, 0.33, 0.335, 0.7, 1.0])
    cu = (shares * args.tokens).long().to(device)
    tensors = inputs(args.tokens, args.heads, args.dim, device, seed=0)
    draw = torch.Generator(device=device).manual_seed(1)
    weight = torch.randn(tensors[2].shape, generator=draw, device=device, dtype=torch.float64)
    reference, wanted = gradients(per_sequence(token_by_token), [x.double() for x in tensors], weight, cu)
    timed_inputs = inputs(args.timed_tokens, args.heads, args.dim, device, seed=2)
    timed_weight = torch.ones_like(timed_inputs[2], dtype=torch.float32)
    timed_cu = (shares * args.timed_tokens).long().to(device)
    rows: list[dict[str, Any]] = []
    for name, rule in variants(device, args.compile).items():
        try:
            out, got = gradients(rule, tensors, weight.float(), cu)
            errors = {
                n: error(a, b) for n, a, b in zip(("out", *NAMES), [out, *got], [reference, *wanted], strict=True)
            }
            work = functools.partial(gradients, rule, timed_inputs, timed_weight, timed_cu)
            rows.append({"variant": name, **errors, "seconds": median_s(work, args.repeats, warm=2)})
            say(rows[-1])
        except Exception as problem:  # a variant that cannot run here is a result, and is printed as one
            rows.append({"variant": name, "raised": f"{type(problem).__name__}: {str(problem).strip()[:300]}"})
    show(args, {"tokens": args.tokens, "timed_tokens": args.timed_tokens, "rows": rows})


if __name__ == "__main__":
    main()
