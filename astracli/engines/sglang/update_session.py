"""What SGLang from 0.5.21 on wants around a weight update: `/begin_weight_update`, and `/end_weight_update` after it.

Begin lets quantized layers unpack what they packed, end runs every layer's work after loading again; unquantized layers
do neither. Neither call flushes, labels or pauses, but both wait for all requests unless the server is paused: they
belong inside the pause. Earlier releases know neither route. (SGLang 0.5.21 and 0.5.23: `_WeightUpdateSession` in
`srt/managers/scheduler_components/weight_updater.py`, `_weight_update_session_call` in
`srt/managers/tokenizer_control_mixin.py`; 0.5.20 has no such route.)
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass

from astracli.engines.contract import UpdateReply
from astracli.errors import RunFailed

BEGIN, END = "/begin_weight_update", "/end_weight_update"
CLOSE_S = 10.0
"""How long a server whose update broke off is waited for to end it."""


@dataclass
class UpdateSession:
    """Sends an update to a server that may want it between begin and end."""

    _status: Callable[[str], Awaitable[int]]
    """The status of a GET."""
    _post: Callable[[str, Mapping[str, object], float | None], Awaitable[UpdateReply]]
    """(path, body, limit in seconds or None for the usual) -> the answer"""
    _wanted: bool | None = None
    """Whether the server knows the routes; None: it has not been asked."""

    async def learn(self) -> None:
        """Ask the server, which may be another than before, whether it knows the routes; nothing is begun by that.

        A route that only takes POST answers a GET with 405, an unknown one with 404: unlike a version this also holds
        for a build from source, and unlike `/openapi.json` it cannot be switched off.
        """
        self._wanted = await self._status(BEGIN) == 405

    async def update(self, path: str, body: Mapping[str, object]) -> UpdateReply:
        """The answer to `path`, begun and ended where the server wants that. Whatever goes wrong in between, the end is
        sent; an update whose end fails has failed. Raises what `post` raises."""
        if self._wanted is None:
            await self.learn()
        if not self._wanted:
            return await self._post(path, body, None)
        begun = time.monotonic()
        opened = await self._begin()
        if not opened.success:
            return opened
        begin_s = time.monotonic() - begun
        try:
            update = await self._post(path, body, None)
        except BaseException:  # cancelled too
            with contextlib.suppress(RunFailed):  # the first error says more; what stays open, the next begin ends
                await self._post(END, {}, CLOSE_S)
            raise
        begun = time.monotonic()
        closed = await self._post(END, {}, None)
        if update.success and not closed.success:
            return closed
        return UpdateReply(
            update.success,
            update.message,
            {**update.outcome, "begin_s": begin_s, "end_s": time.monotonic() - begun},
        )

    async def _begin(self) -> UpdateReply:
        """A client that died in its update left it open, and the server then refuses to begin: it is ended first."""
        opened = await self._post(BEGIN, {}, None)
        if opened.success:
            return opened
        await self._post(END, {}, None)
        return await self._post(BEGIN, {}, None)
