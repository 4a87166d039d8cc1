"""The engines of a run, as the hub knows them and an evaluation asks for them."""

from __future__ import annotations

import asyncio
from collections.abc import Collection
from dataclasses import dataclass

from astracli.hub.client import AsyncHubClient
from astracli.hub.types import Holders, SlotLimit

WAIT_S = 5.0
"""How long one question to the hub waits for another answer."""
STOP_PAUSE_S = 1.0


@dataclass(frozen=True)
class RunEngines:
    """`spread.Members` of a run."""

    hub: AsyncHubClient
    step: int
    version: int

    async def holders(self, known: Collection[str] | None) -> Collection[str]:
        while True:
            have = None if known is None else list(known)
            reply: Holders = await self.hub.eval_engines(self.version, have, wait_s=0.0 if known is None else WAIT_S)
            if reply.engines != have:
                return reply.engines
            if reply.stop:  # answered at once, for as long as this process has not ended
                await asyncio.sleep(STOP_PAUSE_S)

    async def slots(self, engine: str, wants: int, holds: int) -> int:
        reply: SlotLimit = await self.hub.slots(engine, "eval", wants, holds)
        return reply.limit

    async def release(self, engine: str) -> None:
        await self.slots(engine, 0, 0)
        await self.hub.eval_release(self.step, self.version, engine)
