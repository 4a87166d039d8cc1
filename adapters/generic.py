"""Any dense causal language model that transformers can load, by name only: `model.adapter = "generic"`.

It claims no `model_type`, because it knows nothing of a family: no recurrent state, no fp32-kept tensors, no text tower
in a bigger checkpoint. The checkpoint's tensor names must be the model's own (mixture-of-experts models, whose experts
transformers fuses while loading, are refused by name).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from astracli.errors import UserError
from astracli.models.adapter import MemoryShape, ModelAdapter
from astracli.models.adapter_tools import gemm_flops, load_checkpoint, outside_blocks, wire_map

_RECURRENT = ("linear_attention", "mamba", "recurrent", "conv")


def load(path: Path, *, attention: str = "sdpa") -> Any:
    """AutoModelForCausalLM in fp32. Raises UserError for names that do not match and for recurrent layers."""
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        config = AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # whatever transformers raises of what the file says
        raise UserError(f"cannot read the config of `{path}`: {' '.join(str(error).split())[:300]}") from error
    recurrent = sorted({t for t in getattr(config, "layer_types", None) or [] if t in _RECURRENT})
    if recurrent:
        raise UserError(
            f"adapter `generic` is for dense models; `{path}` has {', '.join(recurrent)} layers",
            "a hybrid needs its own adapter: `astra adapters list` shows those installed",
        )
    return load_checkpoint(AutoModelForCausalLM, path, attention=attention)


def memory_shape(config: Mapping[str, Any]) -> MemoryShape:
    """Sizes counted on a model built without memory (meta device): imports torch, unlike the named families."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    document = dict(config)
    try:
        settings = AutoConfig.for_model(document.pop("model_type"), **document)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(settings)
    except Exception as error:  # the same
        raise UserError(f"adapter `generic` cannot build this config: {' '.join(str(error).split())[:300]}") from error
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    heads = settings.num_attention_heads
    kv_heads = getattr(settings, "num_key_value_heads", None) or heads
    head_dim = getattr(settings, "head_dim", None) or settings.hidden_size // heads
    return MemoryShape(
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        vocab_size=settings.vocab_size,
        hidden_size=settings.hidden_size,
        layers=settings.num_hidden_layers,
        kv_bytes_per_token=2 * 2 * kv_heads * head_dim * settings.num_hidden_layers,
        state_bytes_per_sequence=0,
        flops_per_token=gemm_flops(shapes, tied=bool(getattr(settings, "tie_word_embeddings", False))),
        outside_blocks=outside_blocks(shapes),
    )


ADAPTER = ModelAdapter(
    name="generic",
    model_types=(),
    summary="any dense causal model of transformers, asked for by name",
    load_for_training=load,
    load_for_serving=load,
    memory_shape=memory_shape,
    wire_tensors=wire_map,
)
