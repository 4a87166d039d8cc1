"""What processes are told, for tests: a field that a test does not name has a plain value."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import Any, TypeVar

from astracli.config.recipe import Recipe
from astracli.launch.configs import RunContext, build
from astracli.launch.inputs import Inputs
from astracli.plan.types import LaunchPlan
from astracli.process.config import EngineConfig, EvalConfig, ProcessConfig, RolloutConfig, TrainerConfig
from astracli.process.layout import RESIDENT
from astracli.runs.run_dir import RunDir

RECIPE = {"name": "t", "model": {"path": "astra:tiny"}, "data": {"source": "arithmetic"}, "train": {"steps": 3}}
C = TypeVar("C", bound=ProcessConfig)


def engine(**fields: Any) -> EngineConfig:
    own = dict(
        name="engine0", device="cpu", port=1, stage_dir=Path("/stage"), published=False, await_weights=False,
        time_sharing=False, mem_fraction_static=0.7, staging="host", serving_attention="auto", linear_attention="none",
        prefix_cache=False,
    )  # fmt: skip
    return _made(EngineConfig, own, fields)


def rollout(**fields: Any) -> RolloutConfig:
    own = dict(name="rollout", data_paths={"": None}, engines=(), gpu_leases=(), samples=None, generates=True)
    return _made(RolloutConfig, own, fields)


def trainer(**fields: Any) -> TrainerConfig:
    own = dict(
        name="trainer", device="cpu", engines=(), attention="sdpa", gdn_backward="none", resume_step=None, start=0,
        initial=None, split=RESIDENT, shared=False, gpu_leases=(), leaves=False, host_bytes=0, warm_up=False,
        data_paths={}, teacher_path=None,
    )  # fmt: skip
    return _made(TrainerConfig, own, fields)


def evaluation(**fields: Any) -> EvalConfig:
    return _made(EvalConfig, dict(name="eval", engines=(), benchmarks={}, out=None), fields)


def _made(kind: type[C], own: dict[str, Any], fields: dict[str, Any]) -> C:
    common = dict(
        run_dir=Path("/run"), attempt=1, hub_url="http://127.0.0.1:1", token="run-token", model_path=Path("/m"),
        engine="embedded", threads=1,
    )  # fmt: skip
    recipe = {} if "recipe" in fields else {"recipe": Recipe.model_validate(RECIPE)}
    return kind(**(common | recipe | own | fields))


def of_plan(recipe: Recipe, plan: LaunchPlan, run: Path = Path("/run")) -> dict[str, Any]:
    """Process -> what a new run of this plan tells it."""
    context = RunContext(recipe, plan, RunDir(run), 1, Inputs(Path("/m"), {"": None}, {}))
    with ExitStack() as held:
        return {process.name: process.config for process in build(context, "http://127.0.0.1:1", held)}
