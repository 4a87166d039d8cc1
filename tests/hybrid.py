"""A random tiny hybrid, and tokens for it."""

from __future__ import annotations

from typing import Any

import torch
from transformers import Qwen3_5ForCausalLM, Qwen3_5TextConfig

from astracli.adapters import qwen3_5


def tiny_text(seed: int = 0, **changes: Any) -> Any:
    """A random tiny hybrid whose logits have a standard deviation near 1."""
    torch.manual_seed(seed)
    changes = {"initializer_range": 0.15} | changes
    return Qwen3_5ForCausalLM(Qwen3_5TextConfig.from_dict(qwen3_5.tiny_config() | changes)).float().eval()


def row(length: int, seed: int = 1, batch: int = 1) -> torch.Tensor:
    return torch.randint(2, 64, (batch, length), generator=torch.Generator().manual_seed(seed))
