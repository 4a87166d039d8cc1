"""One vLLM engine as our routes need it: requests in, finished requests with their versions out, pauses, updates.

Requests run as `FINAL_ONLY`: one output each, at its end, also when it is aborted. Which weights drew its first and
last token is decided by the engine's own timestamps of these tokens, against the times at which updates were applied
(both are `time.monotonic` of one host); so an answer that is read late bears no version that it has not seen.

A pause is always vLLM's `keep`; what comes in a pause waits here until its end. What becomes of the running requests is
done beside it: `abort` ends them first, `retract` has vLLM preempt them, so that their keys and values are computed
again with the new weights, `in_place` leaves them as they are.

With a prefix cache every request carries a salt of the weights that it was handed to vLLM with, so that it finds only
what these computed. A request that has no token yet when its pause begins would be computed with other weights than its
salt names: it is taken back and handed over anew after the pause.
(0.20.2 and 0.33.0: `pause_scheduler` in `v1/engine/core.py`, `reset_prefix_cache` in `v1/core/sched/scheduler.py`,
`generate_block_hash_extra_keys` in `v1/core/kv_cache_utils.py`, `RequestState` in `v1/engine/output_processor.py`,
`RequestStateStats` in `v1/metrics/stats.py`.)
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import Any

from astracli.engines.asked import Asked
from astracli.engines.contract import UNPROVEN
from astracli.errors import UserError

WAITING = "waiting for its weights"
_SEED_BITS = (1 << 63) - 1
_STRIDE = 0x9E3779B97F4A7C15
"""Odd: a continued completion draws with another seed than its beginning did."""


@dataclass(frozen=True)
class Library:
    """What of vLLM a request needs."""

    sampling: Callable[..., Any]
    """Makes SamplingParams of keywords."""
    tokens: Callable[..., Any]
    """`tokens_input`: a prompt that vLLM need not render, so that it has the request before anything else happens."""
    refused: tuple[type[Exception], ...]
    """What it raises of a request that it cannot serve."""


class VllmEngine:
    """`llm`: vLLM's AsyncLLM. `cached`: it keeps a prefix cache. `context_length`: prompt and completion together,
    tokens; `sleeps`: it can give its memory back.

    What would end vLLM's process is refused here (UserError): to draw or to update without memory, an id that the model
    does not have.
    """

    def __init__(
        self, llm: Any, library: Library, *, model: str, serving: bool, seeded: bool, cached: bool, vocabulary: int,
        context_length: int, sleeps: bool,
    ):  # fmt: skip
        self.llm, self.model, self.seeded, self.cached = llm, model, seeded, cached
        self.vocabulary, self.context_length, self.sleeps = vocabulary, context_length, sleeps
        self._library = library
        self.paused = self.asleep = False
        self.problem: str | None = None if serving else WAITING
        self._versions: list[tuple[float, int]] = [(0.0, 0 if serving else UNPROVEN)]
        """(from when, version) of every version that was served."""
        self._running: set[str] = set()
        """Names of the requests that vLLM has."""
        self._held: dict[str, asyncio.Future[bool]] = {}
        """Those that came in a pause: True when it ends, False when they are aborted."""
        self._again: set[str] = set()
        """Those that were taken back from vLLM, to be handed over anew."""
        self._count = 0

    @property
    def version(self) -> int:
        return self._versions[-1][1]

    def info(self) -> dict[str, Any]:
        return {
            "model_path": self.model,
            "weight_version": str(self.version),
            "serving": self.problem is None,
            "problem": self.problem,
            "paused": self.paused,
            "running": len(self._running) + len(self._held),
        }

    # ---- requests

    def generate(self, asked: Asked) -> Coroutine[Any, Any, dict[str, Any]]:
        """One request to its end; the answer of `/generate`. Raises UserError, here or in its course, for what vLLM
        refuses."""
        try:
            return self._generate(asked, self._parameters(asked))
        except self._library.refused as refused:
            raise UserError(str(refused)) from None

    async def _generate(self, asked: Asked, parameters: Any) -> dict[str, Any]:
        self._count += 1
        rid = asked.rid or str(self._count)
        own, began = f"{rid}-{self._count}", time.monotonic()  # vLLM wants each name once
        while not self.paused or await self._after_pause(own):
            weights, final = len(self._versions) - 1, await self._run(own, asked, parameters)
            answer, first = self._answer(final, asked, rid, weights, time.monotonic() - began)
            taken_back = own in self._again and not answer["output_ids"]
            self._again.discard(own)
            if first == weights or not self.cached:  # else it may have found keys and values of those before
                if not taken_back:
                    return answer
            elif answer["meta_info"]["finish_reason"]["type"] == "abort":
                break
        return self._answer(None, asked, rid, len(self._versions) - 1, time.monotonic() - began)[0]

    async def _after_pause(self, own: str) -> bool:
        """Waits for the end of the pause; False when the request is aborted in it, or its weights are not served."""
        self._held[own] = asyncio.get_running_loop().create_future()
        try:
            return await self._held[own] and self.problem is None
        finally:
            del self._held[own]

    async def _run(self, own: str, asked: Asked, parameters: Any) -> Any:
        """What vLLM says at its end."""
        salt = str(len(self._versions)) if self.cached else None  # a version may be applied twice, to put weights right
        prompt = self._library.tokens(asked.prompt.tolist(), cache_salt=salt)
        self._running.add(own)
        final = None
        try:
            async for output in self.llm.generate(prompt, parameters, own):
                final = output
        except self._library.refused as refused:
            raise UserError(str(refused)) from None
        finally:
            self._running.discard(own)
        return final

    def _parameters(self, asked: Asked) -> Any:
        seed = ((asked.seed or 0) + asked.draw_offset * _STRIDE) & _SEED_BITS
        return self._library.sampling(
            temperature=asked.temperature,
            top_p=asked.top_p,
            max_tokens=asked.max_new_tokens,
            stop_token_ids=list(asked.stop_token_ids),
            ignore_eos=True,  # what ends a completion stands in the request alone
            stop=list(asked.stop),
            include_stop_str_in_output=bool(asked.stop),
            skip_special_tokens=False,
            detokenize=bool(asked.stop),
            logprobs=0,  # of the drawn token alone
            flat_logprobs=True,  # lists of numbers instead of two objects a token
            seed=seed if self.seeded else None,
        )

    def _answer(self, final: Any, asked: Asked, rid: str, weights: int, seconds: float) -> tuple[dict[str, Any], int]:
        """(the answer of a request that was handed over under the `weights`, those that drew its first token)"""
        output = final.outputs[0] if final is not None and final.outputs else None
        tokens = [int(token) for token in output.token_ids] if output is not None else []
        logprobs = _drawn(output.logprobs, tokens) if output is not None and tokens else []
        reason = (output.finish_reason if output is not None else None) or "abort"
        if reason not in ("stop", "length", "abort"):
            raise RuntimeError(f"vLLM ended request {rid} with `{reason}`")
        stats = getattr(final, "metrics", None)
        first, last = (getattr(stats, name, 0.0) or 0.0 for name in ("first_token_ts", "last_token_ts"))
        begun = self._weights_at(first) if first else weights
        ended = self._weights_at(last) if last else len(self._versions) - 1
        meta = {
            "id": rid,
            "finish_reason": {"type": reason},
            "output_token_logprobs": [[logprob, token, None] for logprob, token in zip(logprobs, tokens, strict=True)],
            "weight_version": str(self._versions[ended][1]),
            "weight_version_start": str(self._versions[begun][1]),
            "prompt_tokens": len(asked.prompt),
            "e2e_latency": seconds,
        }
        if self.cached and tokens:
            meta["cached_tokens"] = final.num_cached_tokens or 0
        return {"text": "", "output_ids": tokens, "meta_info": meta}, begun

    def _weights_at(self, moment: float) -> int:
        """Place among the versions that were served."""
        return next(place for place in reversed(range(len(self._versions))) if self._versions[place][0] <= moment)

    async def abort_all(self) -> int:
        running, held = list(self._running), [one for one in self._held.values() if not one.done()]
        self._again.clear()
        for one in held:
            one.set_result(False)
        await self.llm.abort(running)
        return len(running) + len(held)

    # ---- pauses and memory

    async def pause(self, mode: str) -> None:
        if mode == "abort":
            await self.abort_all()
        self.paused = True
        await self.llm.pause_generation(mode="keep", clear_cache=False)
        if mode == "abort":
            await self.abort_all()  # what came in between
            return
        if self.cached:
            await self._take_back()
        if mode == "retract":
            await self.llm.reset_prefix_cache(reset_running_requests=True)

    async def _take_back(self) -> None:
        """Requests without a token, from vLLM's queue or the middle of their prefill."""
        states = self.llm.output_processor.request_states.values()
        begun = {state.external_req_id for state in states if not state.is_prefilling}
        waiting = [own for own in self._running if own not in begun]
        self._again.update(waiting)
        await self.llm.abort(waiting)

    async def resume(self) -> None:
        self._awake()
        await self.llm.resume_generation()
        self.paused = False
        for one in self._held.values():
            if not one.done():
                one.set_result(True)

    def _awake(self) -> None:
        if self.asleep:
            raise UserError("the engine has given its memory back: /resume_memory_occupation comes first")

    async def sleep(self) -> None:
        if not self.sleeps:
            raise UserError("the engine cannot give its memory back: it was started without `enable_sleep_mode`")
        if self.asleep:
            return
        self.asleep = True
        await self.llm.collective_rpc("astra_settle")
        await self.llm.sleep(level=1)

    async def wake(self) -> None:
        if not self.asleep:
            return
        await self.llm.wake_up()
        self.asleep = False
        if self.paused:  # waking goes on with scheduling
            await self.llm.pause_generation(mode="keep", clear_cache=False)

    # ---- weights

    async def apply_staged(self, version: int, *, flush: bool) -> tuple[bool, str, dict[str, Any]]:
        """(success, message, outcome). What failed is not served: only a version that was proven is."""
        self._awake()
        self.problem = f"version {version} is being applied"
        ranks = await self.llm.collective_rpc("astra_apply")
        wrong = next((found for found in ranks if not found["ok"] or found["version"] != version), None)
        if wrong is not None:
            message = wrong["message"] or f"the loader applied version {wrong['version']}"
            self.problem = message if self.version != UNPROVEN else WAITING
            return False, message, {}
        if flush and self.cached:
            await (
                self.llm.reset_prefix_cache()
            )  # room for the new ones; that none of the old is found, the salt sees to
        self._versions.append((time.monotonic(), version))
        self.problem = None
        return True, "", dict(ranks[0])


def _drawn(logprobs: Any, tokens: list[int]) -> list[float]:
    """Of each token. vLLM puts that of the drawn one first, and it was asked for no other."""
    starts = logprobs.start_indices[: len(tokens)]
    if [logprobs.token_ids[start] for start in starts] != tokens:
        raise RuntimeError("vLLM's log-probabilities are of other tokens than it drew")
    return [float(logprobs.logprobs[start]) for start in starts]
