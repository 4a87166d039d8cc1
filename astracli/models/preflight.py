"""What a checkpoint's config.json says that a run could not do rightly. Each is found before the start.

It needs no other file, so a plan for another machine can ask it too; what the files say, `checkpoint_files` finds.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from astracli.errors import UserError

_DIVISORS, _FACTORS = ("logits_scaling",), ("logit_scale", "lm_head_multiplier")
_CAPS = ("final_logit_softcapping", "logits_soft_cap")
_POSITIONS = ("max_position_embeddings", "n_positions")
_BY_ROW = ("dynamic", "longrope", "su")
"""Kinds of rotary embedding whose frequencies depend on the longest row of a forward."""
_STRETCHED = ("linear", "yarn")
"""Kinds that stretch `max_position_embeddings` by their `factor`."""
UNQUANTIZED = "choose the checkpoint in bf16, fp16 or fp32 that it was made from"


class Obstacle(NamedTuple):
    what: str
    """Short, for a list of what is missing."""
    message: str
    hint: str

    @property
    def error(self) -> UserError:
        return UserError(self.message, self.hint)


def text_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """config.json with the part of the text model on top, as multimodal checkpoints nest it."""
    nested = config.get("text_config")
    return {**config, **nested} if isinstance(nested, Mapping) else dict(config)


def logit_factor(config: Mapping[str, Any]) -> float:
    """What the model multiplies its logits by behind the output head; 1.0 for most families."""
    text, factor = text_config(config), 1.0
    for key in _DIVISORS:
        factor /= text.get(key) or 1.0
    for key in _FACTORS:
        value = text.get(key)
        factor *= value if isinstance(value, int | float) and value else 1.0
    return factor


def sliding_window(config: Mapping[str, Any]) -> int | None:
    """Tokens that a layer with a sliding window sees; None when every layer sees all of a row."""
    text = text_config(config)
    window, kinds = text.get("sliding_window"), text.get("layer_types")
    if not isinstance(window, int) or text.get("use_sliding_window") is False:
        return None
    return window if kinds is None or "sliding_attention" in kinds else None


def config_obstacles(
    config: Mapping[str, Any], path: str, context_length: int, max_new_tokens: int = 0
) -> list[Obstacle]:
    """Of config.json: quantized weights, an output head that is not a product, too few positions.

    `context_length`: the most tokens of a row; `max_new_tokens`: the most of a completion.
    """
    text = text_config(config)
    found = []
    for key in ("quantization_config", "compression_config"):
        if table := config.get(key) or text.get(key):
            method = table.get("quant_method") if isinstance(table, Mapping) else None
            named = f" ({method})" if method else ""
            message = f"`{path}` is quantized{named}, as {key} in its config.json says: that cannot be trained"
            found.append(Obstacle(f"unquantized weights of {path}", message, UNQUANTIZED))
            break
    for key in _CAPS:
        if text.get(key):
            message = (
                f"`{path}` caps its logits ({key} = {text[key]:g} in its config.json): the trainer's output head is a "
                "matrix product with a factor, so its log-probabilities would not be the model's"
            )
            hint = "train a model without a softcap on its logits; with one, no setting trains it rightly"
            found.append(Obstacle(f"a model whose logits are not capped ({key})", message, hint))
    return found + _positions(text, path, context_length, max_new_tokens)


def _positions(text: Mapping[str, Any], path: str, context: int, new: int) -> list[Obstacle]:
    key = next((key for key in _POSITIONS if isinstance(text.get(key), int)), None)
    if key is None:
        return []
    limit, why = text[key], f"{key} in its config.json"
    ropes = _ropes(text)
    for rope in ropes:
        kind, factor = rope.get("rope_type") or rope.get("type"), rope.get("factor")
        original = rope.get("original_max_position_embeddings") or text.get("original_max_position_embeddings")
        if kind in _STRETCHED and isinstance(factor, int | float):
            limit = max(limit, int((original or text[key]) * factor))
        elif kind in _BY_ROW:
            limit = min(limit, original or limit)
            why = f"its rope is `{kind}`, and beyond them a row's frequencies depend on the longest row beside it"
    if context <= limit:
        return []
    message = f"rollout.context_length = {context}, but `{path}` has {limit} positions ({why})"
    hint = f"`--set rollout.context_length={limit}`"
    if new >= limit:
        hint += f" `--set rollout.max_new_tokens={max(1, limit // 2)}`"
    if ropes and "depend" not in why:
        hint += f"; if the model was trained for more, raise {key} in its config.json"
    return [Obstacle(f"{context} positions of {path}, which has {limit}", message, hint)]


def _ropes(text: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Tables of rotary embeddings: one, or one a kind of layer; [{}] for a rotary model that says nothing special."""
    table = text.get("rope_parameters") or text.get("rope_scaling")
    if not isinstance(table, Mapping):
        return [{}] if "rope_theta" in text or "rope_scaling" in text else []
    nested = [each for each in table.values() if isinstance(each, Mapping)]
    return nested or [table]


def refuse(obstacles: Iterable[Obstacle]) -> None:
    """Raise UserError with the first; return when there is none."""
    for obstacle in obstacles:
        raise obstacle.error
