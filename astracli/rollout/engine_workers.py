"""The workers of a process's engines, and a process that only updates them: in supervised training nothing is drawn."""

from __future__ import annotations

import asyncio
import contextlib

from astracli.engines import registry as engines
from astracli.errors import RunFailed
from astracli.hub.client import AsyncHubClient
from astracli.process.config import RolloutConfig
from astracli.process.worker import Reporter
from astracli.rollout.engine_worker import EngineWorker


async def engine_workers(
    config: RolloutConfig, hub: AsyncHubClient, stack: contextlib.AsyncExitStack
) -> list[EngineWorker]:
    """A worker for each engine of a process; `stack` closes what they use."""
    kind, recipe, workers = engines.get(config.engine), config.recipe, []
    for entry in config.engines:
        client = kind.client(entry.url, entry.token or config.token, name=entry.name, stage_dir=entry.stage_dir)
        engine = await stack.enter_async_context(client)
        subscriber = kind.receiver(config.hub_url, config.token, entry.stage_dir, config.model_path)
        stack.callback(subscriber.close)
        workers.append(
            EngineWorker(
                entry.name,
                engine,
                hub,
                subscriber,
                process=config.name,
                mode=recipe.weights.pause_mode,
                ready_timeout_s=recipe.launch.ready_timeout_s,
                time_sharing=entry.name in config.gpu_leases,
            )
        )
    return workers


async def only_update(config: RolloutConfig, reporter: Reporter) -> None:
    """Keep the engines at the hub's target version until the hub says stop; generate nothing."""
    async with contextlib.AsyncExitStack() as stack:
        hub = await stack.enter_async_context(AsyncHubClient(config.hub_url, config.token))
        workers = await engine_workers(config, hub, stack)
        reporter.ready()
        try:
            async with asyncio.TaskGroup() as tasks:
                for worker in workers:
                    tasks.create_task(worker.follow())
        except ExceptionGroup as group:
            raise next((one for one in group.exceptions if isinstance(one, RunFailed)), group.exceptions[0]) from None
