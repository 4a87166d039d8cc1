"""One engine as the rollout worker sees it: behind a gate for requests, the steps of a weight update.

An update, in the order in which it happens (mode `abort`):

    fetch and stage     generation goes on
    close the gate      no new request leaves this worker
    abort, drain        every request ends its segment; partial tokens come back, all of the old version
    pause, apply, continue      with nothing running; the engine checks digests before it serves
    report, open        the hub learns the version, then prompt + prefix are sent again
    read back           when due, beside generation, and before the report: results are held, and no evaluation begins,
                        until the weights are proven under HF names too

An engine that an evaluation holds at its version gets no update until the hub lets it go; its rollouts go on.

With time sharing the engine worker holds the engine's GPU lease. When the trainer wants it, and no evaluation is pinned
there: close the gate, abort, drain, pause, settle (wait for a read-back that still runs), release KV cache and weights
(the engine keeps a copy of them in host memory), give the lease; then wait for it, take the memory back and continue.

`in_place`, the default, and `retract` leave requests running: the gate stays open, and what comes back carries the
*oldest* version that was in force during its request, so that staleness is never understated.
An update that fails ends and loses the requests that it found running, and is repeated once with a full payload; a
second failure ends the run. A read-back that finds other weights closes the gate, loses what was generated meanwhile,
and is answered by a full payload too.
"""

from __future__ import annotations

import asyncio
import contextlib
import sys
import time
from dataclasses import KW_ONLY, dataclass
from typing import Any

from astracli.engines import registry as engines
from astracli.engines.contract import UNPROVEN, PauseMode, UpdateReply, WeightReceiver, flushes
from astracli.errors import RunFailed
from astracli.hub.client import AsyncHubClient
from astracli.hub.types import GpuLeaseReply, Target
from astracli.process.config import RolloutConfig
from astracli.process.worker import Reporter
from astracli.rollout.request_gate import EngineLost, RequestGate
from astracli.rollout.slot_use import IdleWhile

TARGET_WAIT_S = 2.0
"""How long one question for the target version waits for another answer."""


@dataclass(eq=False)
class EngineWorker(RequestGate):
    """One engine: its gate, and how it follows the hub."""

    hub: AsyncHubClient
    fetcher: WeightReceiver
    _: KW_ONLY
    process: str
    mode: PauseMode = "abort"
    ready_timeout_s: float = 600.0
    time_sharing: bool = False
    """Whether a trainer uses the engine's GPU, too, when this engine does not."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._serving = False
        self._wrong: int | None = None
        """What the engine says it holds, and a read-back has found it does not."""
        self._held = False
        """Whether an evaluation holds the engine at its version."""
        self._held_idle = IdleWhile()

    # ---- following the hub -------------------------------------------------------------------------------------------

    async def follow(self) -> None:
        """Keep the engine at the hub's target version until the hub says stop."""
        while True:
            try:
                if not self._attached:
                    await self._attach()
                ready_to_serve, told = self._serving and not self.open.is_set(), self.open.is_set()
                reply: Target = await self.hub.target(
                    self.name,
                    have=self.version if self.open.is_set() else None,
                    pinned=self._held,
                    wait_s=0.0 if ready_to_serve else TARGET_WAIT_S,
                )
                if reply.stop:
                    return
                self._held = reply.pinned
                self._held_idle.note(self._held, self.use.seconds().idle)
                if told and reply.down:
                    self._attached = False  # the supervisor saw it end: with nothing under way, nothing failed here
                elif self.time_sharing and self._attached and reply.wanted:
                    if not await self._lend_gpu():
                        return
                elif self._attached:
                    await self._approach(reply.version)
            except EngineLost as error:
                self._lose(error)

    async def _lend_gpu(self) -> bool:
        """Let the trainer use the GPU, and take it back afterwards. False when the hub says stop meanwhile."""
        begun = time.monotonic()
        self.open.clear()
        await self._drain()
        await self.hub.engine_state(self.name, self.version, "updating")
        await self._call(self.engine.pause("abort"))
        await self._call(self.engine.settle())  # a read-back may outlive whoever waited for it
        await self._call(self.engine.release_memory())
        released = time.monotonic()
        await self.hub.give_gpu_lease(self.name, self.name)
        held = False
        while not held:
            reply: GpuLeaseReply = await self.hub.take_gpu_lease(self.name, self.name, wait_s=TARGET_WAIT_S)
            if reply.stop:
                return False
            held = reply.held
        back = time.monotonic()
        await self._call(self.engine.resume_memory())
        await self._call(self.engine.resume())
        record: dict[str, Any] = {"process": self.process, "engine": self.name}
        if self.version is not None:  # the trainer has the GPU first: it makes version 0
            record["step"] = self.version
        seconds = {"release_s": released - begun, "away_s": back - released, "resume_s": time.monotonic() - back}
        await self.hub.metrics([record | seconds])
        return True

    async def _approach(self, target: int | None) -> None:
        """Bring the engine to `target`; without one, it serves what it started with."""
        if self._serving and target in (None, self.version):
            if not self.open.is_set():
                await self._let_in()
        elif target is not None:
            await self._update(target)

    async def _attach(self) -> None:
        """Wait for the engine and ask what it holds. The gate stays closed until that is the target.

        An engine that was started again serves nothing before it was given weights.
        """
        self.open.clear()  # an update may have opened it since the engine was lost, which the hub hears of anew
        if self._failures:
            await self.hub.engine_state(self.name, None, "down")
        await self.engine.wait_ready(self.ready_timeout_s)
        info = await self._call(self.engine.model_info())
        held = int(info["weight_version"])
        self.version = held if held not in (UNPROVEN, self._wrong) else None
        self._serving = self.version is not None and bool(info.get("serving", True))
        if info.get("paused", True):  # not every engine says; to continue what runs changes nothing
            await self._call(self.engine.resume())
        if not self.fetcher.watched:  # our loader would first compile, and stage nothing, in a pause
            named = UNPROVEN if self.version is None else self.version
            self.fetcher.wake(named)
            await self._call(self.engine.pause("abort"))
            await self._call(self.engine.apply_staged(named))  # refused by weights without a version; it runs now
            await self._call(self.engine.resume())
        self._attached = True

    async def _let_in(self) -> None:
        """The engine holds checked weights: tell the hub, then open the gate."""
        await self.hub.engine_state(self.name, self.version, "ready")
        self.open.set()

    # ---- an update ---------------------------------------------------------------------------------------------------

    async def _update(self, target: int) -> None:
        have = self.version if self.version != target else None
        record: dict[str, Any] = {"process": self.process, "step": target, "engine": self.name, "resyncs": 0}
        try:
            await self._transfer(target, have, record)
        except EngineLost:
            raise
        except RunFailed as error:
            await self._resync(target, record, error)
        self.version, self._serving = target, True
        due = record.pop("readback")
        if due:  # the hub hears of it after the read-back: an evaluation would begin, whose answers nobody holds back
            self.open.set()
        else:
            await self._let_in()
        gate_closed = record.pop("gate_closed")
        record["gap_s"] = time.monotonic() - gate_closed if gate_closed is not None else 0.0
        if due:
            await self._await_readback(target, record)
        since = {"held_idle_s": self._held_idle.take(self._held, self.use.seconds().idle)} | self.usage()
        await self.hub.metrics([record | since])

    async def _await_readback(self, target: int, record: dict[str, Any]) -> None:
        """Wait for the read-back of `target`; weights that are not the trainer's are replaced by a full payload."""
        try:
            record |= await asyncio.to_thread(self.fetcher.readback, target)
        except RunFailed as error:
            closed = time.monotonic()
            self.open.clear()
            self.version, self._serving, self._wrong = None, False, target
            self._failed_readbacks += 1
            self._readback_done.set()
            await self._resync(target, record, error)
            record.pop("gate_closed")
            if record.pop("readback"):  # before it serves: the second time nobody trusts it
                record |= await asyncio.to_thread(self.fetcher.readback, target)
            self.version, self._serving = target, True
            await self._let_in()
            record["gap_s"] += time.monotonic() - closed
        else:
            if self.open.is_set():  # the engine may have been lost meanwhile
                await self.hub.engine_state(self.name, target, "ready")
        finally:
            self._readback_done.set()

    async def _resync(self, target: int, record: dict[str, Any], cause: RunFailed) -> None:
        """The weights did not become the target's: give the engine a full payload, once."""
        record["resyncs"] += 1
        print(f"warning: {self.name}: {cause.message}; sending a full payload", file=sys.stderr, flush=True)
        try:
            await self._transfer(target, None, record)
        except EngineLost:
            raise
        except RunFailed as error:
            raise RunFailed(
                f"{self.name} could not be brought to version {target}: {cause.message}; "
                f"then, with a full payload: {error.message}",
                "the engine's log and weights/ in the run directory say more",
            ) from error

    async def _transfer(self, target: int, have: int | None, record: dict[str, Any]) -> None:
        """Fetch, drain, apply. Raises EngineLost, or RunFailed when the payload or its application is at fault."""
        record.setdefault("gate_closed", None)
        begun = time.monotonic()
        plan = await asyncio.to_thread(self.fetcher.fetch, target, have)
        record |= {"fetch_s": time.monotonic() - begun, "fetched_bytes": plan.bytes, "kind": plan.kind}
        record |= {"transfer_s": plan.transfer_s, "stage_s": plan.stage_s}
        if self.mode == "abort":
            self._shut(record)
            await self._drain()
        proven = self._readback_done.is_set()

        def applied(reply: UpdateReply) -> None:  # in another thread; what this loop hears next is after the update
            if reply.outcome.get("readback"):  # it may be of weights that are not the trainer's
                self._readback_done.clear()

        try:
            update = await self._call(self.engine.update(target, self.mode, flush=flushes(self.mode), applied=applied))
        except EngineLost:
            if proven:
                self._readback_done.set()
            raise
        if not update.success:
            self._serving = False
            self._shut(record)
            self.version = None
            self._failed_readbacks += 1  # requests that it found running went on with weights that nobody trusts
            await self._call(self.engine.abort_all())
            await self._call(self.engine.resume())
            await self._drain()
            raise RunFailed(f"version {target} was not applied: {update.message}")
        self._wrong = None
        record |= {**update.seconds, "readback": bool(update.outcome.get("readback"))}
        if "changed" in update.outcome:
            record["changed"] = update.outcome["changed"]

    def _shut(self, record: dict[str, Any]) -> None:
        """Close the gate, and write down when that was: the first time of this update."""
        if record["gate_closed"] is None:
            record["gate_closed"] = time.monotonic()
        self.open.clear()


async def engine_workers(
    config: RolloutConfig, hub: AsyncHubClient, stack: contextlib.AsyncExitStack
) -> list[EngineWorker]:
    """A worker for each engine of a process; `stack` closes what they use."""
    kind, recipe, workers = engines.get(config.engine), config.recipe, []
    for entry in config.engines:
        client = kind.client(entry.url, config.token, name=entry.name, stage_dir=entry.stage_dir)
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
