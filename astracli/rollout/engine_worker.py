"""One engine as the rollout worker sees it: behind a gate for requests, the steps of a weight update.

An update, in the order in which it happens (mode `abort`):

    fetch and stage     generation goes on
    close the gate      no new request leaves this worker
    abort, drain        every request ends its segment; partial tokens come back, all of the old version
    pause, apply, continue      with nothing running; the engine checks digests before it serves
    report, serve       the hub learns the version, then prompt + prefix are sent again
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
import sys
import time
from dataclasses import KW_ONLY, dataclass
from typing import Any

from astracli.engines.contract import UNPROVEN, PauseMode, UpdateReply, WeightReceiver, flushes
from astracli.errors import RunFailed
from astracli.hub.client import AsyncHubClient
from astracli.hub.types import GpuLeaseReply, Target
from astracli.rollout.request_gate import EngineLost, RequestGate
from astracli.rollout.slot_use import IdleWhile
from astracli.rollout.update_record import UpdateRecord
from astracli.rollout.weight_sync import Event, State

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
        self._disproved: int | None = None
        """What the engine says it holds, and a read-back has found it does not."""
        self._base: int | None = None
        """What a delta may start from: what the engine says it holds, serving or not."""
        self._pinned = False
        """Whether an evaluation holds the engine at its version."""
        self._pinned_idle = IdleWhile()

    def _tell(self, event: Event) -> None:
        """Raises EngineLost when a request has found the engine gone meanwhile."""
        self._expect_it()
        self.sync.tell(event)

    def _expect_it(self) -> None:
        if self.sync.state is State.LOST:
            raise EngineLost(f"{self.name} was lost")

    # ---- following the hub -------------------------------------------------------------------------------------------

    async def follow(self) -> None:
        """Keep the engine at the hub's target version until the hub says stop."""
        while True:
            try:
                if self.sync.state is State.LOST:
                    await self._attach()
                may_serve = self.sync.state is State.STARTING and self.version is not None
                serves = self.sync.state is State.SERVING
                reply: Target = await self.hub.target(
                    self.name,
                    have=self.version if serves else None,
                    pinned=self._pinned,
                    wait_s=0.0 if may_serve else TARGET_WAIT_S,
                )
                if reply.stop:
                    return
                self._pinned = reply.pinned
                self._pinned_idle.note(self._pinned, self.use.seconds().idle)
                if self.sync.state is State.LOST:
                    continue
                if serves and reply.down:
                    self.sync.tell(Event.LOSE)  # the supervisor saw it end: with nothing under way, nothing failed here
                elif self.time_sharing and reply.wanted:
                    if not await self._lend_gpu():
                        return
                else:
                    await self._approach(reply.version)
            except EngineLost as error:
                self._lose(error)

    async def _lend_gpu(self) -> bool:
        """Let the trainer use the GPU, and take it back afterwards. False when the hub says stop meanwhile."""
        begun = time.monotonic()
        self._tell(Event.LEND)
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
        self._tell(Event.RETURNED)
        record: dict[str, Any] = {"process": self.process, "engine": self.name}
        if self.version is not None:  # the trainer has the GPU first: it makes version 0
            record["step"] = self.version
        seconds = {"release_s": released - begun, "away_s": back - released, "resume_s": time.monotonic() - back}
        await self.hub.metrics([record | seconds])
        return True

    async def _approach(self, target: int | None) -> None:
        """Bring the engine to `target`; without one, it serves what it started with."""
        if self.version is not None and target in (None, self.version):
            if self.sync.state is State.STARTING:
                await self._let_in()
        elif target is not None:
            await self._update(target)

    async def _attach(self) -> None:
        """Wait for the engine and ask what it holds. Nobody is served until that is the target.

        An engine that was started again serves nothing before it was given weights.
        """
        if self._failures:
            await self.hub.engine_state(self.name, None, "down")
        await self.engine.wait_ready(self.ready_timeout_s)
        info = await self._call(self.engine.model_info())
        held = int(info["weight_version"])
        self._base = held if held not in (UNPROVEN, self._disproved) else None
        serving = bool(info.get("serving", True))
        if info.get("paused", True):  # not every engine says; to continue what runs changes nothing
            await self._call(self.engine.resume())
        if not self.fetcher.watched:  # our loader would first compile, and stage nothing, in a pause
            named = UNPROVEN if self._base is None else self._base
            self.fetcher.wake(named)
            await self._call(self.engine.pause("abort"))
            await self._call(self.engine.apply_staged(named))  # refused by weights without a version; it runs now
            await self._call(self.engine.resume())
        self.sync.version = self._base if serving else None
        self.sync.tell(Event.FOUND)

    async def _let_in(self) -> None:
        """The engine holds checked weights: tell the hub, then open the gate."""
        self._expect_it()
        await self.hub.engine_state(self.name, self.version, "ready")
        self._tell(Event.SERVED)

    # ---- an update ---------------------------------------------------------------------------------------------------

    async def _update(self, target: int) -> None:
        have = self._base if self._base != target else None
        update = UpdateRecord(target)
        try:
            await self._transfer(update, have)
        except EngineLost:
            raise
        except RunFailed as error:
            await self._resync(update, error)
        self.sync.version = target
        if (
            update.readback
        ):  # the hub hears of it after the read-back: an evaluation would begin, and none holds answers
            self._tell(Event.UNPROVEN)
        else:
            await self._let_in()
        update.gap_ends()
        if update.readback:
            await self._await_readback(update)
        since = {"held_idle_s": self._pinned_idle.take(self._pinned, self.use.seconds().idle)} | self.usage()
        await self.hub.metrics([{"process": self.process, "engine": self.name} | update.record() | since])

    async def _await_readback(self, update: UpdateRecord) -> None:
        """Wait for the read-back; weights that are not the trainer's are replaced by a full payload."""
        try:
            found = await asyncio.to_thread(self.fetcher.readback, update.target)
        except RunFailed as error:
            self._disproved = update.target
            self.sync.tell(Event.DISPROVEN)
            await self._replace(update, error)
            return
        except BaseException:
            self.sync.proven.set()  # nobody waits for a worker that ends
            raise
        update.figures |= found
        if self.sync.state is State.VERIFYING:  # it may have been lost meanwhile
            await self.hub.engine_state(self.name, update.target, "ready")
        self.sync.tell(Event.PROVEN)

    async def _replace(self, update: UpdateRecord, cause: RunFailed) -> None:
        """A full payload for weights that a read-back found wrong. It is read back before it serves: the second time
        nobody trusts it."""
        update.gap_begins()
        await self._resync(update, cause)
        if update.readback:
            self._tell(Event.DOUBTED)
            update.figures |= await asyncio.to_thread(self.fetcher.readback, update.target)
        self.sync.version = update.target
        if update.readback:
            await self.hub.engine_state(self.name, update.target, "ready")
            self.sync.tell(Event.PROVEN)
        else:
            await self._let_in()
        update.gap_ends()

    async def _resync(self, update: UpdateRecord, cause: RunFailed) -> None:
        """The weights did not become the target's: give the engine a full payload, once."""
        update.resyncs += 1
        print(f"warning: {self.name}: {cause.message}; sending a full payload", file=sys.stderr, flush=True)
        try:
            await self._transfer(update, None)
        except EngineLost:
            raise
        except RunFailed as error:
            raise RunFailed(
                f"{self.name} could not be brought to version {update.target}: {cause.message}; "
                f"then, with a full payload: {error.message}",
                "the engine's log and weights/ in the run directory say more",
            ) from error

    async def _transfer(self, update: UpdateRecord, have: int | None) -> None:
        """Fetch, drain, apply. Raises EngineLost, or RunFailed when the payload or its application is at fault."""
        self._tell(Event.WANTED)
        begun = time.monotonic()
        plan = await asyncio.to_thread(self.fetcher.fetch, update.target, have)
        update.figures |= {"fetch_s": time.monotonic() - begun, "fetched_bytes": plan.bytes, "kind": plan.kind}
        update.figures |= {"transfer_s": plan.transfer_s, "stage_s": plan.stage_s}
        if self.mode == "abort":
            update.gap_begins()
            self._tell(Event.SHUT)
            await self._drain()
        self._tell(Event.STAGED)

        def applied(reply: UpdateReply) -> None:  # in another thread; what this loop hears next is after the update
            if reply.outcome.get("readback"):  # it may be of weights that are not the trainer's
                self.sync.hold()

        flush = flushes(self.mode)
        reply = await self._call(self.engine.update(update.target, self.mode, flush=flush, applied=applied))
        if not reply.success:
            update.gap_begins()
            self._tell(Event.REFUSED)  # requests that it found running went on with weights that nobody trusts
            await self._call(self.engine.abort_all())
            await self._call(self.engine.resume())
            await self._drain()
            raise RunFailed(f"version {update.target} was not applied: {reply.message}")
        self._base, self._disproved = update.target, None
        update.applied(reply)
