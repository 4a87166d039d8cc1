"""SGLang's HTTP routes where they differ from ours: seeds, streams, updates whose outcome our loader writes down.

From 0.5.21 on SGLang wants an *update session* around a weight update: `/begin_weight_update` before and
`/end_weight_update` after it. Begin lets quantized layers unpack what they packed, end runs every layer's work after
loading again; unquantized layers do neither. Neither call flushes, labels or pauses, but both wait for all requests
unless the server is paused: they belong inside the pause. Earlier releases know neither route. (SGLang 0.5.21 and
0.5.23: `_WeightUpdateSession` in `srt/managers/scheduler_components/weight_updater.py`,
`_weight_update_session_call` in `srt/managers/tokenizer_control_mixin.py`; 0.5.20 has no such route.)

`output_ids` and `output_token_logprobs` hold every token that was drawn, stop tokens and the tokens of a stop string
included: `no_stop_trim` is about the answer's text. SGLang looks for a stop string in the text of the latest tokens, as
many as the string's own encoding has and one more: it goes on behind a string that was drawn in smaller pieces. And it
looks at the limit of tokens before anything else. Where a completion ends is therefore decided in `engines.client`.
(0.5.17: `Req.update_finish_state`, `tail_str` and `output_ids_through_stop` in `srt/managers/schedule_batch.py`.)
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import pickle
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from astracli.engines.client import CONTROL_S, EngineClient
from astracli.engines.contract import UNPROVEN, Ended, GenRequest, GenResult, UpdateReply
from astracli.errors import RunFailed
from astracli.process.http import Reply

STAGED_LOADER = "astracli.engines.loader.apply_staged"
"""`load_format` of an update that applies what is staged beside the engine."""
SETTLE_LOADER = "astracli.engines.loader.settle"
"""`load_format` of an update that changes nothing and waits for whatever still reads the weights."""
NO_TENSORS = [base64.b64encode(pickle.dumps([])).decode()]
"""An empty tensor list as SGLang wants it: one pickled list per tensor-parallel rank."""
BEGIN, END = "/begin_weight_update", "/end_weight_update"
CLOSE_S = 10.0
"""How long to wait for the server to end an update that broke off."""
_SEED_BITS = (1 << 63) - 1
_NAN = "NaN happened"
"""What SGLang says it matched, with the finish reason `stop`, when it drew a token that is none and put another in its
place. (`Req._check_vocab_boundary_finish`)"""


class SglangClient(EngineClient):
    """`stage_dir`: where our weight loader leaves `result.json`."""

    single_requests = True
    """SGLang's stream repeats all tokens with every piece, and one answer for several requests waits for the last."""

    def __init__(self, url: str, token: str, *, name: str = "engine", stage_dir: Path):
        super().__init__(url, token, name=name)
        self._stage_dir = stage_dir
        self._wants_session: bool | None = None
        """Whether the server knows update sessions; None: it has not been asked."""

    async def wait_ready(self, timeout: float) -> None:
        await super().wait_ready(timeout)
        await self._learn()  # now, so that no pause waits for it

    async def generate(self, requests: Sequence[GenRequest], ended: Ended | None = None) -> list[GenResult]:
        """With `ended` one call for each request."""
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

    def body(self, requests: Sequence[GenRequest]) -> dict[str, Any]:
        """SGLang counts draws by position itself and takes a seed of 63 bits."""
        body = super().body(requests)
        body.pop("draw_offset", None)
        for sampling in body["sampling_params"]:
            sampling["sampling_seed"] &= _SEED_BITS
            if "stop" in sampling:
                sampling["no_stop_trim"] = True  # tokens as they were drawn
        return body

    def _read(self, request: GenRequest, answer: Mapping[str, Any]) -> GenResult:
        meta = answer["meta_info"]
        if meta["finish_reason"].get("matched") == _NAN:
            version = meta["weight_version"]
            raise RunFailed(
                f"{self.name}: the model produces NaN at weight version {version}", "see grad_norm in the metrics"
            )
        return super()._read(request, answer)

    def _never_began(self, reply: Reply) -> bool:
        return reply.status_code == 400 and "was aborted" in reply.text

    async def apply_staged(self, version: int, *, flush: bool = True) -> UpdateReply:
        """SGLang answers success whatever our loader found; what it found stands in `result.json`. The weights bear the
        version's name only once that says so: a worker that dies in between leaves them unproven."""
        return await self.control(self._apply(version, flush))

    async def _apply(self, version: int, flush: bool) -> UpdateReply:
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
        update = await self.control(self._load({"load_format": SETTLE_LOADER, "flush_cache": False}))
        if not update.success:
            raise self._failure(f"does not settle: {update.message}")

    async def _learn(self) -> None:
        """Ask the server, which may be another than before, whether it knows update sessions; nothing is begun by that.

        A route that only takes POST answers a GET with 405, an unknown one with 404: unlike a version this also holds
        for a build from source, and unlike `/openapi.json` it cannot be switched off.
        """
        status = (await self._request("GET", BEGIN, None, timeout=CONTROL_S)).status_code
        self._wants_session = status == 405

    async def _load(self, body: Mapping[str, object]) -> UpdateReply:
        """Have our loader called, in an update session where the server wants one. Whatever goes wrong in between, the
        end is sent; an update whose end fails has failed."""
        if self._wants_session is None:
            await self._learn()
        path, body = "/update_weights_from_tensor", {"serialized_named_tensors": NO_TENSORS, **body}
        if not self._wants_session:
            return await self._update(path, body)
        begun = time.monotonic()
        opened = await self._update(BEGIN, {})
        if not opened.success:  # a client that died in its update has left it open: it is ended first
            await self._update(END, {})
            opened = await self._update(BEGIN, {})
        if not opened.success:
            return opened
        begin_s = time.monotonic() - begun
        try:
            update = await self._update(path, body)
        except BaseException:  # cancelled too
            with contextlib.suppress(RunFailed):  # the first error says more; what stays open, the next begin ends
                await self._update(END, {}, CLOSE_S)
            raise
        begun = time.monotonic()
        closed = await self._update(END, {})
        if update.success and not closed.success:
            return closed
        seconds = {"begin_s": begin_s, "end_s": time.monotonic() - begun}
        return UpdateReply(update.success, update.message, {**update.outcome, **seconds})
