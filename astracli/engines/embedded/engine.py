"""The embedded engine behind its HTTP server: requests in SGLang's form, control, and weight updates.

Everything that touches the model runs in the decode thread (`loop`), from other threads through `scheduler.call`.
"""

from __future__ import annotations

import math
import secrets
import uuid
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from astracli.engines.contract import GenResult, UpdateReply
from astracli.engines.embedded import kernels
from astracli.engines.embedded.decoder import Decoder
from astracli.engines.embedded.scheduler import Scheduler
from astracli.engines.embedded.table import Request
from astracli.engines.embedded.weights import EngineWeights, Loader
from astracli.engines.stops import StopStrings
from astracli.errors import UserError
from astracli.kernels.cpu import linear
from astracli.kernels.cpu.memory import GiveBack
from astracli.models.adapter import load_tokenizer
from astracli.models.decoding import Decoding
from astracli.process.worker import Reporter
from astracli.weights.receive import reading
from astracli.weights.receive.watcher import StageWatcher

GIVE_BACK_EVERY = 1024
"""Decoding steps."""
LONGEST_ID = 256
"""Characters of a request id."""
_SAMPLING_KEYS = frozenset(
    {
        "temperature", "top_p", "max_new_tokens", "stop_token_ids", "stop", "sampling_seed", "ignore_eos",
        "skip_special_tokens",
    }
)  # fmt: skip


class NotServing(Exception):
    """The engine holds no checked weights right now; the message says why."""


class EmbeddedEngine:
    """One model, its slots (sequences decoded at once) and its weights.

    `load` reads a checkpoint directory through the model's adapter. `context_length`: prompt and completion together,
    tokens; `prefill_tokens`: of one prefill. `decoding`: the adapter's; deterministic runs keep the bytes that they had
    without it.
    """

    def __init__(
        self,
        path: Path,
        load: Loader,
        *,
        slots: int,
        context_length: int,
        prefill_tokens: int = 8192,
        stage_dir: Path | None = None,
        device: str = "cpu",
        exclusive_calls: bool = False,
        problem: str | None = None,
        verify_interval: int = 0,
        decoding: Callable[[Any], Decoding | None] | None = None,
    ):
        model, wire = load(path)
        if device == "cpu":
            kernels.install(model, convolution=not exclusive_calls)  # deterministic runs keep the bytes that they had
            linear.install(model, measured=not exclusive_calls)
        self.path = path
        self._context_length = context_length
        self._stage = StageWatcher(stage_dir, reading.hold) if stage_dir is not None else None
        self.weights = EngineWeights(model.to(device), wire, problem=problem, verify_interval=verify_interval)
        own = decoding(model) if decoding is not None and device == "cpu" and not exclusive_calls else None
        decoder = Decoder(model, slots, prefill_tokens=prefill_tokens, decoding=own)
        self.scheduler = Scheduler(decoder, exclusive_calls=exclusive_calls)
        self._eos = _eos_ids(model)
        self._vocab = int(model.get_input_embeddings().weight.shape[0])
        self._calls = 0
        self.freed_memory = GiveBack(GIVE_BACK_EVERY) if device == "cpu" else None

    # -- requests

    def generate(self, body: Mapping[str, Any], ended: Callable[[int, GenResult], None]) -> list[str]:
        """Start what a `/generate` body asks for. `ended(place in the body, completion)` is called once for each
        request, in the decode thread.

        Returns the request ids. Raises UserError for a body it cannot run, NotServing without checked weights.
        """
        if self.weights.problem is not None:
            raise NotServing(self.weights.problem)
        self._calls += 1
        requests = self._requests(body)
        for index, request in enumerate(requests):
            request.deliver = lambda completion, index=index: ended(index, completion)  # type: ignore[misc]
        self.scheduler.submit(requests)
        return [request.rid for request in requests]

    def _requests(self, body: Mapping[str, Any]) -> list[Request]:
        ids = body.get("input_ids")
        if not isinstance(ids, list) or not ids:
            raise UserError("input_ids must be a list of token ids, or a list of such lists")
        prompts = ids if isinstance(ids[0], list) else [ids]
        count = len(prompts)
        params = _spread(body.get("sampling_params") or {}, count, "sampling_params")
        rids = _spread(body.get("rid"), count, "rid")
        offsets = _spread(body.get("draw_offset", 0), count, "draw_offset")
        try:
            return [
                self._request(prompt, param, rid, offset)
                for prompt, param, rid, offset in zip(prompts, params, rids, offsets, strict=True)
            ]
        except (TypeError, ValueError, OverflowError) as error:
            if isinstance(error, UserError):
                raise
            raise UserError(f"malformed request: {error}") from None

    def _request(self, ids: list[int], params: Mapping[str, Any], rid: str | None, offset: int) -> Request:
        if not isinstance(params, dict):
            raise UserError("sampling_params must be an object, or a list of objects")
        if unknown := sorted(params.keys() - _SAMPLING_KEYS):
            raise UserError(f"sampling parameters {', '.join(unknown)} are not known to the embedded engine")
        prompt = np.array(ids, np.int64)
        if prompt.ndim != 1 or not len(prompt) or prompt.min() < 0 or prompt.max() >= self._vocab:
            raise UserError(f"a prompt must be a non-empty list of token ids in [0, {self._vocab})")
        room = self._context_length - len(prompt)
        if room < 1:
            raise UserError(
                f"the prompt has {len(prompt)} tokens, the engine's context is {self._context_length}",
                "raise rollout.context_length or lower data.max_prompt_tokens",
            )
        temperature, top_p = float(params.get("temperature", 1.0)), float(params.get("top_p", 1.0))
        budget = _whole(params.get("max_new_tokens", room), "max_new_tokens", 1)
        if not (math.isfinite(temperature) and temperature >= 0 and 0 < top_p <= 1):
            raise UserError(f"temperature {temperature} must be >= 0, top_p {top_p} in (0, 1]")
        if rid is not None and not (isinstance(rid, str) and rid.isascii() and 0 < len(rid) <= LONGEST_ID):
            raise UserError(f"a request id is a string of at most {LONGEST_ID} ASCII characters")
        stops = {_whole(token, "stop_token_ids", 0) for token in params.get("stop_token_ids") or ()}
        if not params.get("ignore_eos"):
            stops |= self._eos
        texts = params.get("stop") or ()
        seed = params.get("sampling_seed")
        return Request(
            rid=rid or uuid.uuid4().hex,
            prompt=prompt,
            max_new_tokens=min(budget, room),
            temperature=temperature,
            top_p=top_p,
            stop_token_ids=tuple(sorted(stops)),
            seed=secrets.randbits(63) if seed is None else _whole(seed, "sampling_seed", -(2**63), 2**64),
            draw_offset=_whole(offset or 0, "draw_offset", 0),
            stop=StopStrings(tuple(map(str, texts)), self._tokenizer) if texts else None,
            call=self._calls,
        )

    @cached_property
    def _tokenizer(self) -> Any:
        """Read when the first request with stop strings comes."""
        return load_tokenizer(self.path)

    def apply_staged(self, version: int, *, flush: bool = True) -> UpdateReply:
        """In the decode thread."""
        if self._stage is None:
            return UpdateReply(False, "this engine was started without a staging directory")
        reply = self.weights.apply_staged(self._stage.stage_dir, version, self._stage.take())
        if not reply.success:
            self.scheduler.abort()
            return reply
        self.scheduler.version = self.weights.version
        if flush:
            self.scheduler.flush()
        return reply

    def info(self) -> dict[str, Any]:
        """What `/model_info` answers."""
        scheduler = self.scheduler
        return {
            "model_path": str(self.path),
            "weight_version": str(self.weights.version),
            "serving": self.weights.problem is None,
            "problem": self.weights.problem,
            "paused": scheduler.paused,
            "running": scheduler.table.active,
            "waiting": len(scheduler.waiting),
            "tokens_generated": scheduler.tokens_generated,
            "seconds": dict(scheduler.seconds),
        }

    # -- the decode thread

    def loop(self, reporter: Reporter) -> None:
        """Decode until `reporter.stop_requested`. Raises RunFailed when the model produces NaN."""
        reason: str | None = ""
        try:
            while not reporter.stop_requested.is_set():
                stepped = self.scheduler.run_once(wait_s=0.2)
                if stepped and self.freed_memory is not None:
                    self.freed_memory.passed()
                now = None if stepped else self._idle_reason()
                if now != reason:
                    reason = now
                    reporter.waiting(reason)
                if not stepped or self.scheduler.steps % 64 == 0:
                    reporter.progress(
                        running=self.scheduler.table.active,
                        version=self.weights.version,
                        tokens_generated=self.scheduler.tokens_generated,
                    )
        finally:
            self.weights.readback.settle()
            if self._stage is not None:
                self._stage.close()

    def _idle_reason(self) -> str:
        if self.weights.problem is not None:
            return f"weights: {self.weights.problem}"
        if self.scheduler.paused is not None:
            return f"continue_generation (paused, mode {self.scheduler.paused})"
        return "requests"


def _whole(value: Any, name: str, least: int, below: int = 2**31) -> int:
    """A whole number of a request. What the decode thread cannot hold would end it, and with it every request."""
    number = int(value)
    if not least <= number < below:
        raise UserError(f"{name} {str(value)[:20]} must be a whole number from {least} to under {below}")
    return number


def _spread(value: Any, count: int, name: str) -> Sequence[Any]:
    """One value for all prompts, or a list with one for each."""
    if not isinstance(value, list):
        return [value] * count
    if len(value) != count:
        raise UserError(f"{name} has {len(value)} entries for {count} prompts")
    return value


def _eos_ids(model: Any) -> frozenset[int]:
    """End-of-sequence ids of the checkpoint: they end a sequence like a stop token, as in SGLang."""
    ids: set[int] = set()
    for config in (model.config, getattr(model, "generation_config", None)):
        eos = getattr(config, "eos_token_id", None)
        if eos is not None:
            ids |= set(eos) if isinstance(eos, list | tuple) else {int(eos)}
    return frozenset(ids)
