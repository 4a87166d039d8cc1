"""What the output head needs of a chunk of fp32 logits, in one reading each: Triton kernels.

A vocabulary of 248,320 makes 1 GB of fp32 logits every 1,000 tokens; as separate operators log-sum-exp, entropy and the
gradient read and write them about ten times.

Shape letters: n tokens of a chunk, V vocabulary.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 4096


@triton.jit
def _measure(logits, target, logprob, entropy, normaliser, vocabulary, stride, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    row = tl.program_id(0).to(tl.int64)
    first = logits + row * stride
    top = tl.full((), float("-inf"), tl.float32)
    total = tl.zeros((), tl.float32)
    weighted = tl.zeros((), tl.float32)
    for start in range(0, vocabulary, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        x = tl.load(first + columns, mask=columns < vocabulary, other=float("-inf"))
        high = tl.maximum(top, tl.max(x, 0))
        keep = tl.exp(top - high)
        share = tl.exp(x - high)
        total = total * keep + tl.sum(share, 0)
        weighted = weighted * keep + tl.sum(tl.where(share > 0, share * x, 0.0), 0)
        top = high
    log_sum = top + tl.log(total)
    tl.store(normaliser + row, log_sum)
    tl.store(entropy + row, log_sum - weighted / total)
    tl.store(logprob + row, tl.load(first + tl.load(target + row)) - log_sum)


@triton.jit
def _gradient(logits, target, normaliser, grad, out, vocabulary, stride, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < vocabulary
    x = tl.load(logits + row * stride + columns, mask=inside, other=float("-inf"))
    probability = tl.exp(x - tl.load(normaliser + row))
    chosen = tl.where(columns == tl.load(target + row), 1.0, 0.0)
    slope = (chosen - probability) * tl.load(grad + row)
    tl.store(out + row * vocabulary + columns, slope.to(out.dtype.element_ty), mask=inside)


def measure(logits_nV: Tensor, target_n: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(log p(target), entropy, log-sum-exp), each fp32 [n], of fp32 logits."""
    rows, vocabulary = logits_nV.shape
    logprob_n, entropy_n, normaliser_n = (logits_nV.new_empty(rows) for _ in range(3))
    _measure[(rows,)](
        logits_nV, target_n, logprob_n, entropy_n, normaliser_n, vocabulary, logits_nV.stride(0), BLOCK=_BLOCK
    )
    return logprob_n, entropy_n, normaliser_n


def gradient(logits_nV: Tensor, target_n: Tensor, normaliser_n: Tensor, grad_n: Tensor, out_nV: Tensor) -> None:
    """out = (one-hot(target) - softmax(logits)) * grad, in the dtype of `out_nV`, which is contiguous."""
    rows, vocabulary = logits_nV.shape
    assert out_nV.is_contiguous() and out_nV.shape == logits_nV.shape
    _gradient[(rows, triton.cdiv(vocabulary, _BLOCK))](
        logits_nV, target_n, normaliser_n, grad_n, out_nV, vocabulary, logits_nV.stride(0), BLOCK=_BLOCK
    )
