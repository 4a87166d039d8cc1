"""What the body of a request asks an engine for, checked: one reading for the servers of our own. Imports no torch.

What an engine cannot hold would end it, and with it every other request: an id beyond the vocabulary is an assertion on
the GPU.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from astracli.errors import UserError

STAGED = "staged"
"""`load_format` of an update that applies what is staged beside the engine."""
LONGEST_ID = 256
"""Characters of a request id."""
KNOWN = frozenset(
    {
        "temperature", "top_p", "max_new_tokens", "stop_token_ids", "stop", "sampling_seed", "ignore_eos",
        "skip_special_tokens",
    }
)  # fmt: skip
"""Keys of `sampling_params`."""


@dataclass(frozen=True)
class Asked:
    """One completion that is asked for."""

    prompt: np.ndarray
    """int64 [p]"""
    max_new_tokens: int
    temperature: float
    top_p: float
    stop_token_ids: tuple[int, ...]
    stop: tuple[str, ...]
    """Texts that end it."""
    ignore_eos: bool
    seed: int | None
    rid: str | None
    draw_offset: int


def read(body: Mapping[str, Any], *, vocabulary: int, context_length: int) -> list[Asked]:
    """Every completion of a body, for one prompt or a list of prompts. Raises UserError for what cannot be run."""
    ids = body.get("input_ids")
    if not isinstance(ids, list) or not ids:
        raise UserError("input_ids must be a list of token ids, or a list of such lists")
    prompts = ids if is_batch(body) else [ids]
    count = len(prompts)
    params = _spread(body.get("sampling_params") or {}, count, "sampling_params")
    rids = _spread(body.get("rid"), count, "rid")
    offsets = _spread(body.get("draw_offset", 0), count, "draw_offset")
    try:
        return [
            _one(prompt, param, rid, offset, vocabulary, context_length)
            for prompt, param, rid, offset in zip(prompts, params, rids, offsets, strict=True)
        ]
    except (TypeError, ValueError, OverflowError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"malformed request: {error!s:.200}") from None


def is_batch(body: Mapping[str, Any]) -> bool:
    """Whether a body that was read holds a list of prompts; its answer is then a list, too."""
    return isinstance(body["input_ids"][0], list)


def update(body: Mapping[str, Any], least: int = 0) -> tuple[int, bool]:
    """(version, whether caches are dropped) of a body that asks for an update. Raises UserError."""
    if body.get("load_format") != STAGED:
        what = f"load_format {body.get('load_format')!r:.40} is not `{STAGED}`"
        raise UserError(f"{what}: an update applies what is staged")
    return whole(body.get("weight_version"), "weight_version", least), bool(body.get("flush_cache", True))


def _one(ids: list[int], params: Any, rid: Any, offset: Any, vocabulary: int, context_length: int) -> Asked:
    if not isinstance(params, dict):
        raise UserError("sampling_params must be an object, or a list of objects")
    if unknown := sorted(params.keys() - KNOWN):
        raise UserError(f"sampling parameters {', '.join(unknown)[:200]} are not known to this engine")
    prompt = np.array(ids, np.int64)
    if prompt.ndim != 1 or not len(prompt) or prompt.min() < 0 or prompt.max() >= vocabulary:
        raise UserError(f"a prompt must be a non-empty list of token ids in [0, {vocabulary})")
    room = context_length - len(prompt)
    if room < 1:
        raise UserError(
            f"the prompt has {len(prompt)} tokens, the engine's context is {context_length}",
            "raise rollout.context_length or lower data.max_prompt_tokens",
        )
    temperature, top_p = float(params.get("temperature", 1.0)), float(params.get("top_p", 1.0))
    budget = whole(params.get("max_new_tokens", room), "max_new_tokens", 1)
    if not (math.isfinite(temperature) and temperature >= 0 and 0 < top_p <= 1):
        raise UserError(f"temperature {temperature} must be >= 0, top_p {top_p} in (0, 1]")
    if rid is not None and not (isinstance(rid, str) and rid.isascii() and 0 < len(rid) <= LONGEST_ID):
        raise UserError(f"a request id is a string of at most {LONGEST_ID} ASCII characters")
    seed, offset = params.get("sampling_seed"), whole(offset or 0, "draw_offset", 0)
    if offset > len(prompt):
        raise UserError(f"draw_offset {offset} is more than the {len(prompt)} tokens of the prompt")
    texts = params.get("stop") or ()
    if isinstance(texts, str) or not all(isinstance(text, str) and text for text in texts):
        raise UserError("stop must be a list of texts")
    return Asked(
        prompt=prompt,
        max_new_tokens=min(budget, room),
        temperature=temperature,
        top_p=top_p,
        stop_token_ids=tuple({whole(token, "stop_token_ids", 0) for token in params.get("stop_token_ids") or ()}),
        stop=tuple(texts),
        ignore_eos=bool(params.get("ignore_eos")),
        seed=None if seed is None else whole(seed, "sampling_seed", -(2**63), 2**64),
        rid=rid,
        draw_offset=offset,
    )


def whole(value: Any, name: str, least: int, below: int = 2**31) -> int:
    """A whole number of a request. Raises UserError."""
    try:
        number = int(value)
    except (TypeError, ValueError, OverflowError):
        number = least - 1
    if not least <= number < below:
        raise UserError(f"{name} {value!r:.40} must be a whole number from {least} to under {below}")
    return number


def _spread(value: Any, count: int, name: str) -> Sequence[Any]:
    """One value for all prompts, or a list with one for each."""
    if not isinstance(value, list):
        return [value] * count
    if len(value) != count:
        raise UserError(f"{name} has {len(value)} entries for {count} prompts")
    return value
