"""The one client for every engine: async HTTP in SGLang's form, for the embedded engine and for SGLang itself."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import pickle
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from astracli.engines.sglang.update_session import UpdateReply, UpdateSession
from astracli.errors import RunFailed

if TYPE_CHECKING:
    import httpx

STAGED_LOADER = "astracli.engines.sglang.loader.apply_staged"
"""`load_format` of an update that applies what is staged beside the engine."""
SETTLE_LOADER = "astracli.engines.sglang.loader.settle"
"""`load_format` of an update that changes nothing and waits for whatever still reads the weights."""
UNPROVEN = -1
"""SGLang's label of weights that nobody has checked yet; the embedded engine says `serving: false` instead."""
NO_TENSORS = [base64.b64encode(pickle.dumps([])).decode()]
"""An empty tensor list as SGLang wants it: one pickled list per tensor-parallel rank."""
_RETRY_S = 0.1
_SEED_BITS = (1 << 63) - 1


@dataclass(frozen=True)
class GenRequest:
    """One completion to generate."""

    input_ids: Sequence[int]
    """The prompt, and the tokens generated before when a completion is continued."""
    max_new_tokens: int
    temperature: float = 1.0
    """0 = greedy"""
    top_p: float = 1.0
    stop_token_ids: Sequence[int] = ()
    seed: int = 0
    """64-bit; the draw at completion position t depends on (seed, t) alone."""
    draw_offset: int = 0
    """Tokens of this completion that are already in `input_ids`."""
    rid: str | None = None


@dataclass(frozen=True)
class GenResult:
    """What one request produced."""

    tokens: np.ndarray
    """int32 [t], the stop token included"""
    logprobs: np.ndarray
    """float32 [t], untempered"""
    finish_reason: Literal["stop", "length", "abort"]
    version: int
    """Weights in force at the end."""
    version_start: int
    """Weights in force at the first token; differs only for a request kept through an update."""
    rid: str


Ended = Callable[[int, GenResult], None]
"""Called with a request's place in its call and its result."""


def flushes(pause_mode: str) -> bool:
    """Whether an update of this mode may ask for an empty cache. SGLang can only empty it with no request anywhere, and
    ends when it is asked and cannot; requests that were retracted wait, and those paused in place hold theirs. In these
    modes no cache outlives an update either: the engine then runs without a prefix cache."""
    return pause_mode == "abort"


class EngineClient:
    """Talks to one engine. Every error it cannot mend is a RunFailed that names the engine and its URL."""

    def __init__(
        self,
        url: str,
        token: str,
        *,
        name: str = "engine",
        loader_dir: Path | None = None,
        not_serving_s: float = 120.0,
        control_s: float = 600.0,
    ):
        """`loader_dir`: for SGLang, the stage directory in which our weight loader leaves `result.json`."""
        import httpx

        self.url = url.rstrip("/")
        self.name = name
        self.not_serving_s = not_serving_s
        """A 503 of `/generate` is retried this long."""
        self._control_s = control_s
        self._loader_dir = loader_dir
        self._update_session = UpdateSession(self._status, self._update)
        self._http: httpx.AsyncClient = httpx.AsyncClient(
            base_url=self.url,
            headers={"Authorization": f"Bearer {token}"},
            timeout=None,
            trust_env=False,
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=64),
        )

    async def __aenter__(self) -> EngineClient:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        await self._http.aclose()

    # -- readiness

    async def health(self) -> bool:
        """Whether the engine is up with its model loaded. A refused connection is False, a wrong token raises."""
        import httpx

        try:
            reply = await self._http.get("/health_generate", timeout=30.0)
        except httpx.TransportError:
            return False
        if reply.status_code == 401:
            raise self._failure("refused the run's token")
        return reply.status_code == 200

    async def wait_ready(self, timeout: float) -> None:
        """Wait until `health` is True. Raises RunFailed after `timeout` seconds."""
        deadline = time.monotonic() + timeout
        while not await self.health():
            if time.monotonic() > deadline:
                raise self._failure(f"was not ready within {timeout:g} s", "read its log in the run directory")
            await asyncio.sleep(_RETRY_S)
        if self._loader_dir is not None:
            await self._update_session.learn()  # now, so that no pause waits for it

    async def model_info(self) -> dict[str, Any]:
        """model_path, weight_version (a string); the embedded engine adds serving, problem, running, ..."""
        return await self._send("GET", "/model_info")

    # -- generation

    async def generate(self, requests: Sequence[GenRequest], ended: Ended | None = None) -> list[GenResult]:
        """Generate all; results in the order of the requests. Waits for as long as it takes.

        With `ended`, which is called with each result when its request ends, the embedded engine gets one call that it
        answers piece by piece, and SGLang one call for each request: its stream repeats all tokens with every piece.
        Without, all requests are one call.

        Raises RunFailed when the engine dies, refuses a request, or does not serve for `not_serving_s`. What else was
        asked for with it is then abandoned.
        """
        if not requests:
            return []
        if ended is None:
            return await self._call_for(requests)
        if self._loader_dir is None:
            return await self._stream(requests, ended)

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

    async def _call_for(self, requests: Sequence[GenRequest]) -> list[GenResult]:
        """Every result in one answer."""
        body = _generate_body(requests, foreign=self._loader_dir is not None)
        deadline = time.monotonic() + self.not_serving_s
        while True:
            reply = await self._request("POST", "/generate", body, timeout=None)
            if reply.status_code != 503 or time.monotonic() > deadline:
                break
            await asyncio.sleep(_RETRY_S)
        if reply.status_code == 400 and "was aborted" in reply.text:
            # SGLang refuses a call that an abort met before it was under way: nothing of it was generated
            return [_nothing(request) for request in requests]
        answers = self._content(reply, "/generate")
        if not isinstance(answers, list) or len(answers) != len(requests):
            raise self._failure(f"answered /generate with something else than {len(requests)} results")
        return [_result(answer) for answer in answers]

    async def _stream(self, requests: Sequence[GenRequest], ended: Ended) -> list[GenResult]:
        """One call whose results come as their requests end."""
        import httpx

        body = _generate_body(requests) | {"stream": True}
        deadline = time.monotonic() + self.not_serving_s
        results: dict[int, GenResult] = {}
        while True:
            try:
                async with self._http.stream("POST", "/generate", json=body, timeout=None) as reply:
                    if reply.status_code == 200:
                        async for line in reply.aiter_lines():
                            if line.startswith("data: {"):
                                answer = json.loads(line[len("data: ") :])
                                results[answer["index"]] = result = _result(answer)
                                ended(answer["index"], result)
                        break
                    await reply.aread()
            except httpx.TransportError as error:
                raise self._gone(error, "/generate") from None
            if reply.status_code != 503 or time.monotonic() > deadline:
                self._content(reply, "/generate")
            await asyncio.sleep(_RETRY_S)
        if len(results) != len(requests):
            raise self._failure(f"answered /generate with {len(results)} of {len(requests)} results")
        return [results[place] for place in range(len(requests))]

    async def abort(self, rids: Collection[str]) -> None:
        """End these requests; each returns what it has, with finish reason `abort`."""
        await self._send("POST", "/abort_request", {"rid": list(rids)})

    async def abort_all(self) -> None:
        """End every request; each returns what it has, with finish reason `abort`."""
        await self._send("POST", "/abort_request", {"abort_all": True})

    # -- weights

    async def pause(self, mode: Literal["abort", "retract", "in_place"] = "abort") -> None:
        await self._send("POST", "/pause_generation", {"mode": mode})

    async def resume(self) -> None:
        await self._send("POST", "/continue_generation", {})

    async def release_memory(self, tags: Sequence[str] = ("kv_cache",)) -> None:
        """Give GPU memory back until `resume_memory`: SGLang's `kv_cache` (with the recurrent states), `weights` (their
        bytes are lost unless the server keeps a copy), `cuda_graph`. The server must be idle: end its requests first.
        Needs a server that was started with --enable-memory-saver."""
        await self._send("POST", "/release_memory_occupation", {"tags": list(tags)})

    async def resume_memory(self, tags: Sequence[str] = ("kv_cache",)) -> None:
        """Take the memory back; the same tags. The KV cache is empty then."""
        await self._send("POST", "/resume_memory_occupation", {"tags": list(tags)})

    async def flush(self) -> None:
        await self._send("POST", "/flush_cache", {})

    async def apply_staged(self, version: int, *, flush: bool = True) -> UpdateReply:
        """Apply what is staged for this engine. A failed update is an answer, not an exception: stage a full payload
        and apply again."""
        body = {
            "serialized_named_tensors": NO_TENSORS,
            "load_format": STAGED_LOADER,
            "weight_version": str(version if self._loader_dir is None else UNPROVEN),
            "flush_cache": flush,
        }
        if self._loader_dir is None:
            return await self._update("/update_weights_from_tensor", body)
        return await self._apply_by_loader(self._loader_dir / "result.json", version, body)

    async def _apply_by_loader(self, result: Path, version: int, body: Mapping[str, Any]) -> UpdateReply:
        """SGLang answers success whatever our loader found; what it found stands in `result`. The weights bear the
        version's name only once that says so: a worker that dies in between leaves them unproven."""
        result.unlink(missing_ok=True)
        update = await self._update_session.update("/update_weights_from_tensor", body)
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

    async def settle(self) -> None:
        """Return once nothing reads the weights beside generation any more: a read-back that nobody waits for may
        still be at it, whoever asked for it. Only our loader in a foreign engine reads so. To be called in a pause."""
        if self._loader_dir is not None:
            # The server takes it for an update, so it wants begin and end around it as well. Unpaused, these would wait
            # for all requests; whoever calls this is about to release memory, has drained the engine and paused it.
            body = {"serialized_named_tensors": NO_TENSORS, "load_format": SETTLE_LOADER, "flush_cache": False}
            update = await self._update_session.update("/update_weights_from_tensor", body)
            if not update.success:
                raise self._failure(f"does not settle: {update.message}")

    async def load_directory(self, path: str, version: int) -> UpdateReply:
        """Load a whole Hugging Face checkpoint directory that the engine can read."""
        return await self._update("/update_weights_from_disk", {"model_path": path, "weight_version": str(version)})

    async def set_version(self, version: int) -> None:
        """Change the label of the present weights; requests go on. (SGLang ends them all unless it is told not to.)"""
        body = {"new_version": str(version), "abort_all_requests": False}
        await self._send("POST", "/update_weight_version", body)

    async def _update(self, path: str, body: Mapping[str, Any], limit_s: float | None = None) -> UpdateReply:
        reply = await self._request("POST", path, body, timeout=self._control_s if limit_s is None else limit_s)
        if reply.status_code == 400:
            document = _json(reply)
            if isinstance(document, dict) and "success" in document:
                return UpdateReply(False, str(document.get("message", "")))
        document = self._content(reply, path)
        return UpdateReply(bool(document["success"]), str(document.get("message", "")), document.get("outcome") or {})

    # -- transport

    async def _send(self, method: str, path: str, body: Mapping[str, Any] | None = None) -> Any:
        return self._content(await self._request(method, path, body, timeout=self._control_s), path)

    async def _status(self, path: str) -> int:
        return (await self._request("GET", path, None, timeout=self._control_s)).status_code

    async def _request(
        self, method: str, path: str, body: Mapping[str, Any] | None, *, timeout: float | None
    ) -> httpx.Response:
        import httpx

        try:
            return await self._http.request(method, path, json=body, timeout=timeout)
        except httpx.TimeoutException:
            raise self._failure(f"did not answer {path} within {timeout:g} s") from None
        except httpx.TransportError as error:
            raise self._gone(error, path) from None

    def _content(self, reply: httpx.Response, path: str) -> Any:
        document = _json(reply)
        if reply.status_code == 200:
            return document
        problem = document.get("error") if isinstance(document, dict) else None
        message = problem.get("message") if isinstance(problem, dict) else None
        detail = message or (document.get("message") if isinstance(document, dict) else None) or reply.text[:300]
        raise self._failure(f"answered {path} with {reply.status_code}: {detail}")

    def _gone(self, error: Exception, path: str) -> RunFailed:
        return self._failure(f"is gone: {error or type(error).__name__} ({path})", "read its log")

    def _failure(self, what: str, hint: str | None = None) -> RunFailed:
        return RunFailed(f"{self.name} at {self.url} {what}", hint)


def _json(reply: httpx.Response) -> Any:
    """The body as JSON; a 200 that is empty, text or `null` (SGLang's control routes) becomes {"message": text}."""
    document = None
    with contextlib.suppress(ValueError):
        document = reply.json()
    return {"message": reply.text[:300]} if document is None and reply.status_code == 200 else document


def _generate_body(requests: Sequence[GenRequest], *, foreign: bool = False) -> dict[str, Any]:
    """`foreign`: SGLang, which counts draws by position itself and takes a seed of 63 bits."""
    body: dict[str, Any] = {
        "input_ids": [[int(token) for token in request.input_ids] for request in requests],
        "sampling_params": [
            {
                "temperature": request.temperature,
                "top_p": request.top_p,
                "max_new_tokens": request.max_new_tokens,
                "stop_token_ids": [int(token) for token in request.stop_token_ids],
                "sampling_seed": request.seed & _SEED_BITS if foreign else request.seed,
            }
            for request in requests
        ],
        "return_logprob": True,
    }
    if not foreign and any(request.draw_offset for request in requests):
        body["draw_offset"] = [request.draw_offset for request in requests]
    if all(request.rid is not None for request in requests):
        body["rid"] = [request.rid for request in requests]
    return body


def _nothing(request: GenRequest) -> GenResult:
    """A request that was ended before its first token."""
    version = np.iinfo(np.int64).max  # no token bears it
    return GenResult(np.zeros(0, np.int32), np.zeros(0, np.float32), "abort", version, version, request.rid or "")


def _result(answer: Mapping[str, Any]) -> GenResult:
    meta = answer["meta_info"]
    version = int(meta["weight_version"])
    return GenResult(
        tokens=np.array(answer.get("output_ids") or [], np.int32),
        logprobs=np.array([entry[0] for entry in meta.get("output_token_logprobs") or []], np.float32),
        finish_reason=meta["finish_reason"]["type"],
        version=version,
        version_start=int(meta.get("weight_version_start", version)),
        rid=meta["id"],
    )
