"""Two checks that a run must not start without: rows == separate, and trainer == engine.

rows == separate: the log-probabilities of rows padded together equal those of each row alone. A model whose recurrent
or convolution state leaks between or through padded rows fails here. trainer == engine: on tokens that the engine drew
under the very weights that the trainer holds, both give the same log-probability.
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


def require_parity(mean: float, largest: float, tokens: int, tolerance: float, version: int) -> None:
    """Raise RunFailed when trainer and engine disagree on tokens of the trainer's own version."""
    if not mean <= tolerance:
        raise RunFailed(
            f"trainer and engine disagree at version {version}: mean |log-probability difference| {mean:.2e}, "
            f"largest {largest:.2e}, over {tokens} tokens of that version; allowed mean {tolerance:.0e}",
            "the engine's weights or kernels are not the trainer's; compare them with `astra doctor`, or raise "
            "train.parity_tolerance if the difference is understood",
        )
