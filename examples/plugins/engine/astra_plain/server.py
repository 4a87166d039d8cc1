"""The engine's process: one thread has the model, others talk HTTP. Prompts of one length are decoded side by side."""

from __future__ import annotations

import json
import queue
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import numpy as np
import torch

from astra_plain import ENGINE
from astracli.errors import AstraError
from astracli.models import registry
from astracli.process.config import EngineConfig
from astracli.process.worker import Reporter, worker_main
from astracli.weights.format.digest import digest_tensor, to_hex
from astracli.weights.receive import apply, reading
from astracli.weights.receive.watcher import StageWatcher


@dataclass
class Request:
    place: int
    prompt: list[int]
    sampling: dict[str, Any]
    offset: int
    rid: str
    tell: Callable[[dict[str, Any]], None]
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    aborted: bool = False

    def noise(self, size: int) -> np.ndarray:
        """Gumbel noise for the next draw, of its seed and position alone; none where it is greedy. Each position has a
        word of the counter to itself: a draw counts up in the lowest one, and streams must not overlap."""
        if not self.sampling["temperature"]:
            return np.zeros(size)
        bits = np.random.Philox(key=self.sampling["sampling_seed"], counter=self.offset + len(self.tokens) << 64)
        return np.random.Generator(bits).gumbel(size=size)

    def take(self, token: int, logprob: float) -> bool:
        """One more token; True when the completion ends with it."""
        self.tokens.append(token)
        self.logprobs.append(logprob)
        return self.aborted or self.stopped or len(self.tokens) >= self.sampling["max_new_tokens"]

    @property
    def stopped(self) -> bool:
        return bool(self.tokens) and self.tokens[-1] in self.sampling["stop_token_ids"]

    def end(self, version: int) -> None:
        reason = "stop" if self.stopped else "abort" if self.aborted else "length"
        meta = {
            "id": self.rid,
            "finish_reason": {"type": reason},
            "output_token_logprobs": [[value] for value in self.logprobs],
            "weight_version": str(version),
        }
        self.tell({"index": self.place, "output_ids": self.tokens, "meta_info": meta})


class Policy:
    """The model, its weights as they travel, and the requests."""

    def __init__(self, config: EngineConfig):
        adapter = registry.resolve(config.recipe, config.model_path)
        self.model = adapter.load_for_serving(config.model_path, attention="sdpa").eval()
        if adapter.prepare_cpu is not None:
            adapter.prepare_cpu(self.model)
        parameters = dict(self.model.named_parameters())
        wire = adapter.wire_tensors(self.model)
        self.parameters = {tensor.name: parameters[name] for name, tensor in wire.items()}
        self.copies = {t.name: parameters[n].detach().to(getattr(torch, t.dtype), copy=True) for n, t in wire.items()}
        self.write()
        self.stage_dir = config.stage_dir
        self.watcher = StageWatcher(self.stage_dir, reading.hold)  # decodes what is staged, beside generation
        self.batch = ENGINE.own(config.recipe).batch
        self.have: int | None = 0
        self.version = 0
        self.serving = not config.await_weights
        self.paused = False
        self.waiting: list[Request] = []
        self.running: list[Request] = []
        self.jobs: queue.Queue[Callable[[], None]] = queue.Queue()

    # ---- from any thread

    def call(self, work: Callable[[], Any]) -> Any:
        """Run `work` between two batches; its result."""
        answer: Future[Any] = Future()

        def run() -> None:
            try:
                answer.set_result(work())
            except Exception as error:
                answer.set_exception(error)

        self.jobs.put(run)
        return answer.result()

    def submit(self, requests: list[Request]) -> None:
        self.jobs.put(lambda: self.waiting.extend(requests))

    def abort(self, rids: list[str] | None) -> None:
        for request in [*self.waiting, *self.running]:
            request.aborted |= rids is None or request.rid in rids
        self.jobs.put(lambda: None)

    # ---- the thread that has the model

    def loop(self, reporter: Reporter) -> None:
        while not reporter.stop_requested.is_set():
            busy = bool(self.waiting) and not self.paused
            try:
                while True:
                    self.jobs.get(timeout=0.0 if busy else 0.2)()
                    busy = True
            except queue.Empty:
                pass
            for request in [request for request in self.waiting if request.aborted]:
                self.waiting.remove(request)
                request.end(self.version)
            if self.waiting and not self.paused:
                length = len(self.waiting[0].prompt)
                self.running = [request for request in self.waiting if len(request.prompt) == length][: self.batch]
                self.waiting = [request for request in self.waiting if request not in self.running]
                self.decode(self.running)
                self.running = []
            reporter.waiting(None if self.waiting else "requests")

    @torch.inference_mode()
    def decode(self, requests: list[Request]) -> None:
        """To the end of the longest. The prompts are of one length, so that nothing is padded."""
        tokens_BT = torch.tensor([request.prompt for request in requests])
        heat_B1 = torch.tensor([[request.sampling["temperature"] or 1.0] for request in requests])
        cache, going = None, set(range(len(requests)))
        while going:
            out = self.model(input_ids=tokens_BT, past_key_values=cache, use_cache=True, logits_to_keep=1)
            cache, logprobs_BV = out.past_key_values, torch.log_softmax(out.logits[:, -1].float() / heat_B1, -1)
            noise_BV = np.stack([request.noise(logprobs_BV.shape[1]) for request in requests])
            tokens_BT = (logprobs_BV + torch.from_numpy(noise_BV)).argmax(-1, keepdim=True)
            drawn = logprobs_BV.gather(1, tokens_BT).squeeze(1).tolist()
            for row in sorted(going):
                if requests[row].take(int(tokens_BT[row]), drawn[row]):
                    going.remove(row)
                    requests[row].end(self.version)

    @torch.no_grad()
    def write(self) -> None:
        """The model computes with what travels, in fp32."""
        for name, parameter in self.parameters.items():
            parameter.copy_(self.copies[name])

    @torch.no_grad()
    def apply(self, version: int) -> dict[str, Any]:
        """Apply what is staged, every digest checked, then read the parameters back under HF names."""
        have, self.have, self.serving = self.have, None, False  # not to be trusted until proven
        (self.stage_dir / apply.READBACK).unlink(missing_ok=True)
        try:
            prepared = apply.current(self.stage_dir, self.watcher.take())
            result = apply.apply(self.stage_dir, self.copies, have, prepared)
        except (AstraError, OSError, ValueError) as error:
            return {"success": False, "message": str(error)}
        self.write()
        began, wrong = time.perf_counter(), []
        for entry in prepared.manifests[-1].tensors if prepared.manifests else ():
            parameter, held = self.parameters[entry.name], self.parameters[entry.name].to(self.copies[entry.name].dtype)
            if not torch.equal(held.to(parameter.dtype), parameter) or to_hex(digest_tensor(held)) != entry.digest:
                wrong.append(entry.name)
        message = f"read back, {len(wrong)} tensors differ: {', '.join(wrong[:5])}" if wrong else ""
        found = {"version": version, "ok": not wrong, "message": message}
        apply.write_readback(self.stage_dir, found | {"readback_s": time.perf_counter() - began})
        if wrong or result.version != version:
            return {"success": False, "message": message or f"version {result.version} is staged"}
        self.have, self.version, self.serving = version, version, True
        told = {"changed": result.changed, "apply_s": result.apply_s, "verify_s": result.verify_s, "readback": True}
        return {"success": True, "message": "", "outcome": told}


class Handler(BaseHTTPRequestHandler):
    policy: Policy
    token: str
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def do_GET(self) -> None:
        policy = self.policy
        info = {"weight_version": str(policy.version), "serving": policy.serving, "paused": policy.paused}
        self.answer(200, info)

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers.get("Content-Length") or 0)) or b"{}")
        if self.headers.get("Authorization") != f"Bearer {self.token}":
            return self.answer(401, {"error": {"message": "the run's token is missing or wrong"}})
        if self.path == "/generate":
            return self.generate(body)
        self.answer(*self.control(body))

    def control(self, body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        policy = self.policy
        if self.path == "/update_weights_from_tensor":
            told = policy.call(lambda: policy.apply(int(body["weight_version"])))
            return 200 if told["success"] else 400, told
        if self.path == "/abort_request":
            policy.abort(None if body.get("abort_all") else body["rid"])
        elif self.path in ("/pause_generation", "/continue_generation"):
            policy.call(lambda: setattr(policy, "paused", self.path == "/pause_generation"))
        else:
            return 404, {"error": {"message": f"no route {self.path}"}}
        return 200, {}

    def generate(self, body: dict[str, Any]) -> None:
        if not self.policy.serving:
            return self.answer(503, {"error": {"message": "not serving: waiting for weights"}})
        prompts = body["input_ids"]
        ended: queue.Queue[dict[str, Any]] = queue.Queue()
        offsets, rids = body.get("draw_offset") or [0] * len(prompts), body.get("rid") or [""] * len(prompts)
        rows = zip(prompts, body["sampling_params"], offsets, rids, strict=True)
        self.policy.submit([Request(place, *row, tell=ended.put) for place, row in enumerate(rows)])
        answers = (ended.get() for _ in prompts)
        if body.get("stream"):
            return self.stream(answers)
        self.answer(200, sorted(answers, key=lambda answer: answer["index"]))

    def stream(self, answers: Iterator[dict[str, Any]]) -> None:
        self.send_response(200)
        self.send_header("Connection", "close")
        self.end_headers()
        for answer in answers:
            self.wfile.write(f"data: {json.dumps(answer)}\n\n".encode())

    def answer(self, status: int, document: Any) -> None:
        content = json.dumps(document).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: Any) -> None:
        """A healthy engine writes nothing."""


def run(config: EngineConfig, reporter: Reporter) -> None:
    torch.set_num_threads(config.threads)
    policy = Policy(config)
    handler = type("OfThisRun", (Handler,), {"policy": policy, "token": config.token})
    server = ThreadingHTTPServer((config.recipe.launch.host, config.port), handler)
    threading.Thread(target=server.serve_forever, name="http", daemon=True).start()
    reporter.ready()
    policy.loop(reporter)


if __name__ == "__main__":
    worker_main(run, EngineConfig)
