"""Packed rows through a transformers model: what its forward gets, and attention that ends at every boundary.

The boundaries are keyword arguments of the forward, `cu_seqlens` (int32 [S + 1] on the device), `max_seqlen` and
`cu_seqlens_host` (the same as ints, so that nothing waits for the GPU); the attention function and the recurrent layers
get them. The attention function has a name for which transformers builds no mask: nothing of size T x T exists.

Shape letters: B rows, S segments, T tokens of a row, H query heads, G key and value heads, D head size.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import lru_cache
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from astracli.errors import RunFailed
from astracli.kernels import shared_attention
from astracli.kernels.shared_rows import SharedRow
from astracli.kernels.upload import upload
from astracli.models.adapter import ModelAdapter

NAME = "astra_varlen"
_UNKNOWN = ("s_aux", "softcap", "position_bias")
"""What some families hand to their attention function and this one does not compute."""


def install(model: Any, adapter: ModelAdapter) -> None:
    """Make a loaded model exact on packed rows; ordinary causal rows, padded on the right, go on working."""
    from transformers import AttentionInterface

    AttentionInterface.register(NAME, attention)
    model.config.astra_own_attention = model.config._attn_implementation
    model.config._attn_implementation = NAME
    if adapter.install_varlen is not None:
        adapter.install_varlen(model)


def switch(model: Any, *, packed: bool) -> None:
    """Where not every batch is packed: between two batches, whether the next one is. A batch of padded rows is computed
    as if nothing had been installed, bit for bit."""
    model.config._attn_implementation = NAME if packed else model.config.astra_own_attention


_in_one_order = False


@contextmanager
def one_order() -> Iterator[None]:
    """Inside, passes through this module's attention, forward and backward, give the same bits each time.

    Flash attention's backward pass adds up the gradient of queries in the order in which its blocks end, unless torch
    is in its deterministic mode. That mode refuses operators in every thread of the process (for example a float cumsum
    in a publisher beside this), so it is on only while this kernel is launched.
    """
    global _in_one_order
    before, mode = _in_one_order, _mode()
    _set_mode(mode)  # torch's first change of it imports for a second or two: here, not inside a backward pass
    _in_one_order = True
    try:
        yield
    finally:
        _in_one_order = before
        _set_mode(mode)


def _mode() -> tuple[bool, bool]:
    """(deterministic algorithms only, or a warning only)"""
    return torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()


def _set_mode(mode: tuple[bool, bool]) -> None:
    torch.use_deterministic_algorithms(mode[0], warn_only=mode[1])


def ordered(out: Tensor) -> Tensor:
    """`out` of an attention kernel, whose backward pass adds up in one order if that was asked for."""
    if _in_one_order and out.grad_fn is not None:
        mode = _mode()
        out.grad_fn.register_prehook(lambda _: _set_mode((True, False)))
        out.grad_fn.register_hook(lambda *_: _set_mode(mode))
    return out


def one_launch() -> Callable[[], AbstractContextManager[Any]]:
    """What `ordered` does, for a backward pass that launches its kernels itself."""
    asked = _in_one_order

    @contextmanager
    def around() -> Iterator[None]:
        mode = _mode()
        _set_mode((True, False))
        try:
            yield
        finally:
            _set_mode(mode)

    return around if asked else nullcontext


def carry_state(model: torch.nn.Module) -> None:
    """For an ablation: the recurrent layers of a model that `install` made exact carry state over boundaries again."""

    def forget(module: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        return args, kwargs | {"carry_state": True} if "cu_seqlens" in kwargs else kwargs

    base: Any = model.base_model
    base.register_forward_pre_hook(forget, with_kwargs=True)


def boundaries(bounds_S1: np.ndarray, device: torch.device, parents_S: np.ndarray | None = None) -> dict[str, Any]:
    """Keyword arguments of a model's forward for one packed row. `parents_S`: of each segment, the one that it goes on
    from, -1 for none."""
    shared = {} if parents_S is None else {"shared_prompts": SharedRow.of(bounds_S1, parents_S, device)}
    return {
        **shared,
        "cu_seqlens": upload(bounds_S1.astype(np.int32), device),
        "max_seqlen": int(np.diff(bounds_S1).max()),
        "cu_seqlens_host": tuple(bounds_S1.tolist()),
    }


def segments(
    cu_seqlens: Tensor | None, tokens: int, cu_seqlens_host: Sequence[int] | None = None
) -> list[tuple[int, int]]:  # fmt: skip
    """[(start, end)] of a row of `tokens` tokens, on the host: one segment without `cu_seqlens`. With it, but without
    `cu_seqlens_host`, it waits for a GPU.

    Raises ValueError when the boundaries do not cover the row.
    """
    if cu_seqlens is None:
        return [(0, tokens)]
    cu_seqlens_host = cu_seqlens.tolist() if cu_seqlens_host is None else cu_seqlens_host
    if cu_seqlens_host[0] != 0 or cu_seqlens_host[-1] != tokens or any(a >= b for a, b in pairwise(cu_seqlens_host)):
        raise ValueError(f"cu_seqlens {cu_seqlens_host} does not describe one packed row of {tokens} tokens")
    return list(pairwise(cu_seqlens_host))


def attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
    cu_seqlens_host: Sequence[int] | None = None,
    sliding_window: int | None = None,
    shared_prompts: SharedRow | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Causal attention inside every segment: query [B, H, T, D], key and value [B, G, T, D] -> [B, T, H, D].

    With `shared_prompts` samples also see their prompt, which is a segment before them. Without `cu_seqlens` a row is
    one segment. Raises RunFailed for a form of attention that it does not compute.
    """
    odd = [name for name in _UNKNOWN if kwargs.get(name) is not None]
    causal = kwargs.get("is_causal")
    if odd or dropout or not (getattr(module, "is_causal", True) if causal is None else causal):
        what = ", ".join(odd) or ("dropout" if dropout else "attention that is not causal")
        raise RunFailed(
            f"{type(module).__name__} asks for {what}, which the attention of packed rows does not compute",
            "use `--set train.packing=padded`",
        )
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    if cu_seqlens is None:
        return causal_attention(query, key, value, scale, sliding_window).transpose(1, 2), None
    if query.shape[0] != 1:
        raise ValueError(f"cu_seqlens with {query.shape[0]} rows; a packed row is one")
    same_size = key.shape[-1] == value.shape[-1]
    flash = query.is_cuda and same_size and flash_runs(query.device, query.dtype, query.shape[-1])
    if shared_prompts is not None:
        assert max_seqlen is not None
        told: dict[str, Any] = {
            "cu_seqlens": cu_seqlens,
            "longest": max_seqlen,
            "flash": flash,
            "around": one_launch(),
        }
        return shared_attention.attention(query, key, value, shared_prompts, scale, sliding_window, **told), None
    if flash:
        assert max_seqlen is not None
        return _flash(query, key, value, cu_seqlens, max_seqlen, scale, sliding_window), None
    parts = [
        causal_attention(query[:, :, a:b], key[:, :, a:b], value[:, :, a:b], scale, sliding_window)
        for a, b in segments(cu_seqlens, query.shape[2], cu_seqlens_host)
    ]
    return torch.cat(parts, dim=2).transpose(1, 2), None


def causal_attention(query: Tensor, key: Tensor, value: Tensor, scale: float, window: int | None) -> Tensor:
    """[B, H, T, D] of one segment. A window sees itself and `window` - 1 tokens before."""
    mask, tokens = None, query.shape[2]
    if window is not None and tokens > window:
        ahead = torch.arange(tokens, device=query.device)
        back = ahead[:, None] - ahead[None, :]
        mask = (back >= 0) & (back < window)
    grouped = query.shape[1] != key.shape[1]
    return ordered(
        scaled_dot_product_attention(
            query, key, value, attn_mask=mask, is_causal=mask is None, scale=scale, enable_gqa=grouped
        )
    )


@lru_cache
def flash_runs(device: torch.device, dtype: torch.dtype, head_size: int) -> bool:
    """Whether torch's own flash kernels take this, forward and backward."""
    capability = torch.cuda.get_device_capability(device)
    if dtype not in (torch.bfloat16, torch.float16) or capability < (8, 0) or head_size > 256 or head_size % 8:
        return False
    # the kernel source refuses the backward of 193 to 224 on all but the big chips
    return not 192 < head_size <= 224 or capability in ((8, 0), (9, 0), (10, 0))


@lru_cache
def _flash_options() -> frozenset[str]:
    """Parameters of this torch's `varlen_attn`: 2.10 has `is_causal`, later ones `window_size`, `scale`, GQA."""
    from torch.nn.attention.varlen import varlen_attn

    return frozenset(inspect.signature(varlen_attn).parameters)


def _flash(
    query: Tensor, key: Tensor, value: Tensor, cu_seqlens: Tensor, longest: int, scale: float, window: int | None
) -> Tensor:
    """[1, T, H, D] by flash attention over all segments at once."""
    from torch.nn.attention.varlen import varlen_attn

    options: dict[str, Any] = {}
    known = _flash_options()
    # not `x[0]`: its gradient is copied into zeros
    q, k, v = (x.squeeze(0).transpose(0, 1).contiguous() for x in (query, key, value))
    if q.shape[1] != k.shape[1]:
        if "enable_gqa" in known:
            options["enable_gqa"] = True
        else:
            k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    if "scale" in known:
        options["scale"] = scale
    else:
        q = q * (scale * q.shape[-1] ** 0.5)
    if "window_size" in known:
        options["window_size"] = (-1 if window is None else window - 1, 0)
    else:
        options["is_causal"] = True
        if window is not None and longest > window:
            raise RunFailed("this torch has no sliding window in packed rows", "use `--set train.packing=padded`")
    out: Any = varlen_attn(q, k, v, cu_seqlens, cu_seqlens, longest, longest, **options)
    attended: Tensor = ordered(out)[None]
    return attended
