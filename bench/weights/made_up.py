"""Made-up weights: two versions in the shapes of a Qwen3.5 config, one some Adam steps behind the other."""

from __future__ import annotations

import torch

from astracli.models import registry
from astracli.weights.device.difference import bits_torch

Weights = dict[str, torch.Tensor]
SHAPES = {
    "4b": {
        "hidden_size": 2560, "intermediate_size": 9216, "num_hidden_layers": 32, "num_attention_heads": 16,
        "num_key_value_heads": 4, "head_dim": 256, "linear_num_key_heads": 16, "linear_num_value_heads": 32,
        "linear_key_head_dim": 128, "linear_value_head_dim": 128, "vocab_size": 248320,
    },
    "0.1b": {
        "hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 8, "num_attention_heads": 4,
        "num_key_value_heads": 1, "head_dim": 128, "linear_num_key_heads": 4, "linear_num_value_heads": 8,
        "linear_key_head_dim": 128, "linear_value_head_dim": 128, "vocab_size": 49152,
    },
    "0.01b": {
        "hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 8, "num_attention_heads": 2,
        "num_key_value_heads": 1, "head_dim": 128, "linear_num_key_heads": 2, "linear_num_value_heads": 4,
        "linear_key_head_dim": 64, "linear_value_head_dim": 64, "vocab_size": 16384,
    },
    "names": {
        "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 32, "num_attention_heads": 2,
        "num_key_value_heads": 1, "head_dim": 16, "linear_num_key_heads": 2, "linear_num_value_heads": 2,
        "linear_key_head_dim": 16, "linear_value_head_dim": 16, "vocab_size": 64,
    },
}  # fmt: skip
"""`names`: as many tensors as `4b` has, of no size: what is done for each of them."""
MOMENT = (0.1 / 1.9) ** 0.5
"""Standard deviation of Adam's settled first moment (beta 0.9) under unit noise; its second moment is then 1."""


def versions(shape: str, lr: float, steps: int, device: str) -> tuple[Weights, Weights]:
    """Published weights before and after `steps` Adam steps; the same for the same arguments."""
    config = {"model_type": "qwen3_5_text", "tie_word_embeddings": True, **SHAPES[shape]}
    adapter = next(a for item in registry.installed() if (a := item.plugin) and "qwen3_5_text" in a.model_types)
    assert adapter.shapes is not None
    draw = torch.Generator(device).manual_seed(0)
    base, new = {}, {}
    for name, size in adapter.shapes(config).items():
        dtype = torch.float32 if any(part in name for part in adapter.keep_fp32) else torch.bfloat16
        center = 1.0 if name.endswith("norm.weight") else 0.0
        master = torch.randn(size, generator=draw, device=device).mul_(0.02).add_(center)
        base[name] = master.to(dtype, copy=True)
        moment = torch.randn(size, generator=draw, device=device).mul_(MOMENT)
        for _ in range(steps):
            moment.mul_(0.9).add_(torch.randn(size, generator=draw, device=device), alpha=0.1)
            master.sub_(moment, alpha=lr)
        new[name] = master.to(dtype)
    return base, new


def same_bits(one: Weights, two: Weights) -> bool:
    flat = [(bits_torch(one[n].view(-1)), bits_torch(two[n].view(-1))) for n in one]
    return one.keys() == two.keys() and all(torch.equal(a, b) for a, b in flat)
