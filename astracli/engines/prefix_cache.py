"""Whether an engine keeps keys and values of prompts for later requests (`rollout.prefix_cache`), and why."""

from __future__ import annotations

from astracli.engines.contract import ASKED, Case, Engine
from astracli.errors import UserError
from astracli.machine.memory import words
from astracli.models.preflight import text_config

KEY = "rollout.prefix_cache"


def decide(engine: Engine, case: Case) -> tuple[bool, str]:
    """(whether it does, the reason). Raises UserError for a recipe that asks for it where it cannot be."""
    assert case.recipe is not None
    asked, obstacle = case.recipe.rollout.prefix_cache, _obstacle(engine, case)
    if asked == "off":
        return False, ASKED
    if asked == "on":
        if obstacle is not None:
            way = f"`--set weights.pause_mode={min(engine.cache_modes)}`, or " if engine.cache_modes else ""
            raise UserError(f"{KEY} = on: {obstacle}", f"{way}`--set {KEY}=auto`")
        return True, ASKED
    if obstacle is not None:
        return False, obstacle
    if case.recipe.launch.deterministic:
        return False, "in a deterministic run nothing depends on what was computed before"
    if case.adapter is not None and case.adapter.hybrid:
        return False, f"a hybrid would take {_states(engine, case)} for each request; `on` allows it"
    return True, "the prompt of a group, and the turns before the last, are computed once a version"


def _obstacle(engine: Engine, case: Case) -> str | None:
    assert case.recipe is not None
    if not engine.cache_modes:
        return f"the {engine.name} engine has none"
    mode = case.recipe.weights.pause_mode
    if case.updated and mode not in engine.cache_modes:
        return f"with weights.pause_mode = {mode} what waits in {engine.name} would meet keys and values of old weights"
    return None


def _states(engine: Engine, case: Case) -> str:
    """`3 recurrent states of 49.1 MiB instead of 1`."""
    assert case.adapter is not None
    size = ""
    if case.config is not None:
        try:
            size = f" of {words(case.adapter.memory_shape(text_config(case.config)).state_bytes_per_sequence)}"
        except (LookupError, TypeError, ValueError, ArithmeticError, AttributeError):
            size = ""  # the plan says what is wrong with this config.json
    return f"{engine.memory.cached_states} recurrent states{size} instead of 1"
