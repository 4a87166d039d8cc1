"""The rollout worker: leases prompts, runs an episode of the recipe's Env for each sample, hands scored groups in, and
updates its engines' weights.

One asyncio loop. Each engine has an `EngineWorker`, a feeder that keeps its slots full and a follower that keeps it at
the hub's target version. A group stays on one engine and its episodes begin together; each frees its slot when it asks
for nothing more, and the next group is leased while the longest episode still runs. A request that is ended by an
update is continued from prompt + prefix: its tokens form one segment per version. Draws depend on (recipe seed, lease,
sample, position) alone. In a deterministic run all groups of one grant are one call to the engine, which runs nothing
beside it (`policy`): log-probabilities then depend on nothing else either, to the last bit.

Without a trainer (`config.samples`) groups are written to a file, and the worker ends. In supervised training there are
no prompts: it only updates its engines (`config.generates`).
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import sys
import time
from collections import deque
from collections.abc import Coroutine, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from astracli.config import algorithms
from astracli.config.recipe_data import sets
from astracli.data.prompts import Problem, PromptSource, stop_token_ids
from astracli.engines.stops import StopStrings
from astracli.envs import registry as envs
from astracli.envs.attempt import Failure, score
from astracli.envs.contract import Env, EnvSetup, Episode
from astracli.envs.prompt_tokens import PromptTokens
from astracli.envs.time_limit import LoopWatch
from astracli.errors import RunFailed
from astracli.hub.client import AsyncHubClient
from astracli.hub.types import Leases, SlotLimit
from astracli.models.adapter import load_tokenizer
from astracli.models.chat import ChatFormat
from astracli.process.config import RolloutConfig
from astracli.process.worker import Reporter, worker_main
from astracli.rewards.reward import Rewards, open_pools
from astracli.rl.types import Group
from astracli.rollout.engine_worker import EngineWorker
from astracli.rollout.engine_workers import engine_workers, only_update
from astracli.rollout.episodes import Failures, leaves, play
from astracli.rollout.groups import SampleWriter, group_of
from astracli.rollout.policy import RolloutSampling
from astracli.rollout.request_gate import EngineLost
from astracli.rollout.slot_gate import SlotGate

LEASE_WAIT_S = 2.0
REPORT_S = 1.0
ALONE_S = 1.0
SHARED_S = 0.1
"""How often the hub is asked for an engine's slots, while rollouts have it alone, and while an evaluation uses it."""
RATE_WINDOW_S = 10.0
UNFIT_PROMPTS = 10_000
"""Prompts of an endless source that are too long before one fits: then the run ends. Of others, an epoch."""


@dataclass
class Rollout:
    """The worker's work. `run` ends when the hub says stop, or when the groups of `config.samples` are written."""

    config: RolloutConfig
    reporter: Reporter
    hub: AsyncHubClient
    workers: Sequence[EngineWorker]
    source: PromptSource
    env: Env

    def __post_init__(self) -> None:
        config, tokenizer = self.config, self.env.tokenizer
        rollout = config.recipe.rollout
        stop = StopStrings(tuple(rollout.stop), tokenizer) if rollout.stop else None
        self.sampling = RolloutSampling(config.recipe, tuple(stop_token_ids(tokenizer, config.model_path)), stop)
        self._failures = Failures(rollout.env, self.reporter.warn)
        self._smallest_group = algorithms.find(config.recipe.algorithm.name).smallest_group
        self._slots, self._group_size = rollout.running, rollout.group_size
        for worker in self.workers:
            worker.use.slots = self._slots
            worker.slots = SlotGate(self._slots if config.recipe.launch.deterministic else 0, rollout.refill)
        self._held: set[int] = set()
        self._unfit = 0
        """Prompts that were too long."""
        self._fit = False
        """Whether any prompt has been asked."""
        self._tasks: asyncio.TaskGroup
        self._over = asyncio.Event()
        self._writer = SampleWriter(config.samples) if config.samples else None
        self._waits: dict[str, str | None] = {}
        self._done = {"groups": 0, "samples": 0}

    async def run(self) -> None:
        """Raises the first failure of any part, once everything has been cancelled."""
        await self.hub.release(self.config.name)
        self.reporter.ready()
        try:
            async with asyncio.TaskGroup() as self._tasks:
                parts: list[Coroutine[Any, Any, None]] = [self._renew(), self._report()]
                for worker in self.workers:
                    parts += [self._follow(worker), self._feed(worker)]
                    if not self.config.recipe.launch.deterministic:
                        parts.append(self._share(worker))
                for part in parts:
                    self._tasks.create_task(part)
                await self._over.wait()
                raise _Over
        except ExceptionGroup as group:
            failures = [error for error in leaves(group) if not isinstance(error, _Over)]
            if failures:
                raise next((error for error in failures if isinstance(error, RunFailed)), failures[0]) from None
        finally:
            if self._held:
                with contextlib.suppress(RunFailed):
                    await self.hub.give_back(sorted(self._held))
        if self._writer is not None:  # no update has told how full the slots were
            await self.hub.metrics([{"process": self.config.name} | worker.usage() for worker in self.workers])

    async def _follow(self, worker: EngineWorker) -> None:
        await worker.follow()
        self._over.set()

    # ---- leases ------------------------------------------------------------------------------------------------------

    async def _feed(self, worker: EngineWorker) -> None:
        """Keep the engine's slots full, as far as the hub grants leases."""
        while True:
            await worker.gate.wait()
            wanted = self._wanted(worker)
            if wanted <= 0:
                worker.changed.clear()
                await worker.changed.wait()
                continue
            wait_s = LEASE_WAIT_S if self._waits.get(worker.name) else 0.0
            reply: Leases = await self.hub.lease(self.config.name, wanted, engine=worker.name, wait_s=wait_s)
            self._waits[worker.name] = None if reply.leases else reply.wait
            if reply.stop:
                self._over.set()
                return
            leases = {lease.lease_id: lease.prompt_index for lease in reply.leases}
            self._held |= leases.keys()
            worker.use.change(outstanding=len(leases) * self._group_size)
            together = [leases] if self.config.recipe.launch.deterministic else [{i: n} for i, n in leases.items()]
            for some in together if leases else []:
                self._tasks.create_task(self._groups(worker, some))

    def _wanted(self, worker: EngineWorker) -> int:
        """Groups to lease for this engine now: as many as leave none of its slots empty.

        Of groups of G, at most G - 1 samples then wait in the engine. Each slot that becomes free takes one, so that
        they hardly age: of S slots, S become free in a completion's mean time.
        """
        outstanding = worker.use.outstanding
        if self.config.recipe.launch.deterministic and outstanding:
            return 0
        groups = math.ceil((worker.slots.limit - outstanding) / self._group_size)
        return groups if self._writer is None else min(groups, self._writer.left - len(self._held))

    async def _share(self, worker: EngineWorker) -> None:
        """Keep to the engine's slots that the hub leaves to rollouts: an evaluation may use some."""
        while True:
            starved = self._waits.get(worker.name) is not None
            # without a lease to be had: what there is, and room for the next one
            wants = worker.use.outstanding + 2 * self._group_size if starved else self._slots
            holds = max(worker.slots.taken, worker.use.sent)
            reply: SlotLimit = await self.hub.slots(worker.name, "rollout", min(wants, self._slots), holds)
            worker.slots.limit = min(reply.limit, self._slots)
            worker.changed.set()
            await asyncio.sleep(SHARED_S if reply.shared else ALONE_S)

    async def _renew(self) -> None:
        """Prolong what is held. A lease that was lost is finished all the same: the first arrival counts."""
        while True:
            await asyncio.sleep(self.config.recipe.launch.lease_timeout_s / 3)
            if self._held:
                await self.hub.renew(sorted(self._held), self.config.name)

    # ---- a group -----------------------------------------------------------------------------------------------------

    async def _groups(self, worker: EngineWorker, leases: Mapping[int, int]) -> None:
        """Leases (id -> prompt) from prompts to scored groups. The engine's slots are free before they are scored."""
        problems = {lease: self.source.problem(index) for lease, index in leases.items()}
        unfit = {lease: reason for lease, problem in problems.items() if (reason := self.env.unfit(problem))}
        asked = {lease: problem for lease, problem in problems.items() if lease not in unfit}
        outstanding = len(leases) * self._group_size
        self._fit |= bool(asked)

        def slots(change: int) -> None:
            nonlocal outstanding
            outstanding += change
            worker.use.change(outstanding=change)
            worker.changed.set()

        try:
            try:
                found = await play(self.env, worker, self.sampling, asked, slots)
            finally:
                slots(-outstanding)
            for lease, reason in unfit.items():
                await self._leave_out(lease, reason)
                self._let_go(worker, [lease])
            async with asyncio.TaskGroup() as tasks:
                for lease, problem in asked.items():
                    tasks.create_task(self._hand_in(worker, lease, problem, found[lease]))
        except EngineLost:
            await self.hub.give_back(leases)
            self._let_go(worker, leases)

    def _let_go(self, worker: EngineWorker, leases: Iterable[int]) -> None:
        self._held.difference_update(leases)
        worker.changed.set()

    async def _hand_in(
        self, worker: EngineWorker, lease_id: int, problem: Problem, found: Sequence[Episode | Failure]
    ) -> None:
        """Score the episodes that did not fail, and hand them in as a group. A prompt is skipped when so many of them
        failed that the algorithm has no advantages for the rest."""
        episodes = {index: one for index, one in enumerate(found) if isinstance(one, Episode)}
        enough, limit_s = len(episodes) >= self._smallest_group, self.config.recipe.rollout.env_timeout_s
        scores = await score(self.env, problem, list(episodes.values()), limit_s) if enough else []
        if isinstance(scores, Failure):  # of all of them
            found, enough = [one if isinstance(one, Failure) else scores for one in found], False
        failed = self._failures.note(found)
        worker.count_failed(failed)
        if not enough:
            reason = f"{failed} of {len(found)} episodes failed, the last with {self._failures.last}"
            await self.hub.skip(lease_id, reason)
            self._let_go(worker, [lease_id])
            return
        assert isinstance(scores, list)
        group = group_of(self.env, lease_id, problem, episodes, scores)
        await self.hub.put_group(group)
        self._held.discard(lease_id)
        self._count(group)

    async def _leave_out(self, lease: int, reason: str) -> None:
        """A prompt that is too long: counted, and the end of the run when no other fits."""
        await self.hub.skip(lease, reason)
        self._unfit += 1
        every = len(self.source) if len(self.source) < sys.maxsize else UNFIT_PROMPTS
        if not self._fit and self._unfit >= every:
            raise RunFailed(
                f"none of {self._unfit} prompts fits, the last: {reason}",
                "raise data.max_prompt_tokens or rollout.context_length, or train on other problems",
            )

    def _count(self, group: Group) -> None:
        self._done["groups"] += 1
        self._done["samples"] += len(group.samples)
        if self._writer is not None:
            self._writer.write(group)
            if not self._writer.left:
                self._over.set()
            for worker in self.workers:
                worker.changed.set()

    # ---- notes -------------------------------------------------------------------------------------------------------

    async def _report(self) -> None:
        """Each second: what is done, how fast, how full slots are, and what is waited for when nothing generates."""
        seen: deque[tuple[float, int, float]] = deque()
        uses = [worker.use for worker in self.workers]
        while True:
            tokens, busy_s = sum(worker.tokens for worker in self.workers), sum(use.seconds().busy for use in uses)
            seen.append((time.monotonic(), tokens, busy_s))
            while len(seen) > 2 and seen[-1][0] - seen[0][0] > RATE_WINDOW_S:
                seen.popleft()
            passed, made, busy = (last - first for first, last in zip(seen[0], seen[-1], strict=True))
            passed = max(1e-9, passed)  # of the first second there is nothing to compare with
            rates = {"generated_tokens_per_s": round(made / passed, 1)}
            rates["slots_busy"] = round(busy / passed / len(uses), 3)
            left_out = {"too_long": self._unfit} if self._unfit else {}
            self.reporter.progress(**self._done, in_flight=len(self._held), **rates, **left_out)
            outstanding = any(use.outstanding for use in uses)
            self.reporter.waiting(None if outstanding else self._wait_reason())
            await asyncio.sleep(REPORT_S)

    def _wait_reason(self) -> str | None:
        closed = [worker.name for worker in self.workers if not worker.gate.is_set()]
        if len(closed) == len(self.workers):
            return f"weights or readiness of {', '.join(closed)}"
        return next((reason for reason in self._waits.values() if reason), None)


class _Over(Exception):
    """Everything asked for is done; ends the task group."""


async def _main(config: RolloutConfig, reporter: Reporter, source: PromptSource, env: Env) -> None:
    async with contextlib.AsyncExitStack() as stack:
        hub = await stack.enter_async_context(AsyncHubClient(config.hub_url, config.token))
        workers = await engine_workers(config, hub, stack)
        stack.enter_context(LoopWatch(config.recipe.rollout.env_timeout_s))
        await Rollout(config, reporter, hub, workers, source, env).run()


def run(config: RolloutConfig, reporter: Reporter) -> None:
    """Entry of the process."""
    if not config.generates:
        asyncio.run(only_update(config, reporter))
        return
    recipe = config.recipe
    source = PromptSource(recipe.data, recipe.seed, config.data_paths)
    tokenizer = load_tokenizer(config.model_path)

    def told(words: str) -> None:
        reporter.warn(f"the first error of a reward:\n{words}")

    tables = sets(recipe.data)
    rewards = {
        name: Rewards.of(table, max_errors=recipe.most_reward_errors, on_error=told, on_excess=reporter.warn)
        for name, table in tables.items()
    }
    with contextlib.ExitStack() as stack:
        pools = open_pools(stack, rewards)
        prompts = PromptTokens(tokenizer, ChatFormat.of(recipe))
        setup = EnvSetup(recipe, tokenizer, lambda problem: pools[problem.source], prompts)
        env = envs.find(recipe.rollout.env)(setup)
        stack.callback(env.close)
        asyncio.run(_main(config, reporter, source, env))


if __name__ == "__main__":
    worker_main(run, RolloutConfig)
