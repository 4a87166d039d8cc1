"""What a run would trip over minutes later, looked at before anything starts: checkpoint files, reward, address, sinks.

Every function returns when all is well and raises UserError (exit 2) otherwise. Nothing here imports torch.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from astracli.config.recipe import Recipe
from astracli.errors import UserError
from astracli.models.adapter import SHARD_INDEX
from astracli.models.adapter_tools import checkpoint_tensors
from astracli.process import ports
from astracli.runs import metrics

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "spiece.model", "vocab.json", "vocab.txt", "*.tiktoken")
"""Any of them lets transformers build a tokenizer."""


def check_setting(recipe: Recipe, *, rewards: bool) -> None:
    """Everything that the recipe names on this machine. `rewards`: the command grades with `data.reward`."""
    ports.bind(recipe.launch.host).close()
    metrics.find_sinks(recipe.metrics.sinks)
    python = recipe.resources.engine.python
    if python is not None and shutil.which(python) is None:
        raise UserError(
            f"resources.engine.python = {json.dumps(python)} is no program on this machine",
            "name the interpreter of the engine's environment, for example /opt/engine/bin/python",
        )
    if rewards:
        from astracli.rewards.reward import validate_reward

        validate_reward(recipe.data.reward)


def check_checkpoint(folder: Path) -> None:
    """All shards are there and whole, and a tokenizer lies beside them."""
    tensors = checkpoint_tensors(folder)
    index = folder / SHARD_INDEX
    if index.is_file():
        try:
            wanted = dict(json.loads(index.read_text(encoding="utf-8"))["weight_map"])
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"`{index}` is no index of shards: {error!r}", "download the checkpoint again") from None
        absent = sorted({file for file in wanted.values() if not (folder / file).is_file()})
        if absent:
            more = f" and {len(absent) - 1} more" if len(absent) > 1 else ""
            raise UserError(f"checkpoint `{folder}` lacks `{absent[0]}`{more}", "download the checkpoint again")
        lost = sorted(name for name in wanted if name not in tensors)
        if lost:
            raise UserError(
                f"checkpoint `{folder}`: {len(lost)} tensors of its index are in no shard, for example `{lost[0]}`",
                "download the checkpoint again",
            )
    if not any(True for pattern in TOKENIZER_FILES for _ in folder.glob(pattern)):
        raise UserError(
            f"no tokenizer in `{folder}` (none of {', '.join(TOKENIZER_FILES)})",
            "copy the tokenizer's files of the model it came from beside the weights",
        )
