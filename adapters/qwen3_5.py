"""Qwen3.5: three Gated DeltaNet layers to one of full attention; trained text-only, also from multimodal checkpoints.

What is special, and handled here:
- the full checkpoint names its text tensors `model.language_model.*`, beside `model.visual.*` and `mtp.*`; engines want
  `model.*`;
- `A_log` stays in fp32 in the engine, so it travels in fp32;
- a 2-D mask is never needed: causal rows padded on the right are exact for both layer kinds;
- the delta rule and the convolution carry state across a packed row, so both must be reset at every boundary
  (`qwen3_5_layers.py`).

Sizes are in `qwen3_5_sizes.py`. For a family without any of this, begin with a copy of `llama.py`.
"""

from __future__ import annotations

import inspect
import json
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from astracli.adapters import qwen3_5_layers as layers
from astracli.adapters import qwen3_5_sizes as sizes
from astracli.models.adapter import DeltaRule, Forbidden, ModelAdapter, WireTensor, read_config
from astracli.models.adapter_tools import DENSE_PROJECTIONS, load_checkpoint, wire_map

KEEP_FP32 = ("A_log",)
FROZEN = ("model.visual.", "visual.", "mtp.")
GPU_KERNELS = (
    "FusedRMSNormGated",
    "causal_conv1d_fn",
    "causal_conv1d_update",
    "chunk_gated_delta_rule",
    "fused_recurrent_gated_delta_rule",
)


def text_name(name: str) -> str | None:
    """Checkpoint name -> text-model name; None for a tensor that is never trained."""
    if name.startswith(FROZEN):
        return None
    return name.replace("model.language_model.", "model.", 1)


def load(path: Path, *, attention: str = "sdpa") -> Any:
    """Qwen3_5ForCausalLM in fp32. Raises UserError naming text tensors that are missing or left over."""
    from transformers import Qwen3_5ForCausalLM, Qwen3_5TextConfig

    document = sizes.text_config(read_config(Path(path)))
    document["model_type"] = "qwen3_5_text"
    with _torch_kernels_without_gpu():
        return load_checkpoint(
            Qwen3_5ForCausalLM,
            path,
            attention=attention,
            config=lambda: Qwen3_5TextConfig.from_dict(document),
            text_name=text_name,
        )


@contextmanager
def _torch_kernels_without_gpu() -> Iterator[None]:
    """Build the model from torch kernels where there is no GPU: an installed fla would ask for one while building."""
    import torch
    from transformers.models.qwen3_5 import modeling_qwen3_5 as modeling

    if torch.cuda.is_available():
        yield
        return
    saved = {name: getattr(modeling, name) for name in GPU_KERNELS if hasattr(modeling, name)}
    # what newer transformers define themselves is called by every model, one that generates meanwhile too
    own = [name for name, value in saved.items() if value and inspect.unwrap(value).__module__ == modeling.__name__]
    for name in own:
        del saved[name]
    log = logging.getLogger(modeling.__name__)
    level = log.level
    log.setLevel(logging.ERROR)  # "the fast path is not available": on a CPU there is none
    try:
        for name in saved:
            setattr(modeling, name, None)
        yield
    finally:
        log.setLevel(level)
        for name, value in saved.items():
            setattr(modeling, name, value)


def prepare_cpu(model: Any) -> None:
    """Torch kernels on every Gated DeltaNet module, and norms, in forms that are quick on a CPU (same numbers)."""
    import torch
    from transformers.models.qwen3_5 import modeling_qwen3_5 as modeling

    from astracli.kernels.cpu import delta_rule

    layers.torch_on_cpu()
    for module in layers.delta_net_modules(model):
        if hasattr(module, "chunk_gated_delta_rule"):  # before transformers 5.16 kernels are attributes
            module.causal_conv1d_fn = delta_rule.conv_silu
            module.causal_conv1d_update = modeling.torch_causal_conv1d_update
            module.chunk_gated_delta_rule = layers.torch_rule()
            module.recurrent_gated_delta_rule = modeling.torch_recurrent_gated_delta_rule
        else:
            layers.install_varlen(module, all_rows=True)  # since then functions that all models share
        if not isinstance(module.norm, modeling.Qwen3_5RMSNormGated):
            norm = modeling.Qwen3_5RMSNormGated(module.head_v_dim, eps=module.layer_norm_epsilon)
            norm.weight = torch.nn.Parameter(module.norm.weight.detach().to("cpu", torch.float32))
            module.norm = norm
    own_forward: dict[type, Any] = {modeling.Qwen3_5RMSNormGated: _gated_norm, modeling.Qwen3_5RMSNorm: _norm}
    for module in model.modules():
        if (forward := own_forward.get(type(module))) is not None:
            module.forward = partial(forward, module)


def decoding(model: Any) -> Any:
    from astracli.adapters import qwen3_5_decoding

    return qwen3_5_decoding.decoding(model)


def _norm(module: Any, x: Any) -> Any:
    from astracli.kernels.cpu.norms import rms_norm

    return rms_norm(x.float(), 1.0 + module.weight.float(), module.eps).type_as(x)


def _gated_norm(module: Any, x: Any, gate: Any) -> Any:
    from astracli.kernels.cpu.norms import gated_rms_norm

    return gated_rms_norm(x.float(), gate.float(), module.weight.float(), module.variance_epsilon).type_as(x)


def wire_tensors(model: Any) -> dict[str, WireTensor]:
    return wire_map(model, sizes.text_shapes(model.config.to_dict()), KEEP_FP32)


def delta_rule(config: Mapping[str, Any], device: str) -> DeltaRule:
    """The chunk rule as a trainer layer calls it: ours on a CPU, fla's on a GPU where it is installed."""
    from astracli.kernels.gpu import fused

    kernels = fused.fla() if device == "cuda" else None
    _, value_heads, key_dim, value_dim, _ = sizes.delta_net_sizes(sizes.text_config(config))
    rule = kernels.rule if kernels is not None else layers.torch_rule()
    return DeltaRule(rule, value_heads, key_dim, value_dim)


def engine_flags(config: Mapping[str, Any]) -> dict[str, Any]:
    """The interval that text configs of transformers lack."""
    flags: dict[str, Any] = {}
    text = sizes.text_config(config)
    if "full_attention_interval" not in text:
        override: dict[str, Any] = {"full_attention_interval": sizes.interval(text)}
        nested = {"text_config": override} if "text_config" in config else override
        flags["json_model_override_args"] = json.dumps(nested)
    return flags


def text_only_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """config.json of the text model alone, with the interval that SGLang reads and transformers does not write."""
    text = sizes.text_config(config)
    own = {"model_type": "qwen3_5_text", "architectures": ["Qwen3_5ForCausalLM"]}
    return text | own | {"full_attention_interval": sizes.interval(text)}


def tiny_config() -> dict[str, Any]:
    return {
        "model_type": "qwen3_5_text",
        "architectures": ["Qwen3_5ForCausalLM"],
        "vocab_size": 64,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
        "linear_conv_kernel_dim": 4,
        "full_attention_interval": 4,
        "max_position_embeddings": 256,
        "tie_word_embeddings": True,
        "pad_token_id": 0,
        "eos_token_id": 1,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 10000.0,
            "partial_rotary_factor": 0.5,
            "mrope_section": [2, 1, 1],
        },
    }


ADAPTER = ModelAdapter(
    name="qwen3_5",
    model_types=("qwen3_5", "qwen3_5_text"),
    summary="Qwen3.5 hybrids (Gated DeltaNet and full attention), text-only",
    load_for_training=load,
    load_for_serving=load,
    memory_shape=sizes.memory_shape,
    wire_tensors=wire_tensors,
    engine_flags=engine_flags,
    attention_mask=lambda mask: None,
    install_varlen=layers.install_varlen,
    shares_prompts=True,
    prepare_cpu=prepare_cpu,
    decoding=decoding,
    prepare_gpu=layers.prepare_gpu,
    keep_fp32=KEEP_FP32,
    frozen=FROZEN,
    forbidden=(
        Forbidden("fa3", ("8.9",), 'a Gated DeltaNet hybrid dies under load there ("CUDA error: invalid argument")'),
        Forbidden(
            "fa3", ("8.6",), "it takes the kernels of 8.9, and a Gated DeltaNet hybrid dies under load with them"
        ),
        Forbidden("fa3", ("9.0",), "not run with a Gated DeltaNet hybrid yet", refused=False),
    ),
    hybrid=True,
    wire_name=text_name,
    text_only_config=text_only_config,
    known_configs={
        "Qwen/Qwen3.5-4B": {"model_type": "qwen3_5", "text_config": sizes.TEXT_4B},
        "Qwen/Qwen3.5-0.8B": {"model_type": "qwen3_5", "text_config": sizes.TEXT_0_8B},
    },
    shapes=sizes.text_shapes,
    delta_rule=delta_rule,
    lora_targets=(*DENSE_PROJECTIONS, "in_proj_qkv", "in_proj_z", "in_proj_b", "in_proj_a", "out_proj"),
    tiny_config=tiny_config,
)
