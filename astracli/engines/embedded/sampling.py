"""Choosing the next token: counter-based draws, temperature, top-p, and the log-probability of what was chosen.

A draw depends on (seed, position in the completion) alone, never on the batch, the slot or what was drawn before. So a
completion that is cut off and continued later draws what it would have drawn uninterrupted.

Shape letters: N rows, V vocabulary.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

_STRIDE = np.uint64(0x9E3779B97F4A7C15)
_MASK = (1 << 64) - 1


def seed_bits(seed: int) -> int:
    """Any Python integer -> the 64 bits that stand for it (negative ones in two's complement)."""
    return seed & _MASK


def uniforms(seeds: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """One draw in [0, 1) per row: splitmix64 over (seed, position).

    Shapes: seeds uint64 [N], positions integer [N] -> float64 [N] with 53 random bits.
    """
    stream = _mix(seeds.astype(np.uint64) + _STRIDE)
    bits = _mix(stream + (positions.astype(np.uint64) + np.uint64(1)) * _STRIDE)
    return (bits >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _mix(x: np.ndarray) -> np.ndarray:
    """splitmix64's finaliser, uint64 [N] -> uint64 [N]; arrays wrap around without a warning."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def choose(
    logits: Tensor, temperature: np.ndarray, top_p: np.ndarray, draws: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Next tokens and their log-probabilities.

    Shapes: logits [N, V], temperature, top_p and draws float [N] -> tokens int64 [N], logprobs float32 [N].
    Temperature 0 takes the most likely token. The log-probability is that of the distribution after temperature (at 0:
    of temperature 1) and before top-p, in fp32: what the trainer computes too.
    """
    logits = logits.float()
    scale = np.where(temperature == 0, 1.0, temperature).astype(np.float32)
    scaled = logits if (scale == 1).all() else logits / torch.from_numpy(scale).to(logits.device)[:, None]
    logprobs = scaled.log_softmax(-1)
    if (temperature == 0).all():
        tokens = logits.argmax(-1)
    else:
        probs = logprobs.exp() if (temperature == 1).all() else scaled.softmax(-1)
        tokens = _draw(probs, temperature, top_p, draws)
        if (temperature == 0).any():
            greedy = torch.from_numpy(temperature == 0).to(logits.device)
            tokens = torch.where(greedy, logits.argmax(-1), tokens)
    return tokens.cpu().numpy(), logprobs.gather(1, tokens[:, None])[:, 0].cpu().numpy()


def _draw(probs: Tensor, temperature: np.ndarray, top_p: np.ndarray, draws: np.ndarray) -> Tensor:
    """Inverse-CDF sampling, int64 [N]; rows of temperature 0 get something harmless."""
    u = torch.from_numpy(draws).to(probs.device)
    tokens = _invert(probs, u)
    filtered = np.flatnonzero((top_p < 1) & (temperature > 0))
    if len(filtered):
        rows = torch.from_numpy(filtered).to(probs.device)
        kept, order = nucleus(probs[rows], torch.from_numpy(top_p[filtered]).to(probs.device))
        tokens[rows] = order.gather(1, _invert(kept, u[rows])[:, None])[:, 0]
    return tokens


def nucleus(probs: Tensor, top_p: Tensor) -> tuple[Tensor, Tensor]:
    """The smallest set of most likely tokens whose mass reaches `top_p`.

    Shapes: probs [N, V], top_p [N] -> (probabilities, most likely first, 0 outside the set [N, V]; token ids [N, V]).
    Ties keep the lower token id. The most likely token always stays.
    """
    ranked, order = probs.sort(dim=-1, descending=True, stable=True)
    before = ranked.double().cumsum(-1) - ranked
    return ranked.masked_fill(before >= top_p[:, None], 0.0), order


def _invert(weights: Tensor, u: Tensor) -> Tensor:
    """First index whose cumulative weight exceeds u x total: weights [N, V], u float64 [N] -> int64 [N]."""
    cdf = weights.double().cumsum(-1)
    # Sum order makes the total land a rounding error away from 1: scale the draw instead of the distribution.
    return torch.searchsorted(cdf, u[:, None] * cdf[:, -1:], right=True)[:, 0].clamp_(max=weights.shape[1] - 1)
