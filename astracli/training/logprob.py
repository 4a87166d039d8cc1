"""Log-probabilities of chosen tokens without ever holding [tokens, vocabulary] for a batch.

Hidden states go through the output head in chunks of tokens. A chunk's logits live only until their log-sum-exp and the
logits of the chosen tokens are known; the backward pass computes them again. Logits are fp32 and divided by the
temperature of the rollout, so probabilities, entropies and gradients are those of the policy that draws.

Shape letters: B rows, L padded length, N chosen tokens, D hidden size, V vocabulary.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from astracli.kernels import weight_gradients
from astracli.models.preflight import logit_factor
from astracli.process.layout import LOGIT_BYTES

_CHUNKS_PER_PRODUCT = {"cpu": 1, "cuda": 4}
"""Chunks whose gradients of logits, in the compute dtype, go into one product for the gradient of the weight. Each such
product reads and writes that whole gradient, so few are better."""
_TILE = 128
"""Rows of a matrix product's tile on a GPU."""


def chunk_tokens(vocabulary: int, device: str) -> int:
    """Tokens per chunk for the device's byte budget."""
    fit = max(16, LOGIT_BYTES.get(device, LOGIT_BYTES["cuda"]) // (4 * vocabulary))
    return fit if device == "cpu" or fit < _TILE else fit - fit % _TILE


def _logits(hidden_nD: Tensor, weight_VD: Tensor, bias_V: Tensor | None, temperature: float) -> Tensor:
    """fp32 [n, V], divided by `temperature`"""
    if hidden_nD.dtype != torch.float32 and hidden_nD.is_cuda:
        logits_nV = torch.mm(hidden_nD, weight_VD.t(), out_dtype=torch.float32)
    else:
        logits_nV = (hidden_nD @ weight_VD.t()).float()
    if bias_V is not None:
        logits_nV = logits_nV + bias_V.float()
    return logits_nV if temperature == 1.0 else logits_nV.div_(temperature)


@lru_cache
def _kernels() -> Any:
    """The Triton kernels of the head; None where Triton cannot be imported."""
    try:
        from astracli.kernels.gpu import logits
    except ImportError:
        return None
    return logits


def _measure(logits_nV: Tensor, target_n: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(log p(target), entropy, log-sum-exp), each fp32 [n]."""
    if logits_nV.is_cuda and (kernels := _kernels()) is not None:
        measured: tuple[Tensor, Tensor, Tensor] = kernels.measure(logits_nV, target_n)
        return measured
    normaliser_n = logits_nV.logsumexp(-1)
    logprob_n = logits_nV.gather(1, target_n[:, None])[:, 0] - normaliser_n
    probability_nV = (logits_nV - normaliser_n[:, None]).exp_()
    return logprob_n, normaliser_n - probability_nV.mul_(logits_nV).sum(-1), normaliser_n


def _gradient(logits_nV: Tensor, target_n: Tensor, normaliser_n: Tensor, grad_n: Tensor, out_nV: Tensor) -> None:
    """out = gradient of sum(grad * log p(target)) by the logits. Overwrites the logits."""
    if logits_nV.is_cuda and (kernels := _kernels()) is not None:
        kernels.gradient(logits_nV, target_n, normaliser_n, grad_n, out_nV)
        return
    slope_nV = logits_nV.sub_(normaliser_n[:, None]).exp_().neg_()
    slope_nV.scatter_add_(1, target_n[:, None], torch.ones_like(grad_n[:, None]))
    out_nV.copy_(slope_nV.mul_(grad_n[:, None]))


def _add_product(total_VD: Tensor, left_nV: Tensor, right_nD: Tensor) -> None:
    """total (fp32) += left^T right"""
    if left_nV.is_cuda and left_nV.dtype != torch.float32:
        weight_gradients.add_product(total_VD, left_nV, right_nD)
    elif left_nV.dtype == torch.float32:
        total_VD.addmm_(left_nV.t(), right_nD)
    else:
        total_VD += (left_nV.t() @ right_nD).float()


class _ChunkedLogprob(torch.autograd.Function):
    """(hidden_ND, weight_VD, bias_V or None, target_N, chunk, temperature, the weight's accumulator or None) ->
    (logprob_N, entropy_N), both fp32."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: Tensor,
        weight_VD: Tensor,
        bias_V: Tensor | None,
        target_N: Tensor,
        chunk: int,
        temperature: float,
        total: weight_gradients.Accumulator | None,
    ) -> tuple[Tensor, Tensor]:
        count = len(target_N)
        logprob_N = hidden_ND.new_empty(count, dtype=torch.float32)
        entropy_N, normaliser_N = torch.empty_like(logprob_N), torch.empty_like(logprob_N)
        for a in range(0, count, chunk):
            part = slice(a, a + chunk)
            logits_nV = _logits(hidden_ND[part], weight_VD, bias_V, temperature)
            logprob_N[part], entropy_N[part], normaliser_N[part] = _measure(logits_nV, target_N[part])
            del logits_nV  # or the next chunk is made beside it
        ctx.save_for_backward(hidden_ND, weight_VD, bias_V, target_N, normaliser_N)
        ctx.chunk, ctx.temperature, ctx.total = chunk, temperature, total
        ctx.mark_non_differentiable(entropy_N)
        return logprob_N, entropy_N

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor, Tensor | None, Tensor | None, None, None, None, None]:
        hidden_ND, weight_VD, bias_V, target_N, normaliser_N = ctx.saved_tensors
        grad_N = grads[0].contiguous()
        if ctx.temperature != 1.0:
            grad_N = grad_N / ctx.temperature  # from here on by the logits before they are divided
        d_hidden_ND = torch.empty_like(hidden_ND)
        d_weight_VD: Tensor | None = None  # of a frozen head
        if ctx.total is not None:
            d_weight_VD = ctx.total.total(weight_VD)
        elif ctx.needs_input_grad[1]:
            d_weight_VD = torch.zeros_like(weight_VD, dtype=torch.float32)
        d_bias_V = torch.zeros_like(bias_V, dtype=torch.float32) if ctx.needs_input_grad[2] else None
        several = ctx.chunk * _CHUNKS_PER_PRODUCT.get(hidden_ND.device.type, 1)
        buffer = hidden_ND.new_empty(min(several, len(target_N)), weight_VD.shape[0])
        for a in range(0, len(target_N), several):
            group = slice(a, a + several)
            hidden_gD = hidden_ND[group]
            d_logits_gV = buffer[: len(hidden_gD)]
            for b in range(0, len(hidden_gD), ctx.chunk):
                part = slice(a + b, min(a + b + ctx.chunk, a + several))
                logits_nV = _logits(hidden_ND[part], weight_VD, bias_V, ctx.temperature)
                inside = d_logits_gV[b : b + ctx.chunk]
                _gradient(logits_nV, target_N[part], normaliser_N[part], grad_N[part], inside)
                del logits_nV
            if d_bias_V is not None:
                d_bias_V += d_logits_gV.sum(0, dtype=torch.float32)
            d_hidden_ND[group] = d_logits_gV @ weight_VD
            if d_weight_VD is not None:
                _add_product(d_weight_VD, d_logits_gV, hidden_gD)
        d_bias = None if bias_V is None or d_bias_V is None else d_bias_V.to(bias_V.dtype)
        d_weight = d_weight_VD.to(weight_VD.dtype) if ctx.total is None and d_weight_VD is not None else None
        return d_hidden_ND, d_weight, d_bias, None, None, None, None


def chunked_logprob(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    target_N: Tensor,
    *,
    bias_V: Tensor | None = None,
    chunk: int = 1024,
    temperature: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """log p(target) with gradients, and the distribution's entropy (nats, without); both fp32 [N]. p is the softmax of
    the logits divided by `temperature`."""
    total = weight_gradients.of(weight_VD)
    return _ChunkedLogprob.apply(hidden_ND, weight_VD, bias_V, target_N, chunk, temperature, total)


class PolicyModel(nn.Module):
    """A causal language model whose forward is what training needs: log-probabilities of chosen tokens.

    It is also the FSDP root: the base model and the output head run inside one forward, so that tied and head
    parameters are whole where they are used.
    """

    def __init__(self, model: nn.Module, *, chunk: int | None = None, temperature: float = 1.0):
        """`temperature`: of the draws (`rollout.temperature`). A factor that the model puts on its logits divides it:
        both scale the same logits."""
        super().__init__()
        self.model = model
        self.chunk = chunk
        config: Any = getattr(model, "config", None)
        self.temperature = temperature / logit_factor(config.to_dict() if hasattr(config, "to_dict") else {})
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
        **boundaries: Any,
    ) -> tuple[Tensor, Tensor]:
        """Log-probability and entropy of `target_N`, predicted by the hidden states at flat positions `predict_N`.

        `boundaries`: what `varlen.boundaries` gives for a packed row. With no token chosen the result is an empty
        tensor that still has every parameter in its graph: collectives of the backward pass match on all ranks.
        """
        base: Any = self.model.base_model
        arguments = boundaries if position_ids is None else boundaries | {"position_ids": position_ids}
        hidden_BLD = base(
            input_ids=tokens_BL, attention_mask=attention_mask, use_cache=False, **arguments
        ).last_hidden_state
        hidden_ND = hidden_BLD.flatten(0, 1).index_select(0, predict_N)  # not [...]: its backward pass sorts
        head: Any = self.model.get_output_embeddings()  # type: ignore[operator]
        chunk = self.chunk or chunk_tokens(self.vocabulary, tokens_BL.device.type)
        return chunked_logprob(
            hidden_ND, head.weight, target_N, bias_V=head.bias, chunk=chunk, temperature=self.temperature
        )
