"""One vLLM engine as our routes need it: requests in, finished requests with their versions out, pauses, updates.

Requests run as `FINAL_ONLY`: one output each, at its end, also when it is aborted. Which weights drew its first and
last token is decided by the engine's own timestamps of these tokens, against the times at which updates were applied
(both are `time.monotonic` of one host); so an answer that is read late bears no version that it has not seen.

A pause is always vLLM's `keep`, which holds requests and lets new ones queue: the `abort` of 0.33 refuses new ones.
What becomes of the running ones is done beside it: `abort` ends them first, `retract` has vLLM preempt them, so that
their keys and values are computed again with the new weights, `in_place` leaves them as they are.
(0.20.2 and 0.33.0: `pause_scheduler` in `v1/engine/core.py`, `reset_prefix_cache` in `v1/core/sched/scheduler.py`,
`make_request_output` in `v1/engine/output_processor.py`, `RequestStateStats` in `v1/metrics/stats.py`.)
"""

from __future__ import annotations

import time
from collections.abc import Callable, Coroutine
from typing import Any

from astracli.engines.asked import Asked
from astracli.errors import UserError

UNPROVEN = -1
_SEED_BITS = (1 << 63) - 1
_STRIDE = 0x9E3779B97F4A7C15
"""Odd: a continued completion draws with another seed than its beginning did."""


class VllmEngine:
    """`llm`: vLLM's AsyncLLM. `sampling`: makes its SamplingParams of keywords. `context_length`: prompt and completion
    together, tokens; `sleeps`: it can give its memory back.

    What would end vLLM's process is refused here (UserError): to draw or to update without memory, an id that the model
    does not have.
    """

    def __init__(
        self, llm: Any, sampling: Callable[..., Any], *, model: str, serving: bool, seeded: bool, cached: bool,
        vocabulary: int, context_length: int, sleeps: bool,
    ):  # fmt: skip
        self.llm, self.model, self.seeded, self.cached = llm, model, seeded, cached
        self.vocabulary, self.context_length, self.sleeps = vocabulary, context_length, sleeps
        self._sampling = sampling
        self.paused = self.asleep = False
        self.problem: str | None = None if serving else "waiting for its weights"
        self._versions: list[tuple[float, int]] = [(0.0, 0 if serving else UNPROVEN)]
        """(from when, version) of every version that was served."""
        self._running: set[str] = set()
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
            "running": len(self._running),
        }

    # ---- requests

    def generate(self, asked: Asked) -> Coroutine[Any, Any, dict[str, Any]]:
        """One request to its end; the answer of `/generate`. Raises ValueError, at once, for what vLLM refuses."""
        return self._generate(asked, self._parameters(asked))

    async def _generate(self, asked: Asked, parameters: Any) -> dict[str, Any]:
        self._count += 1
        rid = asked.rid or str(self._count)
        own = f"{rid}-{self._count}"  # vLLM wants each name once
        prompt: dict[str, Any] = {"prompt_token_ids": asked.prompt.tolist()}
        if self.cached:
            prompt["cache_salt"] = str(self.version)  # keys and values of other weights never serve this request
        began, asked_of = time.monotonic(), self.version
        self._running.add(own)
        final = None
        try:
            async for output in self.llm.generate(prompt, parameters, own):
                final = output
        finally:
            self._running.discard(own)
        return self._answer(final, rid, asked_of, time.monotonic() - began)

    def _parameters(self, asked: Asked) -> Any:
        seed = ((asked.seed or 0) + asked.draw_offset * _STRIDE) & _SEED_BITS
        return self._sampling(
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
            seed=seed if self.seeded else None,
        )

    def _answer(self, final: Any, rid: str, asked_of: int, seconds: float) -> dict[str, Any]:
        output = final.outputs[0] if final is not None and final.outputs else None
        tokens = [int(token) for token in output.token_ids] if output is not None else []
        entries = list(output.logprobs or [])[: len(tokens)] if output is not None and tokens else []
        logprobs = [float(entry[token].logprob) for entry, token in zip(entries, tokens, strict=True)]
        reason = (output.finish_reason if output is not None else None) or "abort"
        if reason not in ("stop", "length", "abort"):
            raise RuntimeError(f"vLLM ended request {rid} with `{reason}`")
        stats = getattr(final, "metrics", None)
        first, last = (getattr(stats, name, 0.0) or 0.0 for name in ("first_token_ts", "last_token_ts"))
        meta = {
            "id": rid,
            "finish_reason": {"type": reason},
            "output_token_logprobs": [[logprob, token, None] for logprob, token in zip(logprobs, tokens, strict=True)],
            "weight_version": str(self._version_at(last) if last else self.version),
            "weight_version_start": str(self._version_at(first) if first else asked_of),
            "e2e_latency": seconds,
        }
        return {"text": "", "output_ids": tokens, "meta_info": meta}

    def _version_at(self, moment: float) -> int:
        return next(version for start, version in reversed(self._versions) if start <= moment)

    async def abort_all(self) -> int:
        running = list(self._running)
        await self.llm.abort(running)
        return len(running)

    # ---- pauses and memory

    async def pause(self, mode: str) -> None:
        if mode == "abort":
            await self.abort_all()
        self.paused = True
        await self.llm.pause_generation(mode="keep", clear_cache=False)
        if mode == "abort":
            await self.abort_all()  # what came in between
        elif mode == "retract":
            await self.llm.reset_prefix_cache(reset_running_requests=True)

    async def resume(self) -> None:
        self._awake()
        await self.llm.resume_generation()
        self.paused = False

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
            self.problem = message
            return False, message, {}
        if flush and self.cached:
            await self.llm.reset_prefix_cache()
        self._versions.append((time.monotonic(), version))
        self.problem = None
        return True, "", dict(ranks[0])
