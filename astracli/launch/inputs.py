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
from astracli.data import fetch
from astracli.envs import registry as envs
from astracli.errors import UserError
from astracli.launch import example_inputs, lora_inputs, problem_files, recipe_changes, teacher_inputs
from astracli.launch.clusters import registry as clusters
from astracli.machine.findings import Check
from astracli.models import chat, checkpoint_files, preflight, registry
from astracli.models.adapter import read_config
from astracli.models.adapter_tools import has_chat_template
from astracli.plan.types import TRAINING, Command
from astracli.process import ports
from astracli.process.console import say
from astracli.runs import metrics
from astracli.runs.run_dir import RunDir

if TYPE_CHECKING:
    from astracli.data.prompts import Problem
    from astracli.launch.first_prompt import FirstExample, FirstPrompt


HOSTS = "hosts"
"""Name of the check whether the recipe's hosts can be had."""


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
    teacher: Path | None = None
    """The teacher that the algorithm asks for."""


class Ledger:
    """What the checks before a start refuse, by their names. What waits for a download is left until a start."""

    def __init__(self, *, keep: bool, resumed: RunDir | None = None, shows: bool = False):
        """`keep`: keep a refusal and go on; otherwise it is raised. `resumed`: the run that goes on. `shows`: the first
        prompt, or example, is wanted."""
        self.keep, self._resumed, self.shows = keep, resumed, shows
        self.refused: list[tuple[str, UserError]] = []
        self.prompt: FirstPrompt | FirstExample | None = None

    @contextlib.contextmanager
    def check(self, name: str) -> Iterator[None]:
        try:
            yield
        except fetch.NotHere:
            if not self.keep:
                raise
        except UserError as error:
            if self._resumed is not None:
                recipe_changes.of_resume(error, self._resumed)
            if not self.keep:
                raise
            if all(error.message != before.message for _, before in self.refused):  # a file may serve two purposes
                self.refused.append((name, error))


def needs(recipe: Recipe, command: Command) -> tuple[bool, list[str]]:
    """(whether a command reads training problems, the benchmarks that it reads)"""
    if command in TRAINING:
        return True, recipe.eval.benchmarks if recipe.eval.every else []
    return command == "rollout", recipe.eval.benchmarks if command == "eval" else []


def fetched(recipe: Recipe, *, data: bool, benchmarks: Sequence[str], resumed: RunDir | None = None) -> Inputs:
    """For a start: everything is checked, and downloaded where it has to be. Raises UserError with the first refusal.
    `data`: the command reads training problems and grades with `data.reward`; `resumed`: the run that goes on."""
    inputs = prepare(recipe, Ledger(keep=False, resumed=resumed), data=data, benchmarks=benchmarks, resumed=resumed)
    assert inputs is not None
    return inputs


@dataclass(frozen=True)
class Findings:
    refused: list[Check]
    prompt: FirstPrompt | FirstExample | None
    """None: the command draws none, or what it is made of is not on this machine."""


def findings(recipe: Recipe, command: Command, resumed: RunDir | None = None, *, prompt: bool = True) -> Findings:
    """What a start, or going on with a run, would refuse, in its words, and with `prompt` the first prompt or example
    (which imports the tokenizer's library); without a download."""
    ledger = Ledger(keep=True, resumed=resumed, shows=prompt)
    data, benchmarks = needs(recipe, command)
    with ledger.check(HOSTS):
        clusters.check(recipe, command)
    with fetch.only_here():
        prepare(recipe, ledger, data=data, benchmarks=benchmarks, resumed=resumed)
    refused = [Check(name, "start", "fail", error.message, "", error.hint or "") for name, error in ledger.refused]
    return Findings(refused, ledger.prompt)


def prepare(
    recipe: Recipe, ledger: Ledger, *, data: bool, benchmarks: Sequence[str], resumed: RunDir | None = None
) -> Inputs | None:
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
    draws = data and recipe.sft is None  # episodes, which are graded
    known = not data  # of rows that are not here, the columns are not known yet
    with ledger.check("training data"):
        paths = datasets.fetch(recipe, first) if data else {}
        known = True
    with ledger.check("reward"):
        check_rewards(recipe, first if known else None, places, trains=draws)
    with ledger.check("checkpoint"):
        found = fetch.fetch_model(recipe.model.path, recipe.model.revision)
        check_checkpoint(found, recipe)
        check_prompts(recipe, found)
        for problem in first.values():
            check_turns(recipe, found, problem.messages)
        model = found
    with ledger.check("examples"):
        if data and recipe.sft is not None and known and model is not None:
            example = example_inputs.check(recipe, model, paths)
            ledger.prompt = example if ledger.shows else None
    teacher: Path | None = None
    with ledger.check("teacher"):
        if draws and model is not None:
            teacher = teacher_inputs.checked(recipe, model)
    with ledger.check("environment"):
        if model is not None:
            asked = check_envs(recipe, model, first, trains=draws, evaluates=bool(benchmarks))
            if ledger.shows and draws and known:
                ledger.prompt = _first_prompt(recipe, model, first, asked)
    with ledger.check("training data"):
        left = problem_files.decontaminated(recipe, paths, places, resumed) if paths else {}
        if resumed is not None:
            problem_files.check(resumed, recipe, left)
    if model is None:
        return None
    if not has_chat_template(model):
        say(
            f"warning: no chat template in `{model}`: prompts go to the model as bare text, right for a base model and "
            "wrong for a chat model; copy its chat_template.jinja beside tokenizer.json"
        )
    local = {name: Path(place) if place else None for name, place in places.items()}
    return Inputs(model, left, local, time.monotonic() - began, teacher)


def _first_prompt(
    recipe: Recipe, folder: Path, first: Mapping[str, Problem], asked: Mapping[str, Sequence[int] | None]
) -> FirstPrompt | None:
    """None: the environment makes its prompts itself."""
    from astracli.launch import first_prompt

    drawn, own = asked[recipe.rollout.env], recipe.rollout.env != envs.BUILT_IN
    return None if own and drawn is None else first_prompt.find(recipe, folder, first, drawn)


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
    if not trains and benchmarks:
        envs.validate(recipe.evaluation_env)
    if trains:
        for each in {recipe.rollout.env, recipe.evaluation_env}:
            envs.validate(each)
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


def check_envs(
    recipe: Recipe, folder: Path, first: Mapping[str, Problem], *, trains: bool, evaluates: bool
) -> dict[str, list[int] | None]:
    """The environments work with the recipe, the checkpoint and the first problem. Raises UserError. Returns the tokens
    of the prompt that each asked with, None where it did not ask."""
    from astracli.launch import first_prompt

    messages = first_prompt.first_turns(recipe, first)
    asked = first.get(next(iter(recipe_data.sets(recipe.data))))
    row = {} if asked is None else asked.row
    wanted = [recipe.rollout.env] * trains + [recipe.evaluation_env] * evaluates
    return {name: envs.check(name, recipe, folder, messages, row) for name in dict.fromkeys(wanted)}


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
    from astracli.launch import first_prompt

    first_prompt.tokens(recipe, folder, messages)
