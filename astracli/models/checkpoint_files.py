"""What a checkpoint's files say that a run could not do rightly: shards, dtypes, a tied head, names, the tokenizer.

Nothing here imports torch, and nothing is downloaded. Read are headers, the tokenizer and, where a tied head lies
beside the embedding, both tensors.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from astracli.config import reading
from astracli.errors import UserError
from astracli.models import documents
from astracli.models.adapter import SHARD_INDEX, ModelAdapter, load_tokenizer
from astracli.models.adapter_tools import checkpoint_tensors, is_buffer
from astracli.models.preflight import UNQUANTIZED, Obstacle, text_config

TRAINABLE = ("BF16", "F16", "F32", "F64")
"""Dtypes of safetensors that weights may have."""
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "spiece.model", "vocab.json", "vocab.txt", "*.tiktoken")
"""Any of them lets transformers build a tokenizer."""
_EMBEDDINGS = ("embed_tokens.weight", "wte.weight", "embed_in.weight", "word_embeddings.weight")
_HEAD = "lm_head.weight"
_COMPARED_BYTES = 16 << 20


def file_obstacles(folder: Path, config: Mapping[str, Any], adapter: ModelAdapter | None = None) -> Iterator[Obstacle]:
    """Of the files beside config.json: shards, dtypes, a tied head, the tokenizer, and names as `adapter` has them.
    Raises UserError for a file that is no whole safetensors file, and for documents of another structure."""
    tensors = checkpoint_tensors(folder)
    documents.check_beside(folder)
    yield from _shards(folder, tensors)
    odd = sorted({entry["dtype"] for name, entry in tensors.items() if not is_buffer(name)} - set(TRAINABLE))
    if odd:
        message = f"`{folder}` holds quantized tensors ({', '.join(odd)}): that cannot be trained"
        yield Obstacle("unquantized weights", message, UNQUANTIZED)
    else:
        yield from _tied_head(folder, tensors, config)
    if adapter is not None:
        yield from name_obstacles(adapter, config, {name: entry["shape"] for name, entry in tensors.items()}, folder)
    yield from _tokenizer(folder, config)


def name_obstacles(
    adapter: ModelAdapter, config: Mapping[str, Any], tensors: Mapping[str, Iterable[int]], path: object
) -> Iterator[Obstacle]:
    """Names and shapes of the files (`tensors`: name -> shape) against what the adapter computes from config.json;
    nothing for an adapter that knows them only after loading."""
    if adapter.shapes is None:
        return
    try:
        expected = adapter.asked(adapter.shapes, config, path)
    except UserError as error:
        yield Obstacle("a whole config.json", error.message, error.hint or "")
        return
    held = {name: tuple(shape) for file_name, shape in tensors.items() if (name := adapter.wire_name(file_name))}
    left = (name for name in held.keys() - expected.keys() if not is_buffer(name))
    problems = {
        "missing": sorted(expected.keys() - held.keys()),
        "left over": sorted(left if _HEAD in expected else (name for name in left if name != _HEAD)),
        "of another shape": sorted(n for n in expected.keys() & held.keys() if tuple(expected[n]) != held[n]),
    }
    wrong = "; ".join(f"{len(names)} {what}: {names[0]}" for what, names in problems.items() if names)
    if wrong:
        message = f"checkpoint and config.json do not fit, by adapter `{adapter.name}`: {wrong}"
        hint = "download the checkpoint again, or name the adapter of its family in model.adapter"
        yield Obstacle(wrong, message, hint)


def _shards(folder: Path, tensors: Mapping[str, Any]) -> Iterator[Obstacle]:
    index = folder / SHARD_INDEX
    if not index.is_file():
        return
    again, wanted = documents.AGAIN, documents.shard_of(index)
    absent = sorted({file for file in wanted.values() if not (folder / file).is_file()})
    lost = sorted(name for name in wanted if name not in tensors)
    if absent:
        more = f" and {len(absent) - 1} more" if len(absent) > 1 else ""
        yield Obstacle("a whole checkpoint", f"checkpoint `{folder}` lacks `{absent[0]}`{more}", again)
    elif lost:
        message = f"checkpoint `{folder}`: {len(lost)} tensors of its index are in no shard, for example `{lost[0]}`"
        yield Obstacle("a whole checkpoint", message, again)


def fingerprint(folder: Path) -> str:
    """xxh3-128 of the bytes of a checkpoint's weights, file after file: other weights have another one."""
    import xxhash

    whole = xxhash.xxh3_128()
    for file in sorted(folder.glob("*.safetensors")) or sorted(folder.glob("*.bin")):
        with file.open("rb") as stream:
            while chunk := stream.read(_COMPARED_BYTES):
                whole.update(chunk)
    return whole.hexdigest()


class TensorPlace(NamedTuple):
    """Where a tensor lies in a directory."""

    file: str
    offset: int
    """Bytes from the start of the file."""
    dtype: str
    shape: tuple[int, ...]


def places(folder: Path, adapter: ModelAdapter) -> dict[str, TensorPlace]:
    """{wire name: where it lies} of every trained tensor in safetensors files."""
    found: dict[str, TensorPlace] = {}
    for file in sorted(folder.glob("*.safetensors")):
        with file.open("rb") as stream:
            size = int.from_bytes(stream.read(8), "little")
            header = reading.from_json(stream.read(size))
        for name, entry in header.items():
            wire = adapter.wire_name(name) if name != "__metadata__" else None
            if wire is not None:
                begin = 8 + size + int(entry["data_offsets"][0])
                found[wire] = TensorPlace(file.name, begin, entry["dtype"], tuple(entry["shape"]))
    return found


# -- the output head ---------------------------------------------------------------------------------------------------


def _tied_head(folder: Path, tensors: Mapping[str, Any], config: Mapping[str, Any]) -> Iterator[Obstacle]:
    """A head that config.json ties to the embedding, and that lies in the files as well, must be the embedding."""
    if not text_config(config).get("tie_word_embeddings"):
        return
    head = next((name for name in tensors if name == _HEAD or name.endswith(f".{_HEAD}")), None)
    embedding = next((name for name in tensors if name.endswith(_EMBEDDINGS)), None)
    if head is None or embedding is None or _equal(folder, head, embedding, tensors):
        return
    message = (
        f"`{folder}` has tie_word_embeddings = true, but its `{head}` is not its `{embedding}`: "
        "which of them the model was trained with cannot be told"
    )
    hint = f"remove `{head}` from the files, or write `tie_word_embeddings: false` into config.json"
    yield Obstacle("one output head", message, hint)


def _equal(folder: Path, one: str, other: str, tensors: Mapping[str, Any]) -> bool:
    import numpy as np

    a, b = tensors[one], tensors[other]
    if a["dtype"] != b["dtype"] or a["shape"] != b["shape"]:
        return False
    parts = [_bytes(folder, name) for name in (one, other)]
    starts = range(0, len(parts[0]), _COMPARED_BYTES)
    return all(np.array_equal(*(part[at : at + _COMPARED_BYTES] for part in parts)) for at in starts)


def _bytes(folder: Path, name: str) -> Any:
    """A tensor's bytes, uint8, mapped from its file."""
    import numpy as np

    for file in sorted(folder.glob("*.safetensors")):
        with file.open("rb") as stream:
            size = int.from_bytes(stream.read(8), "little")
            header = reading.from_json(stream.read(size))
        if name in header:
            begin, end = header[name]["data_offsets"]
            if begin == end:
                return np.zeros(0, np.uint8)
            return np.memmap(file, np.uint8, "r", offset=8 + size + begin, shape=(end - begin,))
    raise AssertionError(name)


# -- the tokenizer -----------------------------------------------------------------------------------------------------


def _tokenizer(folder: Path, config: Mapping[str, Any]) -> Iterator[Obstacle]:
    copy = "copy the tokenizer's files of the model it came from beside the weights"
    if not any(True for pattern in TOKENIZER_FILES for _ in folder.glob(pattern)):
        message = f"no tokenizer in `{folder}` (none of {', '.join(TOKENIZER_FILES)})"
        yield Obstacle("a tokenizer", message, copy)
        return
    rows = text_config(config).get("vocab_size")
    try:
        base, added = _ids(folder)
    except _NoTokenizer as error:
        yield Obstacle("a tokenizer that can be loaded", error.message, error.hint or copy)
        return
    if not isinstance(rows, int):
        return
    needed = {name: i for name, i in added.items() if i >= rows and name in _used(folder)}
    beyond = {name: i for name, i in base.items() if i >= rows} | needed
    if beyond:
        top, count = max(beyond.values()), len(beyond)
        name = min(beyond, key=lambda name: beyond[name])
        has = "token has" if count == 1 else "tokens have"
        message = (
            f"the tokenizer of `{folder}` has ids up to {top}, the model has {rows} (vocab_size in its config.json): "
            f"{count} {has} no row, for example `{name}`"
        )
        hint = f"{copy}, or give the model {top + 1} rows (`model.resize_token_embeddings({top + 1})`) and save it"
        yield Obstacle(f"a tokenizer of at most {rows} ids", message, hint)


class _NoTokenizer(UserError):
    """The tokenizer's files are there and cannot be read."""


def _ids(folder: Path) -> tuple[dict[str, int], dict[str, int]]:
    """(token -> id of the vocabulary, of what was added to it). Raises _NoTokenizer."""
    file = folder / "tokenizer.json"
    if not file.is_file():
        return _built(folder)
    try:
        document = reading.from_json(file.read_text(encoding="utf-8"))
        vocabulary = document["model"]["vocab"]
        if isinstance(vocabulary, list):  # unigram: [[piece, score], ...]
            vocabulary = {piece: i for i, (piece, *_) in enumerate(vocabulary)}
        added = {token["content"]: int(token["id"]) for token in document.get("added_tokens") or ()}
        if not all(isinstance(i, int) and 0 <= i < 2**31 for i in (*vocabulary.values(), *added.values())):
            raise ValueError("not every id is a number")
        if any(len(token) > documents.LONGEST_TOKEN for token in added):
            raise ValueError(f"an added token has more than {documents.LONGEST_TOKEN} characters")
    except (ValueError, LookupError, TypeError, AttributeError, OverflowError) as error:
        message = f"`{file}` is no tokenizer of the `tokenizers` package: {type(error).__name__}: {error}"
        raise _NoTokenizer(message) from None
    return {name: i for name, i in vocabulary.items() if name not in added}, added


def _built(folder: Path) -> tuple[dict[str, int], dict[str, int]]:
    """Of a checkpoint without tokenizer.json: whether transformers can build one here shows only when it does."""
    try:
        tokenizer = load_tokenizer(folder)
        added = {str(name): int(i) for name, i in tokenizer.get_added_vocab().items()}
        return {str(name): int(i) for name, i in tokenizer.get_vocab().items() if name not in added}, added
    except Exception as error:  # transformers raises whatever the missing package or the file raises
        there = ", ".join(sorted(path.name for pattern in TOKENIZER_FILES for path in folder.glob(pattern)))
        why = " ".join(str(error).split())[:300] or type(error).__name__
        raise _NoTokenizer(
            f"`{folder}` has no tokenizer.json, and transformers cannot build one from {there} here: {why}",
            "`pip install sentencepiece protobuf tiktoken` may be what it needs; or, where it loads, "
            "`AutoTokenizer.from_pretrained(...).save_pretrained(...)` writes tokenizer.json",
        ) from None


def _used(folder: Path) -> str:
    """Text in which every token occurs that a prompt or an end may use: the chat template, bos and eos."""
    parts = [_text(folder / "chat_template.jinja"), _text(folder / "chat_template.json")]
    try:
        settings = reading.from_json(_text(folder / "tokenizer_config.json") or "{}")
    except ValueError:
        return "".join(parts)
    named = (settings.get(key) for key in ("bos_token", "eos_token", "chat_template"))
    return "\n".join([*parts, *(json.dumps(value, ensure_ascii=False) for value in named if value)])


def _text(file: Path) -> str:
    return file.read_text(encoding="utf-8", errors="replace") if file.is_file() else ""
