"""Do evaluations hold up a run on a larger machine? The hub and its schedule are real, engines and trainer simulated.

    python bench/evaluation/simulation.py [--recipe qwen3.5-4b-m2po-delta] [--engines 4] [--ranks 4] [--steps 100] ...

Real are the hub's store (leases, admission, batches, versions, evaluations; SQLite), the spread of an evaluation over
engines and the verdict. The clock is simulated. An engine has `--slots` places and a queue; a step of decoding n
requests takes a + b n seconds, a : b as measured on an H100 (237 tokens/s with 1 request, 8,300 with 64), scaled to
`--engine-rate` tokens/s with full slots. It is fed as the rollout worker feeds it, an update reaches it `--fetch-s`
after it was announced and stops it for `--pause-s`. Completions are log-normal with `--median` and `--sigma`, cut at
rollout.max_new_tokens. A trainer of R ranks makes `--trainer-rate` R `--scaling`^log2(R) tokens/s.

Wall time is compared with the larger of what the trainer needs for its tokens and what the engines need for those of
rollouts and evaluations with full slots; 1.00 means that one of both was never idle. Not simulated: prefill, grading.
"""

from __future__ import annotations

import asyncio
import math
import random
import sys
from collections.abc import Collection, Coroutine
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from astracli.config import recipe_io
from astracli.config.benchmarks import get
from astracli.config.recipe import Recipe
from astracli.data.benchmarks import Benchmark
from astracli.data.prompts import Problem
from astracli.evaluation.benchmark import BenchmarkWork, EvalSampling
from astracli.evaluation.spread import evaluate
from astracli.hub.store import HubStore
from astracli.hub.types import Evaluation, HubSettings
from astracli.report import bottleneck
from astracli.rl.types import Group, Sample, Segment, pack_group, unpack_group
from astracli.rollout.slot_use import IdleWhile

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from shared import folder, options, show

from evaluation.simulated import Changes, Engine, Idle, Instantly, Setting, SimulatedLoop

AHEAD = 16
"""A sample more than there are slots for every so many slots waits in the engine."""


@dataclass
class Simulation:
    setting: Setting
    store: HubStore
    changes: Changes
    engines: list[Engine]
    records: list[dict[str, Any]] = field(default_factory=list)
    tokens_of: dict[int, int] = field(default_factory=dict)
    """Of the groups."""
    trained_tokens: int = 0
    evaluation_tokens: int = 0
    evaluations: list[Evaluation] = field(default_factory=list)

    @property
    def now(self) -> float:
        return asyncio.get_running_loop().time()

    async def run(self) -> float:
        """-> seconds until the last step is trained and the last evaluation done."""
        async with asyncio.TaskGroup() as tasks:
            beside = [tasks.create_task(part) for engine in self.engines for part in self._parts(engine)]
            await asyncio.gather(tasks.create_task(self._train()), tasks.create_task(self._evaluate()))
            for task in beside:
                task.cancel()
        return self.now

    def _parts(self, engine: Engine) -> list[Coroutine[Any, Any, None]]:
        return [engine.run(), self._follow(engine), self._feed(engine)]

    async def _train(self) -> None:
        steps, began = self.setting.recipe.train.steps, self.now
        self.store.announce(0, 0)
        for step in range(steps):
            reply = await self.changes.until(lambda step=step: self.store.batch(step), lambda r: r.batch)
            wait_s = self.now - began
            tokens = sum(self.tokens_of[unpack_group(blob).lease_id] for blob in reply.batch.groups)
            self.trained_tokens += tokens
            await asyncio.sleep(tokens / self.setting.trainer_rate)
            self.store.announce(step + 1, step + 1)
            self.store.ack(step, step + 1)
            self._record("trainer", step=step, step_s=self.now - began, wait_s=wait_s, tokens=tokens)
            began = self.now

    def _record(self, process: str, **figures: Any) -> None:
        self.records.append({"time": self.now, "process": process, **figures})

    # ---- rollouts

    async def _follow(self, engine: Engine) -> None:
        """The engine's version, as `workers.updates.Lane` follows the hub."""
        held, idle, last = IdleWhile(), self.idle_of(engine), (0.0, 0.0, 0)
        known = (-1, False)
        while True:
            ask = lambda: self.store.target(engine.name)  # noqa: E731
            reply = await self.changes.until(ask, lambda r, k=known: r.version not in (None, k[0]) or r.pinned != k[1])
            held.note(reply.pinned, idle.seconds)
            if reply.version != engine.version:
                await asyncio.sleep(self.setting.fetch_s)
                engine.stop_for(self.setting.pause_s)
                engine.version = reply.version
                self.store.engine_state(engine.name, engine.version, "ready")
                now = (self.now, idle.seconds, engine.rollout_tokens)
                interval_s, idle_s, tokens = (after - before for after, before in zip(now, last, strict=True))
                rate, last = tokens / max(1e-9, interval_s), now
                told = {"interval_s": interval_s, "idle_s": idle_s, "rollout_tokens_per_s": rate}
                told["held_idle_s"] = held.take(reply.pinned, idle.seconds)
                self._record("rollout", step=engine.version, engine=engine.name, **told)
            known = (engine.version, reply.pinned)

    def idle_of(self, engine: Engine) -> Idle:
        found: Idle = engine.__dict__.setdefault("idle", Idle())
        return found

    async def _feed(self, engine: Engine) -> None:
        """Keep its slots full, as `workers.rollout` does."""
        size, slots = self.setting.recipe.rollout.group_size, self.setting.slots
        idle = self.idle_of(engine)
        while True:
            wanted = math.ceil((slots + math.ceil(slots / AHEAD) - idle.samples) / size)
            if wanted <= 0:
                idle.changed.clear()
                await idle.changed.wait()
                continue
            reply = await self.changes.until(
                lambda n=wanted: self.store.lease("rollout", n, engine=engine.name), lambda r: r.leases or r.stop
            )
            for lease in reply.leases:
                idle.change(size)
                asyncio.create_task(self._group(engine, lease.lease_id)).add_done_callback(_raise)

    async def _group(self, engine: Engine, lease: int) -> None:
        idle, version = self.idle_of(engine), engine.version
        draw = random.Random(hash((self.setting.seed, lease)))
        lengths = [self.setting.length(draw) for _ in range(self.setting.recipe.rollout.group_size)]

        async def sample(length: int) -> None:
            await engine.ask(length)
            engine.rollout_tokens += length
            idle.change(-1)

        await asyncio.gather(*map(sample, lengths))
        self.tokens_of[lease] = sum(lengths)
        segment = Segment(version, np.zeros(1, np.int32), np.zeros(1, np.float32))
        samples = [Sample(i, [segment], "stop", float(i % 2), "right") for i in range(len(lengths))]
        self.store.put(pack_group(Group(lease, f"p{lease}", np.zeros(1, np.int32), samples)))

    # ---- evaluations

    async def _evaluate(self) -> None:
        recipe, table = self.setting.recipe, self.setting.recipe.eval
        sampling = EvalSampling(
            1.0, 1.0, recipe.rollout.max_new_tokens, recipe.rollout.context_length, (1,), recipe.seed
        )
        while True:
            reply = await self.changes.until(self.store.eval_next, lambda r: r.evaluation or r.stop)
            task = reply.evaluation
            if task is None:
                return
            began, before = self.now, sum(e.tokens - e.rollout_tokens for e in self.engines)
            works = [
                BenchmarkWork(one, Instantly(), Instantly(), sampling=sampling, version=task.version,
                              samples=table.samples, max_concurrency=recipe.evaluation_requests)
                for one in _benchmarks(recipe)
            ]  # fmt: skip
            engines = {engine.name: engine for engine in self.engines}
            members = Members(self, task.step, task.version)
            await evaluate(works, engines, members, max_concurrency=recipe.evaluation_requests)
            self.store.eval_done(task.step, task.version, {})
            tokens = sum(e.tokens - e.rollout_tokens for e in self.engines) - before
            self.evaluation_tokens += tokens
            self._record("eval", step=task.step, version=task.version, eval_wall_s=self.now - began,
                         eval_tokens=tokens)  # fmt: skip
            self.evaluations.append(task)


@dataclass(frozen=True)
class Members:
    """`eval_spread.Members` over the store itself."""

    simulation: Simulation
    step: int
    version: int

    async def holders(self, known: Collection[str] | None) -> Collection[str]:
        store, have = self.simulation.store, None if known is None else list(known)
        reply = await self.simulation.changes.until(
            lambda: store.eval_engines(self.version), lambda r: r.engines != have
        )
        return list(reply.engines)

    async def slots(self, engine: str, wants: int, holds: int) -> int:
        return self.simulation.setting.recipe.rollout.running

    async def release(self, engine: str) -> None:
        self.simulation.store.eval_release(self.step, self.version, engine)


def _raise(task: asyncio.Task[None]) -> None:
    if not task.cancelled():
        task.result()


def _benchmarks(recipe: Recipe) -> list[Benchmark]:
    """As many items as the recipe's benchmarks have."""
    specs = [get(name) for name in recipe.eval.benchmarks]
    return [
        Benchmark(spec.name, [Problem(f"{spec.name}{i}", "", "") for i in range(spec.counts[0])], spec.samples)
        for spec in specs
    ]


def simulate(setting: Setting) -> dict[str, Any]:
    recipe = setting.recipe
    names = [f"engine{i}" for i in range(setting.engines)]

    async def play(name: Path) -> tuple[Simulation, float]:
        settings = HubSettings(
            batch_groups=recipe.train.batch_groups, max_staleness=recipe.effective_staleness, drop_equal_groups=True,
            lease_timeout_s=1e9, steps=recipe.train.steps, eval_every=recipe.eval.every, engines=tuple(names),
            checkpoints=False,
        )  # fmt: skip
        store = HubStore(name / "hub.sqlite", settings, clock=asyncio.get_running_loop().time)
        simulation = Simulation(setting, store, Changes(store), [Engine(setting, name) for name in names])
        wall_s = await simulation.run()
        store.close()
        return simulation, wall_s

    with folder() as name, asyncio.Runner(loop_factory=SimulatedLoop) as runner:
        simulation, wall_s = runner.run(play(name))
    return figures(simulation, wall_s)


def figures(simulation: Simulation, wall_s: float) -> dict[str, Any]:
    setting, recipe, rows = simulation.setting, simulation.setting.recipe, simulation.evaluations
    generated = sum(engine.tokens for engine in simulation.engines)
    training_s = simulation.trained_tokens / setting.trainer_rate
    generation_s = generated / (setting.engine_rate * setting.engines)
    plan = {
        "processes": [{"role": "engine", "gpus": [0]}] * setting.engines
        + [{"role": "trainer", "gpus": [0]}] * setting.ranks,
        "placement": {"time_sharing": False, "shared": False},
        "running_requests": setting.slots,
    }
    verdict = bottleneck.of_run(simulation.records, recipe, plan, 0)
    due = [*range(0, recipe.train.steps, recipe.eval.every), recipe.train.steps]
    return {
        "wall_s": wall_s, "training_s": training_s, "generation_s": generation_s,
        "ratio": wall_s / max(training_s, generation_s),
        "evaluation_share_of_tokens": simulation.evaluation_tokens / generated,
        "slots_busy": sum(engine.slot_s for engine in simulation.engines) / (setting.slots * setting.engines * wall_s),
        "trainer_waited": verdict["wait_share"] if verdict else None,
        "evaluations": [(row.step, row.due_step) for row in rows],
        "missing": [one for one in due if not any(row.due_step <= one <= row.step for row in rows)],
        "limit": verdict["limit"] if verdict else None,
        "verdict": f"{verdict['words']}; try {verdict['change']}" if verdict else None,
    }  # fmt: skip


def main() -> None:
    parser = options(
        __doc__, recipe="qwen3.5-4b-m2po-delta", engines=4, ranks=4, steps=100, every=int, samples=int, staleness=int,
        slots=int, concurrency=int, engine_rate=7500.0, trainer_rate=8105.0, scaling=0.835, median=1000.0, sigma=0.9,
        fetch_s=1.0, pause_s=0.03, set="another setting of the recipe", seed=0,
    )  # fmt: skip
    args = parser.parse_args()
    keys = {"every": "eval.every", "samples": "eval.samples", "staleness": "train.max_staleness",
            "concurrency": "eval.max_concurrency", "slots": "rollout.max_running_requests"}  # fmt: skip
    sets = [f"{key}={value}" for name, key in keys.items() if (value := getattr(args, name)) is not None]
    recipe = recipe_io.load(args.recipe, [f"train.steps={args.steps}", *sets, *args.set])
    rate = args.trainer_rate * args.ranks * args.scaling ** math.log2(args.ranks)
    slots = recipe.rollout.running
    speeds = (args.engine_rate, rate, args.median, args.sigma, args.fetch_s, args.pause_s)
    found = simulate(Setting(recipe, args.engines, args.ranks, slots, *speeds, args.seed))
    show(args, found)
    sys.exit(1 if found["missing"] else 0)


if __name__ == "__main__":
    main()
