"""The check that a run must not start without: rows == separate. (`agreement` is the other one: trainer == engine.)

The log-probabilities of rows joined into one micro-batch, and their gradient, equal those of each row alone. A model
whose recurrent or convolution state leaks between or through rows fails here.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from astracli.adapter import ModelAdapter
from astracli.errors import RunFailed
from astracli.rl.batch import Join, MicroBatch, Row, pad_rows
from astracli.training import packing, varlen
from astracli.training.fsdp import Ranks
from astracli.training.logprob import PolicyModel

ROWS_TOLERANCE = {"cpu": 1e-4, "cuda": 0.25}
"""Largest |difference| of one token. On a GPU bf16 kernels choose other tilings for other shapes, so single tokens
move by a few hundredths; a leak moves them by whole units."""
GRADIENT_TOLERANCE = {"cpu": 1e-4, "cuda": 1e-2}
"""Largest |difference| of the gradient over its norm. A leak through Gated DeltaNet layers gives 0.96."""
MOST_ROWS = 8


def logprobs(
    policy: PolicyModel, adapter: ModelAdapter, micro: MicroBatch, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probability and entropy, each fp32 [N], of a micro-batch's loss tokens."""
    if device.type == "cuda":
        micro = packing.rounded(micro)
    predict_N, target_N = (torch.from_numpy(x).to(device) for x in (micro.predict_N, micro.target_N))
    tokens_BL = torch.from_numpy(micro.tokens_BL).to(device)
    if micro.bounds_S1 is not None:
        positions_1T = torch.from_numpy(packing.positions(micro.bounds_S1))[None].to(device)
        boundaries = varlen.boundaries(micro.bounds_S1, device)
        return policy(tokens_BL, None, positions_1T, predict_N, target_N, **boundaries)
    mask = torch.from_numpy(micro.mask_BL).to(device)
    position_ids = adapter.position_ids(mask) if adapter.position_ids else None
    return policy(tokens_BL, adapter.attention_mask(mask), position_ids, predict_N, target_N)


def spread(rows: Sequence[Row], tokens_per_microbatch: int) -> list[Row]:
    """Up to MOST_ROWS rows from short to long that fit in one micro-batch; at least two where there are two."""
    by_length = sorted(rows, key=lambda r: (len(r), r.index))
    fit = max(2, tokens_per_microbatch // len(by_length[-1]))
    count = min(MOST_ROWS, fit, len(by_length))
    return [by_length[(i * (len(by_length) - 1)) // max(1, count - 1)] for i in range(count)]


@torch.no_grad()
def rows_against_separate(
    policy: PolicyModel,
    adapter: ModelAdapter,
    rows: Sequence[Row],
    device: torch.device,
    *,
    join: Join,
    pad_token: int,
) -> float:
    """Largest |difference of log-probabilities| between rows joined into one micro-batch and each alone.

    A collective when the policy is sharded: every rank must bring the same rows.
    """
    together, _ = logprobs(policy, adapter, join(list(rows), pad_token), device)
    alone = torch.cat([logprobs(policy, adapter, pad_rows([row], pad_token), device)[0] for row in rows])
    return float((together - alone).abs().max())


def gradients_against_separate(
    policy: PolicyModel,
    adapter: ModelAdapter,
    rows: Sequence[Row],
    ranks: Ranks,
    *,
    join: Join,
    pad_token: int,
) -> float:
    """|difference| / |gradient of the rows together| of their mean log-probability, over all parameters of all ranks.

    The rows alone are taken off the gradient that the rows together left, so no second set of gradients is held. Every
    rank must bring the same rows. Gradients are None before and after.
    """
    tokens = sum(row.loss_tokens for row in rows)

    def norm() -> float:
        return ranks.squares(p.grad for p in policy.parameters() if p.grad is not None) ** 0.5

    logprob_N, _ = logprobs(policy, adapter, join(list(rows), pad_token), ranks.device)
    (logprob_N.sum() / tokens).backward()
    whole = norm()
    for row in rows:
        logprob_N, _ = logprobs(policy, adapter, pad_rows([row], pad_token), ranks.device)
        (-logprob_N.sum() / tokens).backward()
    difference = norm()
    policy.zero_grad(set_to_none=True)
    return difference / whole if whole else difference


def require_rows(difference: float, device: torch.device, adapter: ModelAdapter, packed: bool = False) -> None:
    """Raise RunFailed when joined rows do not equal separate ones."""
    tolerance = ROWS_TOLERANCE.get(device.type, ROWS_TOLERANCE["cuda"])
    _require(difference, tolerance, "log-probability", adapter, packed)


def require_gradients(difference: float, device: torch.device, adapter: ModelAdapter, packed: bool) -> None:
    """Raise RunFailed when the gradient of joined rows is not that of separate ones."""
    tolerance = GRADIENT_TOLERANCE.get(device.type, GRADIENT_TOLERANCE["cuda"])
    _require(difference, tolerance, "gradient, relative to its norm", adapter, packed)


def _require(difference: float, tolerance: float, what: str, adapter: ModelAdapter, packed: bool) -> None:
    if difference <= tolerance:
        return
    joined = "packed in one row" if packed else "padded together"
    why = f"adapter `{adapter.name}` gives this model a wrong attention mask; run `astra doctor`"
    if packed:
        why = f"adapter `{adapter.name}` loses the boundaries of a packed row; `--set train.packing=padded` trains on"
    raise RunFailed(
        f"rows {joined} differ from separate rows by {difference:.2e} in {what}, "
        f"allowed {tolerance:.0e}: state leaks between positions or rows",
        why,
    )
