"""What a run reads, and what is checked before it starts: checkpoint files, problems, reward, address, sinks.

Every check returns when all is well and raises UserError (exit 2) otherwise. Nothing here imports torch.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from astracli.config import reading
from astracli.config.recipe import Recipe
from astracli.envs import registry as envs
from astracli.errors import UserError
from astracli.models.adapter import SHARD_INDEX
from astracli.models.adapter_tools import checkpoint_tensors
from astracli.process import ports
from astracli.process.console import say
from astracli.runs import metrics
from astracli.runs.run_dir import RunDir, write_atomic

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "spiece.model", "vocab.json", "vocab.txt", "*.tiktoken")
"""Any of them lets transformers build a tokenizer."""
TOKENIZER_BYTES = 512 << 20


@dataclass(frozen=True)
class Inputs:
    """What a run reads, all of it on this machine."""

    model: Path
    data: Path | None
    """None: the training problems are generated, or there are none."""
    benchmarks: Mapping[str, Path | None]
    """None: it is generated."""
    seconds: float = 0.0
    """Spent on fetching."""


def check_setting(recipe: Recipe, *, rewards: bool) -> None:
    """Everything that the recipe names on this machine. `rewards`: the command draws episodes, and grades them with
    `data.reward`."""
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
        envs.validate(recipe.rollout.env)


def check_checkpoint(folder: Path) -> None:
    """All shards are there and whole, and a tokenizer lies beside them."""
    tensors = checkpoint_tensors(folder)
    index = folder / SHARD_INDEX
    if index.is_file():
        try:
            wanted = dict(reading.document(index)["weight_map"])
        except (OSError, ValueError, KeyError, TypeError) as error:
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
    check_tokenizer(folder)


def check_tokenizer(folder: Path) -> None:
    """A `tokenizer.json` is one that its library reads. Raises UserError."""
    file = folder / "tokenizer.json"
    if not file.is_file():
        return
    from tokenizers import Tokenizer

    try:
        Tokenizer.from_str(reading.text(file, TOKENIZER_BYTES))
    except Exception as error:  # the library raises nothing more precise
        said = " ".join(str(error).split())[:200]
        raise UserError(f"`{file}` is no tokenizer: {said}", "download the checkpoint again") from None


def pin_problems(run: RunDir, recipe: Recipe, path: Path | None) -> None:
    """Write down what a place in the training set means (`data.json`); a resume needs the same. Raises UserError."""
    from astracli.data import datasets

    if path is None:
        return
    problems = datasets.load(recipe.data, path)
    now = {"path": str(path), "rows": len(problems), "fingerprint": problems.fingerprint}
    file = run.path / "data.json"
    if not file.exists():
        write_atomic(file, json.dumps(now, indent=2) + "\n")
        return
    then = json.loads(file.read_text(encoding="utf-8"))
    if then["fingerprint"] != now["fingerprint"]:
        raise UserError(
            f"the training problems are others than when `{run.path}` began: {then['rows']} rows of `{then['path']}` "
            f"then, {now['rows']} of `{path}` now",
            "a resumed run goes on at its place in their order: put the old file back, or start a new run",
        )


def decontaminated(recipe: Recipe, path: str, fetched: Mapping[str, str | None]) -> str:
    """The training problems to use, after `data.decontaminate`. Raises UserError when none would be left."""
    from astracli.data import benchmarks as sets
    from astracli.data import datasets, decontamination

    written = [name for name, place in fetched.items() if place is not None]
    if recipe.data.decontaminate == "off" or not written:
        return path
    problems = datasets.load(recipe.data, path)
    found = decontamination.find(problems, {name: sets.load(name, fetched[name]).items for name in written})
    if not found:
        return path
    said = decontamination.summary(found, len(problems))
    if recipe.data.decontaminate == "report":
        say(f"warning: {said}; leave them out with `--set data.decontaminate=remove`")
        return path
    if len(found) == len(problems):
        raise UserError(said, "nothing would be left to train on; train on another set")
    say(f"{said}: left out")
    known = datasets.known_set(recipe.data.source)
    split = known.split if known else recipe.data.split
    return str(decontamination.write_without(Path(path), split, found, datasets.cache_dir() / "datasets"))
