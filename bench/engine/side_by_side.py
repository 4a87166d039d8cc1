"""Engines side by side: one engine's start, speed, updates, agreement and memory, by the same requests for each.

    python bench/engine/side_by_side.py --model DIR --engine vllm --engine-python PYTHON [--limit-s 540] --json
    python bench/engine/side_by_side.py --model DIR --engine sglang --engine-path PATH --json
    python bench/engine/side_by_side.py --engine embedded --device cpu --requests 1 4 --versions 4      a try on a CPU

DIR: a checkpoint, or `python bench/random_checkpoint.py DIR`. A trainer on the same GPU holds fp32 masters of it and
publishes them as version 0 and then versions of an Adam-like update of `--lr`. `--parts`, in this order:

    start       seconds until the engine is ready: cold (its compile caches in a new folder) and warm (the same again)
    memory      GiB of the GPU that the engine holds when it is ready, and what the plan expects of it
    rate        tokens/s of `--requests` requests at once, `--new-tokens` each
    updates     `--versions` versions, each `--full-every`th in full, the others as deltas, while `--running` requests
                generate: the pause from its first call to its last answer, digests included; seconds to fetch and
                stage; every read-back under HF names, and one that differs ends the bench
    agreement   |engine - transformers| log-probabilities of drawn tokens, by the weights of the last version

`--limit-s` bounds everything: updates end with the version that is then under way, and other parts that would begin
after it are named in `left_out`.
"""

from __future__ import annotations

import argparse
import asyncio
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from astracli.config import recipe_io
from astracli.config.recipe import Recipe
from astracli.engines import registry as engines
from astracli.engines.client import EngineClient
from astracli.engines.contract import UNPROVEN, GenRequest, WeightReceiver, flushes

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from shared import GIB, adapter_of, folder, more_options, say, show, spread
from weights.sglang_server import Trainer, compare

from engine.rollout import TOKEN, Served, chosen, engine_options, serving

PARTS = ("start", "memory", "rate", "updates", "agreement")
CACHES = (
    *("XDG_CACHE_HOME", "VLLM_CACHE_ROOT", "TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR"),
    *("FLASHINFER_WORKSPACE_BASE", "TVM_FFI_CACHE_DIR", "CUDA_CACHE_PATH"),
)
"""Where engines keep what they compile."""
VERIFY = 4
"""Every how manieth version is read back under HF names."""
PROMPT = 32


def used_bytes() -> int:
    """Of the first GPU, by all processes."""
    if not torch.cuda.is_available():
        return 0
    words = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits", "--id=0"]
    return int(subprocess.run(words, capture_output=True, text=True, check=True).stdout.split()[0]) * 2**20


class Bench:
    """An engine that is ready, the trainer beside it, and what is known so far."""

    def __init__(self, args: argparse.Namespace, recipe: Recipe, model: Path, served: Served, deadline: float):
        self.args, self.recipe, self.served, self.deadline = args, recipe, served, deadline
        self.kind, self.adapter = engines.of(recipe), adapter_of(model)
        device = "cuda" if torch.cuda.is_available() else "cpu"
        self.model = self.adapter.load_for_training(model, attention="sdpa").to(device)
        own: Any = SimpleNamespace(device=device, lr=args.lr)
        self.trainer = Trainer(own, self.model, self.adapter, served.weights, keep=100, full_interval=args.full_every)
        self.receiver: WeightReceiver = self.kind.receiver(served.hub_url, TOKEN, served.stage, model)
        self.version = -1

    async def bring(self, client: EngineClient, *, full: bool) -> dict[str, Any]:
        """The next version, from the trainer's step to the read-back."""
        self.version += 1
        if self.version:
            self.trainer.step()
        published = await asyncio.to_thread(self.trainer.publish, self.version)
        began, have = time.monotonic(), None if full else self.version - 1
        plan = await asyncio.to_thread(self.receiver.fetch, self.version, have)
        fetch_s, mode = time.monotonic() - began, self.recipe.weights.pause_mode
        reply = await client.update(self.version, mode, flush=flushes(mode))
        if not reply.success:
            sys.exit(f"version {self.version} was not applied: {reply.message}")
        row = {"version": self.version, "kind": plan.kind, "bytes": plan.bytes, "density": published["density"],
               "fetch_s": fetch_s, "pause_ms": 1e3 * reply.outcome["pause_s"],
               "verify_ms": 1e3 * (reply.outcome.get("verify_s") or 0.0)}  # fmt: skip
        if reply.outcome.get("readback"):
            began = time.monotonic()
            await asyncio.to_thread(self.receiver.readback, self.version)
            row["readback_s"] = time.monotonic() - began
        return row

    async def first(self, client: EngineClient) -> dict[str, Any]:
        if not self.receiver.watched:  # as the rollout worker does: the loader runs before the first pause
            self.receiver.wake(UNPROVEN)
            await client.pause("abort")
            await client.apply_staged(UNPROVEN)
            await client.resume()
        return await self.bring(client, full=True)

    def request(self, number: int, tokens: int) -> GenRequest:
        prompt = [3 + (number * 31 + place) % 20 for place in range(PROMPT)]
        return GenRequest(prompt, tokens, seed=number, rid=f"r{number}-{time.monotonic_ns()}")

    async def rate(self, client: EngineClient) -> list[dict[str, Any]]:
        rows = []
        await self._all(client, 2, 8)  # kernels
        for count in self.args.requests:
            began = time.monotonic()
            tokens = await self._all(client, count, self.args.new_tokens)
            rows.append({"requests": count, "tokens_per_s": tokens / (time.monotonic() - began), "tokens": tokens})
            say(rows[-1])
        return rows

    async def _all(self, client: EngineClient, count: int, tokens: int) -> int:
        results = await asyncio.gather(*(client.generate([self.request(i, tokens)]) for i in range(count)))
        return sum(len(result.tokens) for (result,) in results)

    async def updates(self, client: EngineClient) -> dict[str, Any]:
        rows: list[dict[str, Any]] = []
        over, drawn = asyncio.Event(), 0

        async def stream(number: int) -> None:
            nonlocal drawn
            while not over.is_set():
                (result,) = await client.generate([self.request(number, self.args.new_tokens)])
                drawn += len(result.tokens)

        streams = [asyncio.create_task(stream(number)) for number in range(self.args.running)]
        began = time.monotonic()
        try:
            for _ in range(self.args.versions):
                if time.monotonic() > self.deadline:
                    break
                rows.append(await self.bring(client, full=(self.version + 1) % self.args.full_every == 0))
                say(rows[-1])
        finally:
            over.set()
            await client.abort_all()
            done, left = await asyncio.wait(streams, timeout=60.0)
            for task in left:
                task.cancel()
        for task in done:
            task.result()
        found: dict[str, Any] = {"running": self.args.running, "tokens_per_s": drawn / (time.monotonic() - began)}
        for kind in ("delta", "full"):
            for name in ("pause_ms", "verify_ms", "fetch_s", "readback_s", "bytes", "density"):
                if values := spread(row[name] for row in rows if row["kind"] == kind and row.get(name) is not None):
                    found[f"{kind}_{name}"] = values
        return found

    async def play(self, document: dict[str, Any], left_out: list[str]) -> None:
        stage = self.served.stage
        async with self.kind.client(self.served.url, TOKEN, name="engine0", stage_dir=stage) as client:
            await client.wait_ready(60.0)
            document["version 0"] = await self.first(client)
            say(document["version 0"])
            parts: dict[str, Any] = {
                "rate": self.rate, "updates": self.updates,
                "agreement": lambda client: compare(client, self.model, self.trainer, self.adapter),
            }  # fmt: skip
            for name in PARTS:
                if name in self.args.parts and name in parts:
                    if time.monotonic() > self.deadline:
                        left_out.append(name)
                        continue
                    document[name] = await parts[name](client)
        self.receiver.close()


def measure(args: argparse.Namespace, recipe: Recipe, model: Path, name: Path) -> dict[str, Any]:
    deadline = time.monotonic() + args.limit_s
    document: dict[str, Any] = {"engine": engines.of(recipe).name, "model": str(args.model or recipe.model.path)}
    left_out: list[str] = []
    env = dict(recipe.resources.engine.env) | {key: str(name / "caches" / key.lower()) for key in CACHES}
    own = recipe.resources.engine.model_copy(update={"env": env})
    if "start" in args.parts:  # its caches are new
        cold = recipe.model_copy(update={"resources": recipe.resources.model_copy(update={"engine": own})})
        with serving(cold, model, name, published=True) as served:
            document["cold_start_s"] = served.start_s
            say(cold_start_s=served.start_s)
        recipe = cold
    before = used_bytes()
    with serving(recipe, model, name, published=True) as served:
        document["start_s"] = served.start_s
        if "memory" in args.parts and torch.cuda.is_available():
            kind, shape = engines.of(recipe), adapter_of(model).memory_shape(_config(model))
            rows = kind.memory.rows("engine0", shape, recipe, "cuda", reserved=_reserved(recipe))
            planned = sum(row.bytes for row in rows if row.where == "gpu")
            document |= {"memory_gib": (used_bytes() - before) / GIB, "planned_gib": planned / GIB}
        asyncio.run(Bench(args, recipe, model, served, deadline).play(document, left_out))
    return document | {"left_out": ", ".join(left_out) or "nothing"}


def _config(model: Path) -> dict[str, Any]:
    from astracli.models.adapter import read_config

    return dict(read_config(model))


def _reserved(recipe: Recipe) -> int:
    """Bytes that the recipe lets the engine take of the first GPU."""
    return int(engines.of(recipe).memory.share(recipe) * torch.cuda.get_device_properties(0).total_memory)


def main() -> None:
    parser = more_options(
        engine_options(__doc__), parts=list(PARTS), requests=[1, 64, 256], new_tokens=512, prompt_tokens=PROMPT,
        running={64: "requests that generate while versions come"}, versions=24, full_every=8, lr=5e-6, limit_s=540.0,
        mode={"in_place": "weights.pause_mode"},
    )  # fmt: skip
    args = parser.parse_args()
    args.concurrency = max(*args.requests, args.running)
    recipe, model, sets = chosen(args)
    more = [f"weights.pause_mode={args.mode}", f"weights.verify_interval={VERIFY}"]
    recipe = recipe_io.load(args.recipe, [*sets, *more])
    with folder(in_memory=True) as name, suppress(KeyboardInterrupt):
        show(args, measure(args, recipe, model, name))


if __name__ == "__main__":
    main()
