"""Log-probabilities of chosen tokens without ever holding [tokens, vocabulary] for a batch.

Hidden states go through the output head in chunks of tokens; each chunk's logits live only until its log-sum-exp and
its token's logit are known, and are computed again in the backward pass. fp32 logits.

Shape letters: B rows, L padded length, N chosen tokens, D hidden size, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

LOGIT_BYTES = {"cpu": 2**25, "cuda": 2**29}
"""Size of one chunk's fp32 logits, by device."""

SLICE_ELEMENTS = 2**26
"""Of the head's gradient, what one product in bf16 makes at once."""


def chunk_tokens(vocabulary: int, device: str) -> int:
    """Tokens per chunk for the device's byte budget."""
    return max(16, LOGIT_BYTES.get(device, LOGIT_BYTES["cuda"]) // (4 * vocabulary))


def _logits(hidden_nD: Tensor, weight_VD: Tensor, bias_V: Tensor | None) -> Tensor:
    """fp32 [n, V]"""
    if hidden_nD.dtype != torch.float32 and hidden_nD.is_cuda:
        logits_nV = torch.mm(hidden_nD, weight_VD.t(), out_dtype=torch.float32)
    else:
        logits_nV = (hidden_nD @ weight_VD.t()).float()
    return logits_nV if bias_V is None else logits_nV + bias_V.float()


def _add_product(total_VD: Tensor, d_logits_nV: Tensor, hidden_nD: Tensor) -> None:
    """total += d_logits^T hidden. A product in bf16 goes in slices of the vocabulary: it and its fp32 copy are no
    [V, D] each beside the total."""
    rows = len(total_VD) if hidden_nD.dtype == torch.float32 else max(1, SLICE_ELEMENTS // hidden_nD.shape[1])
    for v in range(0, len(total_VD), rows):
        total_VD[v : v + rows] += (d_logits_nV[:, v : v + rows].t() @ hidden_nD).float()


class _ChunkedLogprob(torch.autograd.Function):
    """(hidden_ND, weight_VD, bias_V or None, target_N, chunk) -> (logprob_N, entropy_N), both fp32."""

    @staticmethod
    def forward(
        ctx: Any, hidden_ND: Tensor, weight_VD: Tensor, bias_V: Tensor | None, target_N: Tensor, chunk: int
    ) -> tuple[Tensor, Tensor]:
        count = len(target_N)
        logprob_N = hidden_ND.new_empty(count, dtype=torch.float32)
        entropy_N, normaliser_N = torch.empty_like(logprob_N), torch.empty_like(logprob_N)
        for a in range(0, count, chunk):
            part = slice(a, a + chunk)
            logits_nV = _logits(hidden_ND[part], weight_VD, bias_V)
            normaliser_N[part] = logits_nV.logsumexp(-1)
            logprob_N[part] = logits_nV.gather(1, target_N[part, None])[:, 0] - normaliser_N[part]
            probability_nV = (logits_nV - normaliser_N[part, None]).exp_()
            entropy_N[part] = normaliser_N[part] - (probability_nV * logits_nV).sum(-1)
        ctx.save_for_backward(hidden_ND, weight_VD, bias_V, target_N, normaliser_N)
        ctx.chunk = chunk
        ctx.mark_non_differentiable(entropy_N)
        return logprob_N, entropy_N

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor, Tensor, Tensor | None, None, None]:
        hidden_ND, weight_VD, bias_V, target_N, normaliser_N = ctx.saved_tensors
        grad_N = grads[0]
        d_hidden_ND = torch.empty_like(hidden_ND)
        d_weight_VD = torch.zeros_like(weight_VD, dtype=torch.float32)
        d_bias_V = None if bias_V is None else torch.zeros_like(bias_V, dtype=torch.float32)
        for a in range(0, len(target_N), ctx.chunk):
            part = slice(a, a + ctx.chunk)
            logits_nV = _logits(hidden_ND[part], weight_VD, bias_V)
            d_logits_nV = (logits_nV - normaliser_N[part, None]).exp_().neg_()
            d_logits_nV.scatter_add_(1, target_N[part, None], torch.ones_like(grad_N[part, None]))
            d_logits_nV.mul_(grad_N[part, None])
            if d_bias_V is not None:
                d_bias_V += d_logits_nV.sum(0)
            d_logits_nV = d_logits_nV.to(hidden_ND.dtype)
            d_hidden_ND[part] = d_logits_nV @ weight_VD
            _add_product(d_weight_VD, d_logits_nV, hidden_ND[part])
        d_bias = None if bias_V is None or d_bias_V is None else d_bias_V.to(bias_V.dtype)
        return d_hidden_ND, d_weight_VD.to(weight_VD.dtype), d_bias, None, None


def chunked_logprob(
    hidden_ND: Tensor, weight_VD: Tensor, target_N: Tensor, *, bias_V: Tensor | None = None, chunk: int = 1024
) -> tuple[Tensor, Tensor]:
    """log p(target) with gradients, and the distribution's entropy (nats, without); both fp32 [N]."""
    return _ChunkedLogprob.apply(hidden_ND, weight_VD, bias_V, target_N, chunk)


class PolicyModel(nn.Module):
    """A causal language model whose forward is what training needs: log-probabilities of chosen tokens.

    It is also the FSDP root: the base model and the output head run inside one forward, so that tied and head
    parameters are whole where they are used.
    """

    def __init__(self, model: nn.Module, *, chunk: int | None = None):
        super().__init__()
        self.model = model
        self.chunk = chunk
        head: Any = model.get_output_embeddings()  # type: ignore[operator]
        if head is None or model.base_model is model:
            raise ValueError(f"{type(model).__name__} has no output head over a base model")
        self.vocabulary = int(head.weight.shape[0])

    def forward(
        self,
        tokens_BL: Tensor,
        attention_mask: Any,
        position_ids: Tensor | None,
        predict_N: Tensor,
        target_N: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """Log-probability and entropy of `target_N`, predicted by the hidden states at flat positions `predict_N`.

        With no token chosen the result is an empty tensor that still has every parameter in its graph: collectives of
        the backward pass match on all ranks.
        """
        base: Any = self.model.base_model
        arguments = {} if position_ids is None else {"position_ids": position_ids}
        hidden_BLD = base(
            input_ids=tokens_BL, attention_mask=attention_mask, use_cache=False, **arguments
        ).last_hidden_state
        hidden_ND = hidden_BLD.flatten(0, 1)[predict_N]
        head: Any = self.model.get_output_embeddings()  # type: ignore[operator]
        chunk = self.chunk or chunk_tokens(self.vocabulary, tokens_BL.device.type)
        return chunked_logprob(hidden_ND, head.weight, target_N, bias_V=head.bias, chunk=chunk)
