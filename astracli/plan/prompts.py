"""What a recipe says of prompts, in words: for the plan and for a run's summary."""

from __future__ import annotations

from astracli.config import recipe_data
from astracli.config.recipe import Recipe
from astracli.models.chat import THINKING

SHOWN = 60
"""Characters of a text that are shown."""


def words(recipe: Recipe, chat_template: str | None) -> dict[str, str]:
    """What is said of prompts -> in words. `chat_template`: its text, "" of a checkpoint without one, None when it is
    not on this machine."""
    model, data = recipe.model, recipe.data
    found = {"thinking": _thinking(model.thinking, chat_template)}
    if model.template_args:
        found["template arguments"] = ", ".join(f"{key} = {value}" for key, value in model.template_args.items())
    if model.assistant_prefix:
        found["answers begin"] = _short(model.assistant_prefix)
    if data.system is not None:
        found["system turn"] = _short(data.system)
    if data.few_shot:
        found["examples"] = f"{len(data.few_shot)} before every question"
    if recipe.rollout.stop:
        found["answers end at"] = ", ".join(map(_short, recipe.rollout.stop))
    if data.markup == "tokens":
        found["special tokens"] = "their names in rows become tokens (data.markup)"
    if data.mix:
        weights = recipe_data.weights(data)
        shares = (f"{name} {weight / sum(weights.values()):.1%}" for name, weight in weights.items())
        found["sources"] = ", ".join(shares)
    if held := recipe_data.held_out(data):
        found["held out"] = ", ".join(f"{name}: {_part(table.holdout)}" for name, table in held.items())
    return found


def _thinking(asked: str, chat_template: str | None) -> str:
    if chat_template is None:
        return f"{asked}, where the chat template has it"
    if THINKING in chat_template:
        return asked
    return "no choice in this chat template" if chat_template else "none: there is no chat template"


def _part(holdout: float) -> str:
    return f"{holdout:.1%} of the questions" if holdout < 1 else f"{holdout:.0f} questions"


def _short(text: str) -> str:
    shown = repr(text)
    return shown if len(shown) <= SHOWN else f"{shown[: SHOWN - 4]}...{shown[0]}"
