"""Is the rollout worker as quick as its engine? `astra rollout` beside raw requests to the same engine.

    python bench/engine/rollout.py --model DIR [--concurrency 256] [--waves 4] [--new-tokens 512] [--rounds 3] [--json]
    python bench/engine/rollout.py --model DIR --memory-gib 44 --concurrency 32 --new-tokens 4000 --waves 1
    python bench/engine/rollout.py --device cpu --concurrency 64 --new-tokens 24      the embedded engine, shipped model

DIR: `python bench/random_checkpoint.py DIR`. Both sides ask for the same number of completions of the same prompts with
the same limits; a round is one of each. Raw is one HTTP request per completion, `--concurrency` of them open at once,
against an engine process started as a run starts it; ours is the whole worker: leases, groups, grading, the hub. A
side's figure is generated tokens over the seconds from all processes ready to the last sample. `--memory-gib` keeps
the engine within a smaller GPU's memory and prints the most that nvidia-smi saw of its processes.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from astracli.backends import choice as backend
from astracli.config import recipe_io
from astracli.config.recipe import Recipe
from astracli.data import arithmetic, fetch
from astracli.data.turns import render
from astracli.doctor import gather
from astracli.engines import registry as engines
from astracli.engines.client import EngineClient
from astracli.engines.contract import GenRequest
from astracli.hub.api import build_app
from astracli.hub.store import HubStore
from astracli.hub.types import HubSettings
from astracli.machine import read
from astracli.models import registry
from astracli.models.adapter import chat_prompt_tokens, read_config
from astracli.process import ports
from astracli.process.config import EngineConfig
from astracli.process.server import ServerThread
from astracli.weights.publish.server import weights_app

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from shared import RECIPE, command, finished, folder, gpu_settings, more_options, options, say, show, watched

TOKEN = "bench"
GROUP = 8
SHARES = {"sglang": "sglang.mem_fraction_static", "vllm": "vllm.gpu_memory_utilization"}
"""Engine -> what it may reserve of its GPU."""
MANY = 100_000
"""Groups of a batch and steps of a run."""


def settings(args: argparse.Namespace, total_gib: float | None) -> list[str]:
    """What both sides' recipe says."""
    filler = "1 " * (args.prompt_tokens // 2)
    found: dict[str, Any] = {
        "data.reward": "probe", "data.template": json.dumps(filler + "{question}"), "rollout.group_size": GROUP,
        "rollout.max_new_tokens": args.new_tokens, "rollout.context_length": args.prompt_tokens + 64 + args.new_tokens,
        "rollout.max_running_requests": args.concurrency, "algorithm.drop_equal_groups": "false",
    }  # fmt: skip
    kind = args.engine if args.engine != "auto" else "sglang" if args.device == "cuda" else "embedded"
    if args.model:
        found["model.path"] = str(args.model)
    if args.engine != "auto":
        found["rollout.engine"] = args.engine
    if args.engine_python:
        found["resources.engine.python"] = args.engine_python
    if args.device == "cuda":
        found |= gpu_settings(args, None)
        if args.attention:
            found[f"rollout.{kind}.attention_backend"] = args.attention
        if total_gib:
            found[f"rollout.{SHARES[kind]}"] = round(0.8 * min(1.0, (args.memory_gib or total_gib) / total_gib), 4)
    return [f"{key}={value}" for key, value in found.items()]


@contextmanager
def hub(folder: Path, metrics: Path | None = None, **more: Any) -> Iterator[tuple[HubStore, str]]:
    """A hub that always grants: admission never says no. `metrics`: a file for what processes report; `more`: settings
    of the hub."""
    settings = HubSettings(
        batch_groups=MANY, max_staleness=0, drop_equal_groups=False, lease_timeout_s=600.0, steps=MANY, eval_every=0,
        engines=("engine0",), **more,
    )  # fmt: skip
    store = HubStore(folder / "hub.sqlite", settings)
    (folder / "weights").mkdir()
    app = build_app(
        store, TOKEN, weights_app=weights_app(folder / "weights"), metrics_path=metrics, on_status=lambda _: None
    )
    server = ServerThread(app, ports.bind("127.0.0.1")).start()
    try:
        yield store, server.url
    finally:
        server.stop()
        store.close()


@dataclass(frozen=True)
class Served:
    """An engine process that is ready."""

    url: str
    hub_url: str
    stage: Path
    weights: Path
    """Where a trainer publishes for it."""
    start_s: float


@contextmanager
def serving(
    recipe: Recipe, model: Path, folder: Path, *, published: bool = False, leaves: bool = False
) -> Iterator[Served]:
    """An engine process of this recipe with the checkpoint's own weights; `published`: with made-up ones, until it is
    brought version 0. `leaves`: it can give its memory back."""
    facts, adapter = gather.with_engine(read.probe(), recipe), registry.resolve(recipe, model)
    choice = backend.choose(adapter, facts, recipe, read_config(model), updated=published)
    (port,) = ports.free_ports(1, "127.0.0.1")
    run = folder / f"engine-{port}"
    (run / "config").mkdir(parents=True)
    (run / "stage").mkdir()
    with hub(run) as (_, hub_url):
        config = EngineConfig(
            name="engine0", run_dir=run, attempt=1, hub_url=hub_url, token=TOKEN, recipe=recipe, model_path=model,
            engine=choice.engine, threads=recipe.resources.threads.engine, device=choice.device, port=port,
            stage_dir=run / "stage", published=published, await_weights=False, time_sharing=leaves, staging="host",
            mem_fraction_static=engines.of(recipe).memory.share(recipe), serving_attention=choice.serving_attention,
            linear_attention=choice.linear_attention, prefix_cache=choice.prefix_cache,
        )  # fmt: skip
        path = run / "config" / "engine0.json"
        path.write_text(config.model_dump_json())
        command = [sys.executable, "-m", engines.of(recipe).start(recipe).module, str(path)]
        began = time.monotonic()
        with (run / "engine.log").open("w") as log:
            process = subprocess.Popen(
                command, stdout=log, stderr=log, start_new_session=True, env=os.environ | dict(choice.env)
            )
            try:
                url = f"http://127.0.0.1:{port}"
                wait_ready(url, process, run / "engine.log")
                yield Served(url, hub_url, run / "stage", run / "weights", time.monotonic() - began)
            finally:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


@contextmanager
def engine(recipe: Recipe, model: Path, folder: Path) -> Iterator[str]:
    """The URL of an engine process with the checkpoint's own weights."""
    with serving(recipe, model, folder) as served:
        yield served.url


def wait_ready(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    async def health() -> bool:
        async with EngineClient(url, TOKEN) as client:
            return await client.health()

    while not asyncio.run(health()):
        if process.poll() is not None:
            sys.exit("the engine ended; its last lines:\n" + log.read_text()[-3000:])
        time.sleep(0.5)


def prompts_of(recipe: Recipe, model: Path, groups: int) -> list[list[int]]:
    tokenizer = AutoTokenizer.from_pretrained(model)
    problems = [arithmetic.draw(i, recipe.seed, recipe.data.levels) for i in range(groups)]
    return [chat_prompt_tokens(tokenizer, render(recipe.data.template, p.question)) for p in problems]


async def ask_all(url: str, recipe: Recipe, prompts: list[list[int]], concurrency: int) -> tuple[int, float]:
    """(tokens, seconds) of every prompt answered GROUP times, one request each."""
    limit, table = asyncio.Semaphore(concurrency), recipe.rollout
    async with EngineClient(url, TOKEN) as client:

        async def one(number: int) -> int:
            prompt = prompts[number // GROUP]
            async with limit:
                (result,) = await client.generate(
                    [GenRequest(prompt, table.max_new_tokens, table.temperature, seed=number, rid=f"r{number}")]
                )
            return len(result.tokens)

        await asyncio.gather(*(one(i) for i in range(min(concurrency, 8))))  # kernels and graphs are warm
        began = time.monotonic()
        lengths = await asyncio.gather(*(one(i) for i in range(len(prompts) * GROUP)))
        return sum(lengths), time.monotonic() - began


def ours(args: argparse.Namespace, sets: list[str], groups: int, folder: Path) -> tuple[int, float]:
    """(tokens, seconds) of one `astra rollout`, start-up excluded."""
    run = folder / f"rollout-{time.monotonic_ns()}"
    out = folder / f"{run.name}.jsonl"
    finished([*command("rollout", run, sets, args.recipe), "--n", str(groups), "--out", str(out)], folder)
    tokens = sum(len(json.loads(line)["tokens"]) for line in out.read_text().splitlines())
    return tokens, json.loads((run / "summary.json").read_text())["phases_s"]["running"]


def engine_options(doc: str | None) -> argparse.ArgumentParser:
    """What the benches of an engine ask for."""
    return options(
        doc, model={str: "checkpoint directory; default the shipped tiny model"}, recipe=RECIPE,
        engine=("auto", "sglang", "vllm", "embedded"), device=("cuda", "cpu"), memory_gib={float: "of a smaller GPU"},
        attention={str: "attention_backend of the engine's table"},
        engine_path={str: "PYTHONPATH of the environment that holds the engine"},
        engine_python={str: "its interpreter"},
    )  # fmt: skip


def chosen(args: argparse.Namespace) -> tuple[Recipe, Path, list[str]]:
    """The recipe, its checkpoint and the settings that made it."""
    gpus = read.probe().visible_gpus
    sets = settings(args, (gpus[0].memory_total or 0) / 2**30 if gpus else None)
    recipe = recipe_io.load(args.recipe, sets)
    model = fetch.local_path(recipe.model.path)
    if model is None:
        sys.exit(f"no checkpoint at `{recipe.model.path}`")
    return recipe, model, sets


def main() -> None:
    parser = more_options(
        engine_options(__doc__), concurrency=256, waves={4: "completions per open request, on average"},
        prompt_tokens=128, new_tokens=512, rounds=3,
        only_ours={False: "without the raw requests: for memory, not speed"},
    )  # fmt: skip
    args = parser.parse_args()
    recipe, model, sets = chosen(args)
    groups = max(1, args.concurrency * args.waves // GROUP)
    rows = []
    with folder() as name, watched(args.device) as watch:
        for _ in range(args.rounds):
            row: dict[str, float] = {}
            if not args.only_ours:
                with engine(recipe, model, name) as url:
                    raw = asyncio.run(ask_all(url, recipe, prompts_of(recipe, model, groups), args.concurrency))
                row |= {"raw": raw[0] / raw[1], "raw_tokens": raw[0]}
            own = ours(args, sets, groups, name)
            rows.append(row | {"ours": own[0] / own[1], "tokens": own[0]})
            say(rows[-1])
    result: dict[str, Any] = {
        "completions": groups * GROUP,
        "ours_tokens_per_s": statistics.median(r["ours"] for r in rows),
        "peak_gib": watch.peak_gib or None,
    }
    if not args.only_ours:
        result["raw_tokens_per_s"] = statistics.median(r["raw"] for r in rows)
        result["share"] = statistics.median(r["ours"] / r["raw"] for r in rows)
    show(args, result | {"rounds": rows})


if __name__ == "__main__":
    main()
