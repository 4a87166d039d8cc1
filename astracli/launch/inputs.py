"""What a run reads, and what is checked before it starts: address, sinks, reward, checkpoint, problems, benchmarks.

`prepare` is the one list of these checks. A start runs it, fetches what is missing and ends at the first refusal;
`--dry-run` and `astra doctor RECIPE` run it without a download, and tell every refusal, in the same words. Nothing here
imports torch.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from astracli.config import reading, recipe_data
from astracli.config.benchmarks import get
from astracli.config.recipe import Recipe
from astracli.config.recipe_data import DataTable
from astracli.data import fetch
from astracli.envs import registry as envs
from astracli.errors import UserError
from astracli.launch import lora_inputs
from astracli.machine.findings import Check
from astracli.models import chat, checkpoint_files, preflight, registry
from astracli.models.adapter import read_config
from astracli.models.adapter_tools import has_chat_template
from astracli.plan.types import Command
from astracli.process import ports
from astracli.process.console import say
from astracli.runs import metrics
from astracli.runs.run_dir import RunDir, write_atomic

if TYPE_CHECKING:
    from astracli.data.prompts import Problem


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


class Ledger:
    """What the checks before a start refuse, by their names. What waits for a download is left until a start."""

    def __init__(self, *, keep: bool):
        """`keep`: keep a refusal and go on; otherwise it is raised."""
        self._keep = keep
        self.refused: list[tuple[str, UserError]] = []

    @contextlib.contextmanager
    def check(self, name: str) -> Iterator[None]:
        try:
            yield
        except fetch.NotHere:
            if not self._keep:
                raise
        except UserError as error:
            if not self._keep:
                raise
            self.refused.append((name, error))


def needs(recipe: Recipe, command: Command) -> tuple[bool, list[str]]:
    """(whether a command reads training problems, the benchmarks that it reads)"""
    if command == "train":
        return True, recipe.eval.benchmarks if recipe.eval.every else []
    return command == "rollout", recipe.eval.benchmarks if command == "eval" else []


def fetched(recipe: Recipe, *, data: bool, benchmarks: Sequence[str]) -> Inputs:
    """For a start: everything is checked, and downloaded where it has to be. Raises UserError with the first refusal.
    `data`: the command reads training problems and grades with `data.reward`."""
    inputs = prepare(recipe, Ledger(keep=False), data=data, benchmarks=benchmarks)
    assert inputs is not None
    return inputs


def findings(recipe: Recipe, command: Command) -> list[Check]:
    """What a start would refuse, in its words, found without a download."""
    ledger = Ledger(keep=True)
    data, benchmarks = needs(recipe, command)
    with fetch.only_here():
        prepare(recipe, ledger, data=data, benchmarks=benchmarks)
    return [Check(name, "start", "fail", error.message, "", error.hint or "") for name, error in ledger.refused]


def prepare(recipe: Recipe, ledger: Ledger, *, data: bool, benchmarks: Sequence[str]) -> Inputs | None:
    """Every check, in the order in which a start makes them; None when one of them was refused and kept."""
    from astracli.data import benchmarks as sets
    from astracli.data import datasets

    began = time.monotonic()
    check_setting(recipe, ledger)
    model: Path | None = None
    paths: dict[str, str | None] = {}
    left: Mapping[str, Path | None] = {}
    places: Mapping[str, str | None] = {}
    first: dict[str, Problem] = {}
    with ledger.check("benchmarks"):
        places = sets.fetch_all(benchmarks, recipe.data.path, recipe)
    known = not data  # of rows that are not here, the columns are not known yet
    with ledger.check("training data"):
        paths = datasets.fetch(recipe, first) if data else {}
        known = True
    with ledger.check("reward"):
        check_rewards(recipe, first if known else None, places, trains=data)
    with ledger.check("checkpoint"):
        found = fetch.fetch_model(recipe.model.path, recipe.model.revision)
        check_checkpoint(found, recipe)
        check_prompts(recipe, found)
        for problem in first.values():
            check_turns(recipe, found, problem.messages)
        model = found
    with ledger.check("training data"):
        left = decontaminated(recipe, paths, places) if paths else {}
    if model is None:
        return None
    if not has_chat_template(model):
        say(
            f"warning: no chat template in `{model}`: prompts go to the model as bare text, right for a base model and "
            "wrong for a chat model; copy its chat_template.jinja beside tokenizer.json"
        )
    local = {name: Path(place) if place else None for name, place in places.items()}
    return Inputs(model, left, local, time.monotonic() - began)


def check_setting(recipe: Recipe, ledger: Ledger) -> None:
    """What the recipe names on this machine, besides rewards and data."""
    with ledger.check("address"):
        ports.bind(recipe.launch.host).close()
    with ledger.check("sinks"):
        metrics.find_sinks(recipe.metrics.sinks)
    python = recipe.resources.engine.python
    with ledger.check("engine's Python"):
        if python is not None and shutil.which(python) is None:
            raise UserError(
                f"resources.engine.python = {json.dumps(python)} is no program on this machine",
                "name the interpreter of the engine's environment, for example /opt/engine/bin/python",
            )


def check_rewards(
    recipe: Recipe, problems: Mapping[str, Problem] | None, benchmarks: Mapping[str, str | Path | None], *, trains: bool
) -> None:
    """Rewards are there, and find their columns in the training sources and in benchmarks of the user's own; and the
    environment is there.

    `problems`: the first of each source that is not generated; None: not known, then columns are not looked for.
    `benchmarks`: local paths. `trains`: the command draws episodes, and grades them.
    """
    from astracli.data import benchmarks as sets
    from astracli.rewards.reward import Rewards, validate_rewards

    wanted: list[tuple[Rewards, list[str] | None, str]] = []
    if trains:
        envs.validate(recipe.rollout.env)
        for name, table in recipe_data.sets(recipe.data).items():
            columns = None if problems is None else list(problems[name].row) if name in problems else []
            wanted.append((Rewards.of(table), columns, f"source `{name}`" if name else "the training problems"))
    for name, place in benchmarks.items():
        if get(name, recipe).own is not None:
            own = sets.load(name, place, recipe=recipe)
            assert own.data is not None
            wanted.append((Rewards.of(own.data), list(own.items[0].row), f"benchmark `{name}`"))
    done: list[tuple[Rewards, list[str] | None]] = []
    for rewards, columns, where in wanted:
        if not any(before.each == rewards.each and columns == known for before, known in done):
            done.append((rewards, columns))
            validate_rewards(rewards, columns, where)


def check_checkpoint(folder: Path, recipe: Recipe) -> None:
    """The checkpoint is whole, and one that trainer and engine compute rightly. Raises UserError."""
    config, rollout = read_config(folder), recipe.rollout
    obstacles = preflight.config_obstacles(config, recipe.model.path, rollout.context_length, rollout.max_new_tokens)
    preflight.refuse(obstacles)
    adapter = registry.resolve(recipe, config)
    preflight.refuse(checkpoint_files.file_obstacles(folder, config, adapter))
    if recipe.lora is not None:
        lora_inputs.check(folder, recipe, adapter, config)
    check_tokenizer(folder)


def check_tokenizer(folder: Path) -> None:
    """A `tokenizer.json` is one that its library reads. Raises UserError."""
    file = folder / "tokenizer.json"
    if not file.is_file():
        return
    from tokenizers import Tokenizer

    try:
        Tokenizer.from_str(reading.text(file, reading.TOKENIZER_BYTES))
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
