"""What a run reads, and what is checked before it starts: checkpoint files, problems, reward, address, sinks.

Every check returns when all is well and raises UserError (exit 2) otherwise. Nothing here imports torch.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from astracli.config import reading, recipe_data
from astracli.config.benchmarks import get
from astracli.config.recipe import DataTable, Recipe
from astracli.envs import registry as envs
from astracli.errors import UserError
from astracli.models import chat
from astracli.models.adapter import SHARD_INDEX
from astracli.models.adapter_tools import checkpoint_tensors
from astracli.process import ports
from astracli.process.console import say
from astracli.runs import metrics
from astracli.runs.run_dir import RunDir, write_atomic

if TYPE_CHECKING:
    from astracli.data.prompts import Problem

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "spiece.model", "vocab.json", "vocab.txt", "*.tiktoken")
"""Any of them lets transformers build a tokenizer."""
TOKENIZER_BYTES = 512 << 20


@dataclass(frozen=True)
class Inputs:
    """What a run reads, all of it on this machine."""

    model: Path
    data: Mapping[str, Path | None]
    """Training problems by source ("" of a single one). None: they are generated."""
    benchmarks: Mapping[str, Path | None]
    """None: it is generated."""
    seconds: float = 0.0
    """Spent on fetching."""


def check_setting(recipe: Recipe, *, rewards: bool, benchmarks: Sequence[str] = ()) -> None:
    """Everything that the recipe names on this machine. `rewards`: the command draws episodes, and grades them with the
    rewards of the training sources; those of `benchmarks` are used in any case."""
    ports.bind(recipe.launch.host).close()
    metrics.find_sinks(recipe.metrics.sinks)
    python = recipe.resources.engine.python
    if python is not None and shutil.which(python) is None:
        raise UserError(
            f"resources.engine.python = {json.dumps(python)} is no program on this machine",
            "name the interpreter of the engine's environment, for example /opt/engine/bin/python",
        )
    own = [spec.own for name in benchmarks if (spec := get(name, recipe)).own is not None]
    graded = [*(recipe_data.sets(recipe.data).values() if rewards else ()), *own]
    if graded:
        from astracli.rewards.reward import validate_reward

        for reward in sorted({table.reward for table in graded if table is not None}):
            validate_reward(reward)
    if rewards:
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


def check_prompts(recipe: Recipe, folder: Path) -> None:
    """What the recipe says of prompts against the checkpoint: thinking, special tokens in the recipe's own words."""
    from astracli.data.turns import PromptFormat

    if recipe.model.thinking == "on" and chat.THINKING not in chat.template_of(folder):
        raise UserError(
            f"model.thinking = on: the chat template of `{recipe.model.path}` has no `{chat.THINKING}`",
            "leave it out, or name the template's own arguments in model.template_args",
        )
    for table in recipe_data.sets(recipe.data).values():
        if table.source == recipe_data.GENERATED:
            check_turns(recipe, folder, PromptFormat.of(table).messages("1+1", {}))
    if recipe.data.markup == "tokens":
        return
    for source, table in recipe_data.sets(recipe.data).items():
        own = PromptFormat.of(table).own_text
        for name in chat.special_names_of(folder) if "<" in own or "[" in own else ():
            if name in own:
                raise UserError(
                    f"template, system turn or examples of {f'data.mix `{source}`' if source else '[data]'} hold "
                    f"`{name}`, a special token of the model; data.markup = text would write it out as letters",
                    "say it in turns (data.system, [[data.few_shot]]), or set data.markup=tokens",
                )


def check_turns(recipe: Recipe, folder: Path, messages: Sequence[Mapping[str, object]]) -> None:
    """The chat template takes what the recipe and the first row give it. A single user turn is not tried: every
    template takes it, and that would cost the start a second."""
    if [turn["role"] for turn in messages] == ["user"] and not recipe.model.template_args:
        return
    from astracli.models.adapter import load_tokenizer

    try:
        chat.ChatFormat.of(recipe).tokens(load_tokenizer(folder), messages)
    except Exception as error:  # whatever the template raises
        roles = ", ".join(str(turn["role"]) for turn in messages)
        raise UserError(
            f"the chat template of `{recipe.model.path}` does not take these turns ({roles}): {error}",
            "see data.system, data.few_shot and model.template_args, and which roles the column of turns has",
        ) from None


def pin_problems(run: RunDir, recipe: Recipe, paths: Mapping[str, Path | None]) -> None:
    """Write down what a place in a training set means (`data.json`); a resume needs the same. Raises UserError."""
    from astracli.data import datasets

    tables = recipe_data.sets(recipe.data)
    now = {}
    for name, path in paths.items():
        if path is not None:
            problems = datasets.load(tables[name], path)
            now[name] = {"path": str(path), "rows": len(problems), "fingerprint": problems.fingerprint}
    file = run.path / "data.json"
    if not now:
        return
    if not file.exists():
        write_atomic(file, json.dumps(now[""] if list(now) == [""] else now, indent=2) + "\n")
        return
    then = json.loads(file.read_text(encoding="utf-8"))
    then = {"": then} if "fingerprint" in then else then
    for name, found in now.items():
        if then[name]["fingerprint"] != found["fingerprint"]:
            raise UserError(
                f"the training problems are others than when `{run.path}` began: {then[name]['rows']} rows of "
                f"`{then[name]['path']}` then, {found['rows']} of `{found['path']}` now",
                "a resumed run goes on at its place in their order: put the old file back, or start a new run",
            )


def decontaminated(
    recipe: Recipe, paths: Mapping[str, str | None], fetched: Mapping[str, str | None]
) -> dict[str, Path | None]:
    """The training problems to use, after `data.decontaminate`. Raises UserError when none would be left."""
    from astracli.data import benchmarks as sets

    written = [name for name, place in fetched.items() if place is not None and not get(name, recipe).held_out]
    items = {}
    if recipe.data.decontaminate != "off" and any(paths.values()):
        items = {name: sets.load(name, fetched[name], recipe=recipe).items for name in written}
    tables = recipe_data.sets(recipe.data)
    return {name: _decontaminated(tables[name], path, items) if path else None for name, path in paths.items()}


def _decontaminated(data: DataTable, path: str, items: Mapping[str, Sequence[Problem]]) -> Path:
    """The file of one source, or one without the rows that are items of benchmarks."""
    from astracli.data import datasets, decontamination

    if not items:
        return Path(path)
    problems = datasets.load(data, path, "all")
    found = decontamination.find(problems, items)
    if not found:
        return Path(path)
    said = decontamination.summary(found, len(problems))
    if data.decontaminate == "report":
        say(f"warning: {said}; leave them out with `--set data.decontaminate=remove`")
        return Path(path)
    if len(found) == len(problems):
        raise UserError(said, "nothing would be left to train on; train on another set")
    say(f"{said}: left out")
    folder = datasets.cache_dir() / "datasets"
    return decontamination.write_without(Path(path), data.split, found, folder, config=data.config)
