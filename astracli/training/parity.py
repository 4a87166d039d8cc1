"""The check that a run must not start without: rows == separate. (`agreement` is the other one: trainer == engine.)

The log-probabilities of rows padded together equal those of each row alone. A model whose recurrent or convolution
state leaks between or through padded rows fails here.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from astracli.adapter import ModelAdapter
from astracli.errors import RunFailed
from astracli.rl.batch import MicroBatch, Row, pad_rows
from astracli.training.logprob import PolicyModel

ROWS_TOLERANCE = {"cpu": 1e-4, "cuda": 0.25}
"""Largest |difference| of one token. On a GPU bf16 kernels choose other tilings for other shapes, so single tokens
move by a few hundredths; a leak moves them by whole units."""
MOST_ROWS = 8


def logprobs(
    policy: PolicyModel, adapter: ModelAdapter, micro: MicroBatch, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probability and entropy, each fp32 [N], of a micro-batch's loss tokens."""
    mask = torch.from_numpy(micro.mask_BL).to(device)
    return policy(
        torch.from_numpy(micro.tokens_BL).to(device),
        adapter.attention_mask(mask),
        adapter.position_ids(mask) if adapter.position_ids else None,
        torch.from_numpy(micro.predict_N).to(device),
        torch.from_numpy(micro.target_N).to(device),
    )


@torch.no_grad()
def rows_against_separate(
    policy: PolicyModel,
    adapter: ModelAdapter,
    rows: Sequence[Row],
    device: torch.device,
    *,
    tokens_per_microbatch: int,
    pad_token: int,
) -> float:
    """Largest |difference| over a spread of rows, short to long, padded together against each alone.

    A collective when the policy is sharded: every rank must bring the same rows.
    """
    by_length = sorted(rows, key=lambda r: (len(r), r.index))
    fit = max(2, tokens_per_microbatch // len(by_length[-1]))
    count = min(MOST_ROWS, fit, len(by_length))
    chosen = [by_length[(i * (len(by_length) - 1)) // max(1, count - 1)] for i in range(count)]
    together, _ = logprobs(policy, adapter, pad_rows(chosen, pad_token), device)
    alone = torch.cat([logprobs(policy, adapter, pad_rows([row], pad_token), device)[0] for row in chosen])
    return float((together - alone).abs().max())


def require_rows(difference: float, device: torch.device, adapter: ModelAdapter) -> None:
    """Raise RunFailed when padded rows do not equal separate ones."""
    tolerance = ROWS_TOLERANCE.get(device.type, ROWS_TOLERANCE["cuda"])
    if not difference <= tolerance:
        raise RunFailed(
            f"rows padded together differ from separate rows by {difference:.2e} in log-probability, "
            f"allowed {tolerance:.0e}: state leaks between positions or rows",
            f"adapter `{adapter.name}` gives this model a wrong attention mask; run `astra doctor`",
        )
