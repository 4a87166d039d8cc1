"""Types of what a checkpoint's JSON documents say: config, generation settings, tokenizer settings, index of shards.

A document that is JSON and of another structure is refused here, by the key, before anything computes with it. What a
key means is not looked at; null says nothing and stands for every type, keys that are not listed are whatever they are.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from astracli.config import reading
from astracli.errors import UserError

AGAIN = "download the checkpoint again"
MOST_LAYERS, MOST_COUNTED, LARGEST = 4096, 65_536, 2**40
"""Of a model: layers; heads, experts and other things that are counted; any number of its config.json."""
LONGEST_TOKEN = 1000
"""Characters of a token that is added to a vocabulary; tokenizers compute for minutes on one of 100,000."""
_VALUES = 200_000
"""Of a list in a config.json; the longest that we know has an entry for every layer."""
Kind = tuple[str, Callable[[Any], bool]]


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _number(value: Any) -> bool:
    return _whole(value) or (isinstance(value, float) and math.isfinite(value))


def _text(value: Any) -> bool:
    return isinstance(value, str) and len(value) <= 1000 and value.isprintable()


def _list_of(one: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, list) and all(one(each) for each in value)


def _token(value: Any) -> bool:
    text = value.get("content") if isinstance(value, dict) else value
    return isinstance(text, str) and len(text) <= LONGEST_TOKEN


def _ids(value: Any) -> bool:
    return all(_whole(each) and -1 <= each < 2**31 for each in (value if isinstance(value, list) else [value]))


def _sizes(value: Any) -> bool:
    """Some families have one for every layer."""
    return all(_whole(each) and each >= 1 for each in (value if isinstance(value, list) else [value]))


def _template(value: Any) -> bool:
    named = _list_of(lambda one: isinstance(one, dict) and _all_text(one, "name", "template"))
    return isinstance(value, str) or named(value)


def _all_text(table: Mapping[str, Any], *keys: str) -> bool:
    return all(isinstance(table.get(key), str) for key in keys)


def _added(value: Any) -> bool:
    return isinstance(value, dict) and all(
        key.isdecimal() and len(key) < 10 and _token(one) for key, one in value.items()
    )


COUNT: Kind = ("a whole number from 0", lambda value: _whole(value) and value >= 0)
SIZE: Kind = ("a whole number from 1", lambda value: _whole(value) and value >= 1)
SIZES: Kind = ("a whole number from 1, or a list of them", _sizes)
NUMBER: Kind = ("a number", _number)
NUMBERS: Kind = ("a list of numbers", _list_of(_number))
FLAG: Kind = ("true or false", lambda value: isinstance(value, bool))
TEXT: Kind = ("a short text", _text)
TEXTS: Kind = ("a list of short texts", _list_of(_text))
TABLE: Kind = ("a table", lambda value: isinstance(value, dict))
ID: Kind = ("a token id", lambda value: _whole(value) and _ids(value))
IDS: Kind = ("a token id, or a list of them", _ids)
TOKEN: Kind = (f"a text of at most {LONGEST_TOKEN} characters, or a table with one as `content`", _token)
TEMPLATE: Kind = ("a text, or a list of templates by name", _template)
ADDED: Kind = ("a table of tokens by id", _added)

_ROPE = {
    "rope_type": TEXT, "type": TEXT, "factor": NUMBER, "rope_theta": NUMBER, "partial_rotary_factor": NUMBER,
    "original_max_position_embeddings": SIZE, "attention_factor": NUMBER, "beta_fast": NUMBER, "beta_slow": NUMBER,
    "low_freq_factor": NUMBER, "high_freq_factor": NUMBER, "mscale": NUMBER, "mscale_all_dim": NUMBER,
    "mrope_section": NUMBERS, "mrope_interleaved": FLAG, "short_factor": NUMBERS, "long_factor": NUMBERS,
}  # fmt: skip
_CONFIG: dict[str, Kind] = {
    "model_type": TEXT, "architectures": TEXTS, "text_config": TABLE, "vision_config": TABLE, "rope_parameters": TABLE,
    "rope_scaling": TABLE, "quantization_config": TABLE, "compression_config": TABLE, "auto_map": TABLE,
    "vocab_size": SIZE, "hidden_size": SIZE, "intermediate_size": SIZES, "head_dim": SIZE,
    "moe_intermediate_size": SIZE,
    "num_hidden_layers": SIZE, "num_attention_heads": SIZE, "num_key_value_heads": SIZES, "n_positions": SIZE,
    "max_position_embeddings": SIZE, "full_attention_interval": SIZE, "linear_conv_kernel_dim": SIZE,
    "linear_key_head_dim": SIZE, "linear_num_key_heads": SIZE, "linear_num_value_heads": SIZE,
    "linear_value_head_dim": SIZE, "sliding_window": COUNT, "max_window_layers": COUNT,
    "layer_types": TEXTS, "hidden_act": TEXT, "dtype": TEXT, "torch_dtype": TEXT, "transformers_version": TEXT,
    "tie_word_embeddings": FLAG, "use_sliding_window": FLAG, "attention_bias": FLAG, "mlp_bias": FLAG,
    "use_cache": FLAG,
    "rms_norm_eps": NUMBER, "layer_norm_eps": NUMBER, "rope_theta": NUMBER, "initializer_range": NUMBER,
    "attention_dropout": NUMBER, "partial_rotary_factor": NUMBER, "logits_scaling": NUMBER, "logit_scale": NUMBER,
    "lm_head_multiplier": NUMBER, "final_logit_softcapping": NUMBER, "logits_soft_cap": NUMBER,
    "attn_logit_softcapping": NUMBER, "bos_token_id": IDS, "eos_token_id": IDS, "pad_token_id": IDS,
}  # fmt: skip
_GENERATION: dict[str, Kind] = {
    "eos_token_id": IDS, "bos_token_id": ID, "pad_token_id": ID, "temperature": NUMBER, "top_p": NUMBER,
    "top_k": NUMBER, "min_p": NUMBER, "repetition_penalty": NUMBER, "do_sample": FLAG, "max_new_tokens": COUNT,
    "max_length": COUNT, "transformers_version": TEXT,
}  # fmt: skip
_TOKENIZER: dict[str, Kind] = {
    "tokenizer_class": TEXT, "model_max_length": NUMBER, "chat_template": TEMPLATE, "auto_map": TABLE,
    "added_tokens_decoder": ADDED, "bos_token": TOKEN, "eos_token": TOKEN, "pad_token": TOKEN, "unk_token": TOKEN,
    "sep_token": TOKEN, "cls_token": TOKEN, "mask_token": TOKEN, "add_bos_token": FLAG, "add_eos_token": FLAG,
    "add_prefix_space": FLAG, "legacy": FLAG, "use_fast": FLAG, "clean_up_tokenization_spaces": FLAG,
    "extra_special_tokens": ("a table or a list of tokens", lambda value: isinstance(value, dict | list)),
    "additional_special_tokens": ("a list of tokens", _list_of(_token)),
    "padding_side": TEXT, "truncation_side": TEXT,
}  # fmt: skip


def check_config(file: Path, config: Mapping[str, Any]) -> None:
    """Raises UserError with the first value of a config.json that is of another type, or that no model has."""
    for where, key, value in _entries(config):
        if (said := _large(key, value) or _odd(_ROPE if "rope_" in where else _CONFIG, key, value)) is not None:
            raise UserError(f"`{file}`: {where}{said}", AGAIN)


def check_beside(folder: Path) -> dict[str, Any]:
    """The same of generation_config.json and tokenizer_config.json, where they are. Returns the second, {} without.
    Raises UserError, too for what is no JSON object."""
    settings: dict[str, Any] = {}
    for name, kinds in (("generation_config.json", _GENERATION), ("tokenizer_config.json", _TOKENIZER)):
        settings = _object(file) if (file := folder / name).exists() else {}
        for key, value in settings.items():
            if (said := _odd(kinds, key, value)) is not None:
                raise UserError(f"`{file}`: {said}", AGAIN)
    return settings


def shard_of(index: Path) -> dict[str, str]:
    """{tensor: file beside the index} of an index of shards. Raises UserError."""
    table = _object(index, "an index of shards").get("weight_map")
    if not isinstance(table, dict):
        raise UserError(f"`{index}` is not an index of shards: it has no table `weight_map`", AGAIN)
    for tensor, file in table.items():
        if not _text(file) or not file or Path(file).name != file:
            raise UserError(f"`{index}`: `{_short(tensor)}` lies in {_shown(file)}, which is no file's name", AGAIN)
    return table


def _object(file: Path, what: str = "a JSON object") -> dict[str, Any]:
    """Raises UserError."""
    try:
        found = reading.document(file)
    except ValueError as error:
        raise UserError(f"`{file}` is not {what}: {_short(str(error))}", AGAIN) from None
    except OSError as error:
        raise UserError(f"cannot read `{file}`: {(error.strerror or str(error)).lower()}") from None
    if not isinstance(found, dict):
        raise UserError(f"`{file}` is not {what}", AGAIN)
    return found


def _entries(table: Mapping[str, Any], where: str = "") -> Iterator[tuple[str, str, Any]]:
    """(the tables it stands in, key, value), a table before what is in it."""
    for key, value in table.items():
        yield where, key, value
        if isinstance(value, dict):
            yield from _entries(value, f"{where}{_short(key)}.")


def _large(key: str, value: Any) -> str | None:
    """A count that nothing should be made for (a plan has a row of every layer)."""
    if isinstance(value, list) and len(value) > _VALUES:
        return f"`{_short(key)}` is a list of {len(value)} values: no model has that"
    if isinstance(value, float) and math.isnan(value):
        return f"`{_short(key)}` is not a number (NaN)"
    if not _whole(value):
        return None
    most = MOST_LAYERS if key.endswith(("layers", "n_layer")) else MOST_COUNTED if key.startswith("num_") else LARGEST
    if abs(value) <= most:
        return None
    return f"`{_short(key)}` = {_shown(value)}: no model has that"


def _odd(kinds: Mapping[str, Kind], key: str, value: Any) -> str | None:
    kind = kinds.get(key)
    if kind is None or value is None or kind[1](value):
        return None
    return f"`{key}` is {kind[0]}, not {_shown(value)}"


def _short(value: str) -> str:
    """A name or a reason as a message shows it."""
    return (value if value.isprintable() else ascii(value)[1:-1])[:80]


def _shown(value: Any) -> str:
    """A value of a document as a message shows it."""
    if isinstance(value, dict | list):
        return f"a {'table' if isinstance(value, dict) else 'list'} of {len(value)}"
    if isinstance(value, int) and abs(value) >= 10**30:
        return "a number of very many digits"
    return json.dumps(value)[:80]
