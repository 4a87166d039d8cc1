"""One evaluation over several engines at once: each takes the next call when it has room.

An engine that arrives late or is slower serves less. One that is lost gives its unanswered calls back to the others,
and is asked again when it holds the version again. An engine is released as soon as no call is left to be sent and
every sample of its own is recorded; the evaluation ends when all samples are there.

`fixed` (deterministic runs): the calls are dealt out beforehand, in turn, and each engine gets one at a time. What is
generated together then depends on nothing but the items and the order of the engines.
"""

from __future__ import annotations

import asyncio
import itertools
import time
from collections import deque
from collections.abc import Callable, Collection, Coroutine, Mapping, Sequence
from dataclasses import InitVar, dataclass
from typing import TYPE_CHECKING, Any, Protocol

from astracli.errors import RunFailed
from astracli.evaluation.benchmark import BenchmarkWork, Result, Unit

if TYPE_CHECKING:
    from astracli.engines.client import EngineClient

PATIENCE_S = 900.0
"""How long a call may meet an engine that is away, or that aborts it again and again, before the evaluation ends."""
REFUSALS = 3
"""Failures of a call on engines that are healthy, after which the evaluation ends."""
LONGEST_PAUSE_S = 2.0
SLOTS_EVERY_S = 0.1
"""How often it is asked how many of an engine's slots may be used."""


class Members(Protocol):
    """Which engines hold the evaluated version, and who is told when one has served its share."""

    async def holders(self, known: Collection[str] | None) -> Collection[str]:
        """Names of the engines that can be asked. Waits until they are others than `known`; None: as it is now."""

    async def slots(self, engine: str, wants: int, holds: int) -> int:
        """Samples that may be at the engine at once from now on: rollouts use it, too. `wants`: as many as there are
        for it; `holds`: as many as are there."""

    async def release(self, engine: str) -> None: ...


@dataclass
class Call:
    """Samples that one request to an engine brings."""

    work: BenchmarkWork
    units: list[Unit]
    refusals: int = 0
    first_failed: float | None = None

    def failed(self) -> bool:
        """Whether its time is up, counted from its first failure."""
        self.first_failed = self.first_failed or time.monotonic()
        return time.monotonic() - self.first_failed > PATIENCE_S


@dataclass
class Share:
    """What one engine serves of the evaluation."""

    name: str
    engine: EngineClient
    queue: deque[Call]
    """Where its next call comes from: all engines' queue, or its own when the split is fixed."""
    most: int
    """Samples that may be at the engine at once."""
    samples: int = 0
    """At the engine now."""
    filling: bool = True
    """It gets calls until it has as many as it may; then none before some have ended (`refill`)."""
    open_calls: int = 0
    """Sent, and not recorded or given back."""
    away: bool = False
    """It failed, and has not been found healthy since."""
    released: bool = False
    pauses: int = 0
    """Failures and aborts in a row."""

    def next_pause(self) -> float:
        self.pauses += 1
        return float(min(LONGEST_PAUSE_S, 0.05 * 2 ** (self.pauses - 1)))


async def evaluate(
    works: Sequence[BenchmarkWork],
    engines: Mapping[str, EngineClient],
    members: Members | None = None,
    *,
    max_concurrency: int = 64,
    refill: int = 1,
    fixed: bool = False,
    on_progress: Callable[[BenchmarkWork], None] | None = None,
    on_waiting: Callable[[bool], None] | None = None,
) -> list[Result]:
    """Every sample of every benchmark, at most `max_concurrency` at an engine at once, and no more than its slots that
    `members` leave to it. `refill`: as many have to be missing before an engine that was full gets new ones.

    `on_progress` gets the first benchmark that is not done; `on_waiting`, whether nothing is under way because no
    engine can be asked. Raises RunFailed when another version answers, or a call finds no engine that answers it.
    """
    spread = _Spread(works, engines, members, max_concurrency, refill, fixed, on_progress, on_waiting)
    try:
        await spread.run()
    except ExceptionGroup as failures:
        raise failures.exceptions[0] from None
    return [work.result() for work in works]


@dataclass
class _Spread:
    _works: Sequence[BenchmarkWork]
    engines: InitVar[Mapping[str, EngineClient]]
    _members: Members | None
    """None: without a run, every engine can always be asked."""
    _most: int
    """Samples at an engine at once."""
    _refill: int
    _fixed: bool
    _on_progress: Callable[[BenchmarkWork], None] | None
    _on_waiting: Callable[[bool], None] | None

    def __post_init__(self, engines: Mapping[str, EngineClient]) -> None:
        self._present: Collection[str] = frozenset(engines) if self._members is None else ()
        self._changed = asyncio.Event()
        self._tasks: asyncio.TaskGroup
        self._waiting: list[asyncio.Task[None]] = []
        self._begun: set[str] = set()
        calls = [Call(work, units) for work in self._works for units in work.calls]
        common = deque(() if self._fixed else calls)
        shared = self._members is not None and not self._fixed
        self._shares = [
            Share(name, engine, deque() if self._fixed else common, 0 if shared else self._most)
            for name, engine in engines.items()
        ]
        for call, share in zip(calls if self._fixed else (), itertools.cycle(self._shares), strict=False):
            share.queue.append(call)

    async def run(self) -> None:
        self._tell()
        async with asyncio.TaskGroup() as self._tasks:
            if self._members is not None:
                self._beside(self._watch(self._members))
                for share in self._shares if not self._fixed else ():
                    self._beside(self._keep_to_slots(share, self._members))
            while any(work.done < work.total for work in self._works):
                self._deal()
                self._release([share for share in self._shares if not share.queue and not share.open_calls])
                if self._on_waiting is not None:
                    self._on_waiting(not any(share.open_calls for share in self._shares))
                self._changed.clear()
                await self._changed.wait()
            self._release(self._shares)
            for task in self._waiting:
                task.cancel()
        self._waiting.clear()  # what a cancelled task raised refers to this object: all samples would stay in a cycle

    def _release(self, shares: Sequence[Share]) -> None:
        for share in shares:
            if not share.released:
                share.released = True
                if self._members is not None:
                    self._tasks.create_task(self._members.release(share.name))

    def _beside(self, waiting: Coroutine[Any, Any, None]) -> None:
        """What may still wait when every sample is there, and ends then."""
        self._waiting.append(self._tasks.create_task(waiting))

    async def _watch(self, members: Members) -> None:
        known: Collection[str] | None = None
        while True:
            known = self._present = await members.holders(known)
            self._changed.set()

    async def _keep_to_slots(self, share: Share, members: Members) -> None:
        while not share.released:
            there = share.name in self._present and not share.away
            waiting = sum(len(call.units) for call in itertools.islice(share.queue, self._most)) if there else 0
            share.most = min(self._most, await members.slots(share.name, share.samples + waiting, share.samples))
            self._changed.set()
            await asyncio.sleep(SLOTS_EVERY_S)

    def _deal(self) -> None:
        """Send calls while an engine has room: to the one with the fewest samples, of equals to the first."""
        while able := [share for share in self._shares if self._has_room(share)]:
            share = min(able, key=lambda share: share.samples)
            call = share.queue.popleft()
            if call.work.benchmark.name not in self._begun:
                self._begun.add(call.work.benchmark.name)
                call.work.begin()
            share.samples += len(call.units)
            share.open_calls += 1
            self._tasks.create_task(self._ask(share, call))

    def _has_room(self, share: Share) -> bool:
        if not share.queue or share.away or share.released or share.name not in self._present:
            return False
        if self._fixed or not share.samples:
            return not share.samples and share.most > 0
        room = share.most - share.samples
        if room < len(share.queue[0].units):
            share.filling = False
        elif room >= min(self._refill, share.most, len(share.queue)):
            share.filling = True
        return share.filling

    async def _ask(self, share: Share, call: Call) -> None:
        failure: RunFailed | None = None
        answers: list[tuple[Unit, Any]] = []
        try:
            answers = await call.work.ask(call.units, share.engine)
        except RunFailed as error:
            failure = error
        share.samples -= len(call.units)
        self._changed.set()
        if failure is not None:
            await self._give_back(share, call, failure)
        else:
            finished = [(unit, answer) for unit, answer in answers if answer is not None]
            aborted = [unit for unit, answer in answers if answer is None]
            await call.work.record([unit for unit in call.units if unit not in aborted], finished)
            self._tell()
            if aborted:
                await self._ask_again(share, Call(call.work, aborted, call.refusals, call.first_failed))
            else:
                share.pauses = 0
        share.open_calls -= 1
        self._changed.set()

    async def _ask_again(self, share: Share, call: Call) -> None:
        """The engine ended these requests early."""
        if call.failed():
            raise RunFailed(f"{share.name} aborted an evaluation request for {PATIENCE_S:g} s")
        await asyncio.sleep(share.next_pause())
        share.queue.appendleft(call)

    async def _give_back(self, share: Share, call: Call, failure: RunFailed) -> None:
        """The engine did not answer: the others may, or itself when it is there again."""
        call.refusals += await share.engine.health()
        if call.refusals >= REFUSALS or call.failed():
            raise failure
        share.queue.appendleft(call)
        if not share.away:
            share.away = True
            self._beside(self._come_back(share))

    async def _come_back(self, share: Share) -> None:
        """Ask a lost engine again once it is healthy and, whoever looks after it says so, holds the version."""
        while True:
            await asyncio.sleep(share.next_pause())
            if await share.engine.health():
                break
        if self._members is not None:
            self._present = await self._members.holders(None)
        share.away = False
        self._changed.set()

    def _tell(self) -> None:
        if self._on_progress is not None and self._works:
            unfinished = (work for work in self._works if work.done < work.total)
            self._on_progress(next(unfinished, self._works[-1]))
