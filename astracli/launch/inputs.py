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

from astracli.config.recipe import Recipe
from astracli.data import fetch
from astracli.envs import registry as envs
from astracli.errors import UserError
from astracli.machine.findings import Check
from astracli.models import preflight, registry
from astracli.models.adapter import read_config
from astracli.models.adapter_tools import has_chat_template
from astracli.plan.types import Command
from astracli.process import ports
from astracli.process.console import say
from astracli.runs import metrics
from astracli.runs.run_dir import RunDir, write_atomic


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
    check_setting(recipe, ledger, rewards=data)
    model: Path | None = None
    path: str | None = None
    places: Mapping[str, str | None] = {}
    with ledger.check("checkpoint"):
        model = fetch.fetch_model(recipe.model.path, recipe.model.revision)
        check_checkpoint(model, recipe)
    with ledger.check("benchmarks"):
        places = sets.fetch_all(benchmarks, recipe.data.path)
    if data:
        with ledger.check("training data"):
            path = datasets.fetch(recipe)
            if path is not None:
                path = decontaminated(recipe, path, places)
    if model is None:
        return None
    if not has_chat_template(model):
        say(
            f"warning: no chat template in `{model}`: prompts go to the model as bare text, right for a base model and "
            "wrong for a chat model; copy its chat_template.jinja beside tokenizer.json"
        )
    found = {name: Path(place) if place else None for name, place in places.items()}
    return Inputs(model, Path(path) if path else None, found, time.monotonic() - began)


def check_setting(recipe: Recipe, ledger: Ledger, *, rewards: bool) -> None:
    """Everything that the recipe names on this machine. `rewards`: the command draws episodes, and grades them with
    `data.reward`."""
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
    if rewards:
        from astracli.rewards.reward import validate_reward

        with ledger.check("reward"):
            validate_reward(recipe.data.reward)
        with ledger.check("environment"):
            envs.validate(recipe.rollout.env)


def check_checkpoint(folder: Path, recipe: Recipe) -> None:
    """The checkpoint is whole, and one that trainer and engine compute rightly. Raises UserError."""
    config, rollout = read_config(folder), recipe.rollout
    obstacles = preflight.config_obstacles(config, recipe.model.path, rollout.context_length, rollout.max_new_tokens)
    preflight.refuse(obstacles)
    preflight.refuse(preflight.file_obstacles(folder, config, registry.resolve(recipe, config)))


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
