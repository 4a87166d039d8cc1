"""What several adapters share: reading checkpoint headers, strict loading, strict wire names, sizes from shapes.

A family describes its text tensors once, as `{HF name: shape}` computed from config.json. Parameter counts, FLOPs and
the wire map all come from that table, and a loaded model that does not match it is refused with the names.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Mapping
from math import prod
from pathlib import Path
from typing import Any

from astracli.config import reading
from astracli.errors import UserError
from astracli.models.adapter import MemoryShape, WireTensor

Shapes = dict[str, tuple[int, ...]]
DENSE_PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
"""The linear layers of a Llama-shaped block."""
HEADER_BYTES = 100_000_000
"""Longest header that the format allows."""
DTYPE_BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E4M3": 8, "F8_E5M2": 8, "I16": 16, "U16": 16, "F16": 16, "BF16": 16,
    "I32": 32, "U32": 32, "F32": 32, "I64": 64, "U64": 64, "F64": 64,
}  # fmt: skip
"""Of a tensor's elements; a dtype that is not here is not checked for its size."""
_MOST_DIMENSIONS = 64
_BUFFERS = re.compile(
    r"(rotary_emb\.(inv_freq|cos_cached|sin_cached)|(attn|attention)\.(bias|masked_bias)|position_ids)$"
)
_WRAPPERS = re.compile(r"(_orig_mod|_checkpoint_wrapped_module|_fsdp_wrapped_module)\.")


def checkpoint_tensors(path: Path) -> dict[str, dict[str, Any]]:
    """Tensor name -> `dtype` and `shape`, of every shard in a directory, from the headers alone; `{}` without shards.

    Raises UserError for a file that is no whole safetensors file (a broken download, a git-lfs pointer).
    """
    found: dict[str, dict[str, Any]] = {}
    for file in sorted(path.glob("*.safetensors")):
        try:
            with reading.opened(file) as stream:
                size = int.from_bytes(stream.read(8), "little")
                if not 0 < size <= min(HEADER_BYTES, file.stat().st_size - 8):
                    raise ValueError("header length does not fit the file")
                header = reading.from_json(stream.read(size).decode("utf-8"))
                if not isinstance(header, dict):
                    raise ValueError("its header is not a JSON object")
                _check_offsets(header, file.stat().st_size - 8 - size)
        except (OSError, ValueError, TypeError, KeyError, AttributeError, IndexError) as error:
            raise UserError(
                f"`{file}` is not a whole safetensors file: {error}", "download the checkpoint again"
            ) from None
        found.update({name: entry for name, entry in header.items() if name != "__metadata__"})
    return found


def _check_offsets(header: Mapping[str, Any], have: int) -> None:
    """The tensors of a shard lie one behind another and fill it. Raises ValueError."""
    entries = {name: entry for name, entry in header.items() if name != "__metadata__"}
    for name, entry in entries.items():
        if not _well_formed(entry):
            raise ValueError(f"the entry of `{name[:80]}` in it has no dtype, shape and place")
    end = 0
    for name, entry in sorted(entries.items(), key=lambda item: item[1]["data_offsets"]):
        low, high = entry["data_offsets"]
        size = prod(entry["shape"]) * DTYPE_BITS.get(entry["dtype"], 0) // 8
        if low != end or high < low or (size and size != high - low):
            raise ValueError(f"the place of `{name[:80]}` in it is wrong")
        end = high
    if end != have:
        raise ValueError(f"its header promises {end} bytes of tensors, it holds {have}")


def _well_formed(entry: Any) -> bool:
    if not isinstance(entry, dict) or not isinstance(entry.get("dtype"), str):
        return False
    shape, place = entry.get("shape"), entry.get("data_offsets")
    if not isinstance(shape, list) or not isinstance(place, list):
        return False
    return len(place) == 2 and len(shape) <= _MOST_DIMENSIONS and all(type(each) is int for each in [*shape, *place])


def is_buffer(name: str) -> bool:
    """A tensor that older checkpoints hold and a model computes itself: frequencies of its rotary embedding, a causal
    mask. Of a name that the model has a parameter for, ask that first."""
    return _BUFFERS.search(name) is not None


def has_chat_template(path: Path) -> bool:
    """The tokenizer beside the weights brings a chat template; without one prompts are bare text."""
    settings = path / "tokenizer_config.json"
    named = settings.is_file() and '"chat_template"' in settings.read_text(errors="replace")
    return named or any((path / name).is_file() for name in ("chat_template.jinja", "chat_template.json"))


def load_checkpoint(
    model_class: Any,
    path: Path,
    *,
    attention: str,
    config: Callable[[], Any] | None = None,
    text_name: Callable[[str], str | None] = lambda name: name,
) -> Any:
    """A model in fp32, without dropout, every tensor of which came from the checkpoint.

    `config` makes the model's config, where it is not the one in the directory. `text_name` maps a checkpoint name to
    the model's own, or to None for a tensor that this model leaves out. Raises UserError for files that transformers
    does not take, and with the names when a tensor is missing, left over or of another shape.
    """
    import torch

    path = Path(path)
    in_files = {text_name(name) for name in checkpoint_tensors(path)} - {None}
    try:
        arguments: dict[str, Any] = {"config": config()} if config is not None else {}
        model, info = model_class.from_pretrained(
            path,
            dtype=torch.float32,
            attn_implementation=attention,
            output_loading_info=True,
            local_files_only=True,
            use_safetensors=True,  # nothing is unpickled
            trust_remote_code=False,  # left out, transformers asks at the terminal whether it may run code of the files
            **arguments,
        )
    except Exception as error:  # whatever transformers raises of what the files say
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"cannot load `{path}`: {reason}", "check model.path and the files in it") from error
    names = set(model.state_dict())
    tied = names - {name for name, _ in model.named_parameters()} - {name for name, _ in model.named_buffers()}
    missing = set(info["missing_keys"]) - tied
    if in_files:
        missing |= names - tied - in_files
    ignored = [re.compile(pattern) for pattern in getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()]
    unexpected = {str(name) for name in in_files - names}
    unexpected = {n for n in unexpected if not is_buffer(n) and not any(each.search(n) for each in ignored)}
    refuse_names(f"checkpoint `{path}` does not fit {type(model).__name__}", missing=missing, unexpected=unexpected)
    _no_dropout(model)
    return model


def _no_dropout(model: Any) -> None:
    import torch

    if getattr(model.config, "attention_dropout", 0.0):
        model.config.attention_dropout = 0.0
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        share = getattr(module, "attention_dropout", 0.0)
        if share and not isinstance(share, torch.nn.Module):
            module.attention_dropout = 0.0


def refuse_names(what: str, **groups: Iterable[str]) -> None:
    """Raise UserError listing every non-empty group of names; return when all are empty."""
    parts = []
    for label, names in groups.items():
        ordered = sorted(names)
        if ordered:
            more = f" and {len(ordered) - 8} more" if len(ordered) > 8 else ""
            parts.append(f"{len(ordered)} {label.replace('_', ' ')}: {', '.join(ordered[:8])}{more}")
    if parts:
        raise UserError(f"{what}: {'; '.join(parts)}", "every text tensor must be accounted for by its name")


def wire_map(model: Any, shapes: Shapes | None = None, keep_fp32: tuple[str, ...] = ()) -> dict[str, WireTensor]:
    """`{training parameter name: WireTensor}` of every parameter; tied duplicates are absent.

    Wrapper prefixes (compile, checkpointing) are taken off the wire name. With `shapes` the model must hold exactly
    those tensors; raises UserError listing what is missing, left over or of another shape.
    """
    parameters = dict(model.named_parameters())
    result = {
        name: WireTensor(
            name=(wire := _WRAPPERS.sub("", name)),
            dtype="float32" if any(mark in wire for mark in keep_fp32) else "bfloat16",
            shape=tuple(parameter.shape),
        )
        for name, parameter in parameters.items()
    }
    if shapes is not None:
        held = {tensor.name: tensor.shape for tensor in result.values()}
        refuse_names(
            f"the tensors of {type(model).__name__} are not those of its config",
            missing=shapes.keys() - held.keys(),
            left_over=held.keys() - shapes.keys(),
            of_another_shape={n for n in shapes.keys() & held.keys() if shapes[n] != held[n]},
        )
    return result


def gemm_flops(shapes: Mapping[str, tuple[int, ...]], *, tied: bool) -> float:
    """Training FLOPs per token of the weight GEMMs: 6 per matrix element; an untied input embedding is a look-up."""
    matrices = sum(
        prod(shape) for name, shape in shapes.items() if len(shape) == 2 and (tied or "embed_tokens" not in name)
    )
    return 6.0 * matrices


def dense_shapes(
    config: Mapping[str, Any], *, head_dim: int | None, head_norms: bool, biases: Collection[str] | None = None
) -> Shapes:
    """Text tensors of a Llama-shaped decoder: `{HF name: shape}`.

    `head_dim` None = hidden / heads. `biases`: the projections that have one (`q_proj`, ...); None = those for which
    the config's `attention_bias` and `mlp_bias` say so.
    """
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    heads = config["num_attention_heads"]
    kv_heads = config.get("num_key_value_heads") or heads
    dim = config.get("head_dim") or head_dim or hidden // heads
    projections: Shapes = {
        "self_attn.q_proj": (heads * dim, hidden),
        "self_attn.k_proj": (kv_heads * dim, hidden),
        "self_attn.v_proj": (kv_heads * dim, hidden),
        "self_attn.o_proj": (hidden, heads * dim),
        "mlp.gate_proj": (inner, hidden),
        "mlp.up_proj": (inner, hidden),
        "mlp.down_proj": (hidden, inner),
    }
    shapes: Shapes = {"model.embed_tokens.weight": (config["vocab_size"], hidden), "model.norm.weight": (hidden,)}
    for index in range(config["num_hidden_layers"]):
        layer = f"model.layers.{index}"
        for name, shape in projections.items():
            shapes[f"{layer}.{name}.weight"] = shape
            declared = config.get("attention_bias" if name.startswith("self_attn") else "mlp_bias")
            if declared if biases is None else name.rpartition(".")[2] in biases:
                shapes[f"{layer}.{name}.bias"] = shape[:1]
        for name in ("input_layernorm", "post_attention_layernorm"):
            shapes[f"{layer}.{name}.weight"] = (hidden,)
        for name in ("q_norm", "k_norm") if head_norms else ():
            shapes[f"{layer}.self_attn.{name}.weight"] = (dim,)
    if not config.get("tie_word_embeddings", False):
        shapes["lm_head.weight"] = (config["vocab_size"], hidden)
    return shapes


def outside_blocks(shapes: Shapes) -> int:
    """Parameters in no block: embedding, output head, last norm."""
    return sum(prod(shape) for name, shape in shapes.items() if ".layers." not in name)


def dense_activations(config: Mapping[str, Any], shapes: Shapes) -> int:
    """Bytes a token that autograd keeps of a Llama-shaped block in bf16, as transformers computes it.

    Norms: the input in fp32, the normed one, the product (8 bytes a unit). MLP: gate, its activation, up, the product
    (8). Flash attention: query, key, value, output (2 each) and a normaliser a head; norms of heads come on top (6).
    Without fla, whose fused norms and MLP keep about half as much: the plan does not count on it.
    """
    layer = "model.layers.0.self_attn"
    query, kv = shapes[f"{layer}.q_proj.weight"][0], shapes[f"{layer}.k_proj.weight"][0]
    head = 6 * (query + kv) if f"{layer}.q_norm.weight" in shapes else 0
    block = 2 * 8 * config["hidden_size"] + 8 * config["intermediate_size"]
    return block + 4 * (query + kv) + 4 * config["num_attention_heads"] + head


def dense_memory_shape(config: Mapping[str, Any], shapes: Shapes) -> MemoryShape:
    """Sizes of a Llama-shaped decoder; KV cache in bf16 for every layer."""
    kv_width = shapes["model.layers.0.self_attn.k_proj.weight"][0]
    layers = config["num_hidden_layers"]
    return MemoryShape(
        parameters=sum(prod(shape) for shape in shapes.values()),
        vocab_size=config["vocab_size"],
        hidden_size=config["hidden_size"],
        layers=layers,
        kv_bytes_per_token=2 * 2 * kv_width * layers,
        state_bytes_per_sequence=0,
        flops_per_token=gemm_flops(shapes, tied="lm_head.weight" not in shapes),
        outside_blocks=outside_blocks(shapes),
        block_activations=(dense_activations(config, shapes),) * layers,
    )
