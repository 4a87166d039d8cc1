"""Is the rollout worker as quick as its engine? `astra rollout` beside raw requests to the same engine.

    python bench/gpu_rollout.py --model DIR [--concurrency 256] [--waves 4] [--new-tokens 512] [--rounds 3] [--json]
    python bench/gpu_rollout.py --model DIR --memory-gib 44 --concurrency 32 --new-tokens 4000 --waves 1
    python bench/gpu_rollout.py --device cpu --concurrency 64 --new-tokens 24      the embedded engine, shipped model

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
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from meter import MemoryWatch
from transformers import AutoTokenizer

from astracli.backends import choice as backend
from astracli.config import recipe_io
from astracli.config.recipe import Recipe
from astracli.data import arithmetic, fetch
from astracli.doctor import gather
from astracli.engines.client import EngineClient, GenRequest
from astracli.machine import facts as machine
from astracli.models import registry
from astracli.models.adapter import chat_prompt_tokens
from astracli.plan.build import ENGINE_MODULES
from astracli.process import ports
from astracli.process.worker import WorkerConfig

TOKEN = "bench"
GROUP = 8


def settings(args: argparse.Namespace, total_gib: float | None) -> list[str]:
    """What both sides' recipe says."""
    filler = "1 " * (args.prompt_tokens // 2)
    found: dict[str, Any] = {
        "data.reward": "probe",
        "data.prompt": json.dumps(filler + "{question}"),
        "rollout.group_size": GROUP,
        "rollout.max_new_tokens": args.new_tokens,
        "rollout.context_length": args.prompt_tokens + 64 + args.new_tokens,
        "rollout.max_running_requests": args.concurrency,
        "algorithm.drop_equal_groups": "false",
    }
    if args.device == "cuda":
        found |= {"resources.device": "cuda", "resources.rollout_gpus": 1, "model.path": str(args.model)}
        if args.engine_path:
            found["resources.engine.env.PYTHONPATH"] = args.engine_path
        if args.attention:
            found["rollout.attention_backend"] = args.attention
        share = (args.memory_gib or total_gib or 0) / (total_gib or 1)
        found["rollout.mem_fraction_static"] = round(0.8 * min(1.0, share), 4)
    return [f"{key}={value}" for key, value in found.items()]


# ---- raw


@contextmanager
def silent_hub() -> Iterator[str]:
    """Takes an engine's heartbeats."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            self.send_response(200)
            self.send_header("Content-Length", "2")
            self.end_headers()
            self.wfile.write(b"{}")

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()


@contextmanager
def engine(recipe: Recipe, model: Path, folder: Path) -> Iterator[str]:
    """An engine process of this recipe with the checkpoint's own weights; yields its URL."""
    facts, adapter = gather.with_engine(machine.probe(), recipe), registry.resolve(recipe, model)
    choice = backend.choose(adapter, facts, recipe)
    (port,) = ports.free_ports(1, "127.0.0.1")
    run = folder / f"engine-{port}"
    (run / "config").mkdir(parents=True)
    (run / "stage").mkdir()
    with silent_hub() as hub:
        config = WorkerConfig(
            name="engine0", role="engine", run_dir=run, hub_url=hub, token=TOKEN, recipe=recipe,
            paths={"model": str(model)}, device=choice.device, threads=recipe.resources.threads.engine,
            backends=choice.settings(), extra={"port": port, "stage_dir": str(run / "stage"), "published": False},
        )  # fmt: skip
        path = run / "config" / "engine0.json"
        path.write_text(json.dumps(config.document()))
        command = [sys.executable, "-m", ENGINE_MODULES[choice.engine], str(path)]
        with (run / "engine.log").open("w") as log:
            process = subprocess.Popen(
                command, stdout=log, stderr=log, start_new_session=True, env=os.environ | dict(choice.env)
            )
            try:
                wait_ready(f"http://127.0.0.1:{port}", process, run / "engine.log")
                yield f"http://127.0.0.1:{port}"
            finally:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


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
    return [chat_prompt_tokens(tokenizer, recipe.data.prompt.format(question=p.question)) for p in problems]


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


# ---- ours


def ours(args: argparse.Namespace, sets: list[str], groups: int, folder: Path) -> tuple[int, float]:
    """(tokens, seconds) of one `astra rollout`, start-up excluded."""
    run = folder / f"rollout-{time.monotonic_ns()}"
    out = folder / f"{run.name}.jsonl"
    command = [sys.executable, "-m", "astracli", "rollout", "--recipe", args.recipe, "--n", str(groups)]
    command += ["--out", str(out), "--run-dir", str(run), *(part for s in sets for part in ("--set", s))]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(command)} ended with {done.returncode}:\n{done.stderr[-3000:]}")
    tokens = sum(len(json.loads(line)["tokens"]) for line in out.read_text().splitlines())
    return tokens, json.loads((run / "summary.json").read_text())["phases_s"]["running"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="checkpoint directory; default the shipped tiny model")
    parser.add_argument("--recipe", default="qwen3.5-tiny-m2po-delta")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--concurrency", type=int, default=256)
    parser.add_argument("--waves", type=int, default=4, help="completions per open request, on average")
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--new-tokens", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--memory-gib", type=float, help="of a smaller GPU")
    parser.add_argument("--attention", help="rollout.attention_backend")
    parser.add_argument("--engine-path", help="PYTHONPATH of the environment that holds SGLang")
    parser.add_argument("--only-ours", action="store_true", help="without the raw requests: for memory, not speed")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    gpus = machine.visible_gpus(machine.probe())
    sets = settings(args, gpus[0]["memory_total"] / 2**30 if gpus else None)
    recipe = recipe_io.load(args.recipe, sets)
    model = fetch.local_path(recipe.model.path)
    if model is None:
        sys.exit(f"no checkpoint at `{recipe.model.path}`")
    groups = max(1, args.concurrency * args.waves // GROUP)
    watch = MemoryWatch()
    if args.device == "cuda":
        watch.start()
    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for _ in range(args.rounds):
            row: dict[str, float] = {}
            if not args.only_ours:
                with engine(recipe, model, folder) as url:
                    raw = asyncio.run(ask_all(url, recipe, prompts_of(recipe, model, groups), args.concurrency))
                row |= {"raw": raw[0] / raw[1], "raw_tokens": raw[0]}
            own = ours(args, sets, groups, folder)
            rows.append(row | {"ours": own[0] / own[1], "tokens": own[0]})
            print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
    watch.done.set()
    result: dict[str, Any] = {
        "ours_tokens_per_s": statistics.median(r["ours"] for r in rows),
        "peak_gib": watch.peak_gib or None,
        "rounds": rows,
    }
    if not args.only_ours:
        result["raw_tokens_per_s"] = statistics.median(r["raw"] for r in rows)
        result["share"] = statistics.median(r["ours"] / r["raw"] for r in rows)
    if args.json:
        print(json.dumps(result))
        return
    print(f"{groups * GROUP} completions a round, at most {args.concurrency} at once, {args.new_tokens} tokens at most")
    print(f"ours {result['ours_tokens_per_s']:.0f} tokens/s (median of {args.rounds} rounds)")
    if not args.only_ours:
        print(f"raw {result['raw_tokens_per_s']:.0f} tokens/s, ours / raw {result['share']:.3f}")
    if result["peak_gib"]:
        print(f"most GPU memory in use: {result['peak_gib']:.1f} GiB")


if __name__ == "__main__":
    main()
