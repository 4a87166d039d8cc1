"""Recipes, contexts and processes for the tests of the launch room."""

from __future__ import annotations

import json
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from astracli.config import recipe_io
from astracli.config.recipe import Recipe
from astracli.launch import configs, run
from astracli.launch.configs import RunContext
from astracli.launch.inputs import Inputs
from astracli.launch.launcher import Process
from astracli.launch.local import child_spec
from astracli.plan.types import LaunchPlan
from astracli.process.children import ChildSpec
from astracli.runs.run_dir import RunDir


def tiny(**recipe_changes: Any) -> Recipe:
    """The shipped tiny recipe with dotted keys changed (`train__steps=3`)."""
    sets = [f"{key.replace('__', '.')}={json.dumps(value)}" for key, value in recipe_changes.items()]
    return recipe_io.load("qwen3.5-tiny-m2po-delta", sets)


def plan_of(recipe: Recipe) -> LaunchPlan:
    return run.planned(recipe, "train")


INPUTS = Inputs(Path("/m"), {"": None}, {})


def context_of(recipe: Recipe, path: Path, **more: Any) -> RunContext:
    return RunContext(recipe, plan_of(recipe), RunDir(path), 1, INPUTS, token="secret", **more)


def build(context: RunContext) -> list[Process]:
    with ExitStack() as held:
        return configs.build(context, "http://127.0.0.1:1", held)


def specs_of(context: RunContext) -> dict[str, ChildSpec]:
    """How each process would be started here; its config is written."""
    return {process.name: child_spec(process) for process in build(context)}
