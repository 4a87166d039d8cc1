"""The hub of a run: its store and its server, in the supervisor's process."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from astracli.launch.configs import RunContext
from astracli.process import ports
from astracli.process.config import Role
from astracli.training import checkpoint

if TYPE_CHECKING:
    from astracli.config.recipe import Recipe
    from astracli.hub.curriculum import Curriculum
    from astracli.hub.store import HubStore
    from astracli.launch.fleet import Fleet
    from astracli.process.server import ServerThread


@contextlib.contextmanager
def serving(
    context: RunContext, on_status: Callable[[Mapping[str, Any]], None], fleet: Fleet | None = None
) -> Iterator[tuple[HubStore, ServerThread]]:
    """The hub serving on a port of its own; `on_status` gets every heartbeat. `fleet`: of a run on several hosts."""
    from astracli.evaluation import files as eval_files
    from astracli.hub.api import build_app
    from astracli.process.server import ServerThread
    from astracli.weights.publish.server import weights_app

    run = context.run_dir
    run.weights.mkdir(exist_ok=True)
    with contextlib.ExitStack() as stack:
        store = _store(context)
        stack.callback(store.close)
        if context.resume_step is not None:
            store.rewind(context.resume_step, context.resume_step)
            eval_files.forget_after(run.eval, context.resume_step)
        app = build_app(
            store,
            context.token,
            weights_app=weights_app(run.weights),
            metrics_path=run.metrics_jsonl,
            on_status=on_status,
            agents=fleet.agents if fleet is not None else None,
            inputs=fleet.inputs.file if fleet is not None else lambda name: None,
        )
        launch = context.recipe.launch
        server = ServerThread(app, ports.bind(launch.host, launch.port), launch.host).start()
        stack.callback(server.stop)
        yield store, server


def _store(context: RunContext) -> HubStore:
    from astracli.hub.store import HubStore
    from astracli.hub.types import HubSettings

    recipe, training, samples = context.settled, context.training, context.samples
    settings = HubSettings(
        batch_groups=recipe.train.batch_groups if training else samples.groups if samples else 1,
        max_staleness=recipe.effective_staleness if training else 0,
        drop_equal_groups=recipe.algorithm.drop_equal_groups and training,
        lease_timeout_s=recipe.launch.lease_timeout_s,
        steps=recipe.train.steps if training else 1,
        eval_every=recipe.eval.every if training and recipe.eval.benchmarks else 0,
        engines=tuple(process.name for process in context.plan.processes if process.role is Role.ENGINE),
        slots=0 if recipe.launch.deterministic else recipe.rollout.running,
        eval_slots=recipe.eval.slot_share,
        deterministic=recipe.launch.deterministic,
        consume=recipe.train.consume,
        replay_ratio=recipe.train.replay_ratio if training else 0,
        history_steps=history_steps(recipe),
        max_dropped_batches=recipe.rollout.max_dropped_batches,
        checkpoints=recipe.checkpoint.every > 0,
        gpu_leases=tuple(context.plan.gpu_leases),
        own_batches=context.plan.command == "sft",
        checkpoint_every=recipe.checkpoint.every if recipe.checkpoint.best is not None else 0,
    )
    curriculum = _curriculum(context) if training else None
    place = context.run_dir.checkpoints
    return HubStore(
        context.run_dir.hub_sqlite,
        settings,
        curriculum=curriculum,
        checkpoint=lambda step: checkpoint.seal(place, step),
    )


def history_steps(recipe: Recipe) -> int:
    """Steps whose groups keep a row each."""
    from astracli.hub.types import CURRICULUM_HISTORY, HISTORY

    return recipe.launch.hub_history_steps or (CURRICULUM_HISTORY if recipe.data.curriculum else HISTORY)


def _curriculum(context: RunContext) -> Curriculum | None:
    """What chooses prompts by their solve rate; None when they are asked in their order."""
    from astracli.data.prompts import PromptSource
    from astracli.hub.curriculum import Curriculum

    recipe = context.recipe
    if recipe.data.curriculum is None:
        return None
    source = PromptSource(recipe.data, recipe.seed, context.inputs.data)
    return Curriculum(recipe.data.curriculum, recipe.seed, source.kind)
