"""SGLang's HTTP routes where they differ from ours: seeds, streams, updates whose outcome our loader writes down."""

from __future__ import annotations

import asyncio
import base64
import json
import pickle
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from astracli.engines.client import EngineClient
from astracli.engines.contract import UNPROVEN, Ended, GenRequest, GenResult, UpdateReply
from astracli.engines.sglang.update_session import UpdateSession

if TYPE_CHECKING:
    import httpx

STAGED_LOADER = "astracli.engines.sglang.loader.apply_staged"
"""`load_format` of an update that applies what is staged beside the engine."""
SETTLE_LOADER = "astracli.engines.sglang.loader.settle"
"""`load_format` of an update that changes nothing and waits for whatever still reads the weights."""
NO_TENSORS = [base64.b64encode(pickle.dumps([])).decode()]
"""An empty tensor list as SGLang wants it: one pickled list per tensor-parallel rank."""
_SEED_BITS = (1 << 63) - 1


class SglangClient(EngineClient):
    """`stage_dir`: where our weight loader leaves `result.json`."""

    def __init__(self, url: str, token: str, *, name: str = "engine", stage_dir: Path):
        super().__init__(url, token, name=name)
        self._stage_dir = stage_dir
        self._update_session = UpdateSession(self._status, self._update)

    async def wait_ready(self, timeout: float) -> None:
        await super().wait_ready(timeout)
        await self._update_session.learn()  # now, so that no pause waits for it

    async def generate(self, requests: Sequence[GenRequest], ended: Ended | None = None) -> list[GenResult]:
        """With `ended` one call for each request: SGLang's stream repeats all tokens with every piece."""
        if ended is None:
            return await super().generate(requests)

        async def one(place: int) -> GenResult:
            (result,) = await self._call_for([requests[place]])
            ended(place, result)
            return result

        tasks = [asyncio.create_task(one(place)) for place in range(len(requests))]
        try:
            return await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    def _body(self, requests: Sequence[GenRequest]) -> dict[str, Any]:
        """SGLang counts draws by position itself and takes a seed of 63 bits."""
        body = super()._body(requests)
        body.pop("draw_offset", None)
        for sampling in body["sampling_params"]:
            sampling["sampling_seed"] &= _SEED_BITS
        return body

    def _never_began(self, reply: httpx.Response) -> bool:
        return reply.status_code == 400 and "was aborted" in reply.text

    async def apply_staged(self, version: int, *, flush: bool = True) -> UpdateReply:
        """SGLang answers success whatever our loader found; what it found stands in `result.json`. The weights bear the
        version's name only once that says so: a worker that dies in between leaves them unproven."""
        result = self._stage_dir / "result.json"
        result.unlink(missing_ok=True)
        body = {"load_format": STAGED_LOADER, "weight_version": str(UNPROVEN), "flush_cache": flush}
        update = await self._load(body)
        if not update.success:
            return update
        try:
            found = json.loads(result.read_text())
        except (OSError, ValueError) as error:
            return UpdateReply(False, f"the weight loader left no result ({error})")
        if not found["ok"] or found["version"] != version:
            return UpdateReply(False, found["message"] or f"the loader applied version {found['version']}")
        await self.set_version(version)
        return UpdateReply(True, "", {**update.outcome, **found})

    async def set_version(self, version: int) -> None:
        """Change the label of the present weights; requests go on, which SGLang has to be told."""
        body = {"new_version": str(version), "abort_all_requests": False}
        await self._send("POST", "/update_weight_version", body)

    async def settle(self) -> None:
        """The server takes it for an update, so it wants begin and end around it as well. Unpaused, these would wait
        for all requests; whoever calls this is about to release memory, has drained the engine and paused it."""
        update = await self._load({"load_format": SETTLE_LOADER, "flush_cache": False})
        if not update.success:
            raise self._failure(f"does not settle: {update.message}")

    async def _load(self, body: Mapping[str, object]) -> UpdateReply:
        return await self._update_session.update(
            "/update_weights_from_tensor", {"serialized_named_tensors": NO_TENSORS, **body}
        )
