"""What is checked of the teacher of an algorithm that has one, before a start."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from astracli.config.recipe import Recipe
from astracli.data import fetch
from astracli.errors import UserError
from astracli.models import checkpoint_files, preflight, registry
from astracli.models.adapter import load_tokenizer, read_config
from astracli.models.preflight import text_config


def checked(recipe: Recipe, student: Path) -> Path | None:
    """The teacher's directory, whole, with the student's token ids; None where the algorithm has no teacher. Raises
    UserError."""
    path = recipe.algorithm.teacher
    if path is None:
        return None
    key = _key(recipe)
    fetch.local_path(path, key)
    found = fetch.fetch_model(path, None)
    config = read_config(found)
    model = recipe.model.model_copy(update={"path": path, "adapter": "auto", "revision": None})
    adapter = registry.resolve(recipe.model_copy(update={"model": model}), config)
    rollout = recipe.rollout
    preflight.refuse(preflight.config_obstacles(config, path, rollout.context_length, rollout.max_new_tokens))
    preflight.refuse(checkpoint_files.file_obstacles(found, config, adapter))
    ours, theirs = (load_tokenizer(folder).get_vocab() for folder in (student, found))
    if ours != theirs:
        odd = sorted(token for token in {*ours, *theirs} if ours.get(token) != theirs.get(token))
        raise UserError(
            f"{key} = `{path}` has another tokenizer than `{recipe.model.path}`: {len(odd)} tokens differ, such as "
            f"{odd[0]!r}",
            "take a teacher of the same tokenizer, usually a larger model of the same family",
        )
    rows = int(text_config(config).get("vocab_size", 0))
    if rows <= max(ours.values()):
        raise UserError(f"{key} = `{path}` has {rows} rows of logits, the tokenizer has ids up to {max(ours.values())}")
    return found


def _key(recipe: Recipe) -> str:
    return f"algorithm.{recipe.algorithm.name}.teacher"


def parameters(recipe: Recipe) -> int:
    """Of the teacher, for the plan; 0 without one, and for one that is neither here nor known."""
    path = recipe.algorithm.teacher
    if path is None:
        return 0
    config: Mapping[str, Any] | None = None
    if fetch.local_path(path, _key(recipe)) is not None or fetch.cached_config(path, None) is not None:
        config = fetch.fetch_config(path, None)
    for item in registry.installed():
        if item.plugin is not None and config is None:
            config = item.plugin.known_configs.get(path)
    if config is None:
        return 0
    model = recipe.model.model_copy(update={"path": path, "adapter": "auto", "revision": None})
    adapter = registry.resolve(recipe.model_copy(update={"model": model}), config)
    return adapter.asked(adapter.memory_shape, config, path).parameters
