"""The embedded engine behind its HTTP server: requests in SGLang's form, control, and weight updates.

Everything that touches the model runs in the decode thread (`loop`), from other threads through `scheduler.call`.
"""

from __future__ import annotations

import secrets
import uuid
from collections.abc import Callable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

from astracli.engines import asked as requests
from astracli.engines.contract import GenResult, UpdateReply
from astracli.engines.embedded import kernels
from astracli.engines.embedded.decoder import Decoder
from astracli.engines.embedded.scheduler import Scheduler
from astracli.engines.embedded.table import Request
from astracli.engines.embedded.weights import EngineWeights, Loader
from astracli.engines.stops import StopStrings
from astracli.kernels.cpu import linear
from astracli.kernels.cpu.memory import GiveBack
from astracli.models.adapter import load_tokenizer
from astracli.models.decoding import Decoding
from astracli.process.worker import Reporter
from astracli.weights.receive import reading
from astracli.weights.receive.watcher import StageWatcher

GIVE_BACK_EVERY = 1024
"""Decoding steps."""


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
        found = self._requests(body)
        for index, request in enumerate(found):
            request.deliver = lambda completion, index=index: ended(index, completion)  # type: ignore[misc]
        self.scheduler.submit(found)
        return [request.rid for request in found]

    def _requests(self, body: Mapping[str, Any]) -> list[Request]:
        asked = requests.read(body, vocabulary=self._vocab, context_length=self._context_length)
        return [self._request(one) for one in asked]

    def _request(self, asked: requests.Asked) -> Request:
        stops = set(asked.stop_token_ids) | (frozenset() if asked.ignore_eos else self._eos)
        return Request(
            rid=asked.rid or uuid.uuid4().hex,
            prompt=asked.prompt,
            max_new_tokens=asked.max_new_tokens,
            temperature=asked.temperature,
            top_p=asked.top_p,
            stop_token_ids=tuple(sorted(stops)),
            seed=secrets.randbits(63) if asked.seed is None else asked.seed,
            draw_offset=asked.draw_offset,
            stop=StopStrings(asked.stop, self._tokenizer) if asked.stop else None,
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


def _eos_ids(model: Any) -> frozenset[int]:
    """End-of-sequence ids of the checkpoint: they end a sequence like a stop token, as in SGLang."""
    ids: set[int] = set()
    for config in (model.config, getattr(model, "generation_config", None)):
        eos = getattr(config, "eos_token_id", None)
        if eos is not None:
            ids |= set(eos) if isinstance(eos, list | tuple) else {int(eos)}
    return frozenset(ids)
