"""Tiny models for the engine's tests (Qwen3.5, Llama, Qwen3, Qwen2), random but peaked enough to decode."""

from __future__ import annotations

from typing import Any

import torch

VOCAB = 32


def tiny_model(kind: str, seed: int = 0) -> Any:
    """fp32 model of about 100k parameters; `kind`: qwen3_5, llama, qwen3, qwen2."""
    from transformers import (
        LlamaConfig,
        LlamaForCausalLM,
        Qwen2Config,
        Qwen2ForCausalLM,
        Qwen3_5ForCausalLM,
        Qwen3_5TextConfig,
        Qwen3Config,
        Qwen3ForCausalLM,
    )

    torch.manual_seed(seed)
    shape: dict[str, Any] = {
        "vocab_size": VOCAB,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 512,
        "tie_word_embeddings": True,
        "pad_token_id": 0,
        "eos_token_id": 1,
        "initializer_range": 0.06,
    }
    if kind == "qwen3_5":
        config = Qwen3_5TextConfig(
            **shape,
            num_hidden_layers=4,
            linear_num_key_heads=2,
            linear_num_value_heads=4,
            linear_key_head_dim=16,
            linear_value_head_dim=16,
            rope_parameters={
                "rope_type": "default",
                "rope_theta": 10000.0,
                "partial_rotary_factor": 0.25,
                "mrope_section": [1, 1, 0],
            },
        )
        return Qwen3_5ForCausalLM(config).float().eval()
    if kind == "llama":
        return LlamaForCausalLM(LlamaConfig(**shape, num_hidden_layers=2)).float().eval()
    if kind == "qwen2":
        model = Qwen2ForCausalLM(Qwen2Config(**shape, num_hidden_layers=2)).float().eval()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name.endswith(".bias"):  # zero in a new model: what leaves them out would pass
                    parameter.normal_(std=0.5)
        return model
    return Qwen3ForCausalLM(Qwen3Config(**shape, num_hidden_layers=2)).float().eval()


@torch.no_grad()
def reference_logprobs(model: Any, prompt: list[int], completion: list[int], temperature: float = 1.0) -> list[float]:
    """log p(completion | prompt) at a temperature, token by token, from one full forward without a cache."""
    ids = torch.tensor([prompt + completion])
    logprobs = model(input_ids=ids).logits[0].float().div(temperature or 1.0).log_softmax(-1)
    return [logprobs[len(prompt) - 1 + i, token].item() for i, token in enumerate(completion)]
