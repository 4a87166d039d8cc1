"""Is the rollout worker as quick as its engine alone? Long-tailed completions through it, and the same ones offline.

    python bench/engine/offline.py --model DIR --engine vllm --engine-python PYTHON [--slots 256] [--limit-s 540] --json
    python bench/engine/offline.py --model DIR --engine sglang --engine-path PATH --json

First the whole worker (leases, groups, grading, the hub) draws `--waves` completions a slot, in groups of 8, each as
long as a log-normal law of its seed says (`--median`, `--sigma`, at most `--new-tokens`); the engine's server runs as a
run starts it. Then the engine's own offline interface (`vllm.LLM`, `sglang.Engine`) gets the very same prompts and
lengths in one call, with the same slots, memory and kernels. A side's figure is generated tokens over the seconds from
its first request to its last answer, the emptying end included; `share` is worker over offline, at least 0.97 is
wanted. `--limit-s` bounds the offline side; the worker's ends with its completions.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from astracli.config.recipe import Recipe
from astracli.engines import registry as engines
from astracli.engines.contract import GenRequest, GenResult
from astracli.process.config import EngineAddress, RolloutConfig, SampleFile
from astracli.process.worker import Reporter
from astracli.rollout import worker as rollout

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from shared import folder, more_options, say, show

from engine.rollout import GROUP, TOKEN, chosen, engine_options, hub, serving
from engine.slots import follow, law

HERE = Path(__file__).resolve().parent
Asked = list[tuple[list[int], int]]
VLLM_ARGUMENTS = (
    *("model", "tokenizer", "skip_tokenizer_init", "load_format", "dtype", "seed", "max_model_len", "max_num_seqs"),
    *("max_num_batched_tokens", "gpu_memory_utilization", "enable_prefix_caching", "enforce_eager", "logprobs_mode"),
    *("generation_config", "attention_backend"),
)
SGLANG_FLAGS = {"config", "host", "port", "custom_weight_loader", "weight_version", "log_level_http"}
"""Of the server alone."""


class Clock:
    """What was asked and drawn, and when."""

    def __init__(self) -> None:
        self.asked: Asked = []
        self.tokens, self.first, self.last = 0, 0.0, 0.0

    def asks(self, requests: list[GenRequest]) -> None:
        self.first = self.first or time.monotonic()
        self.asked += [(list(map(int, each.input_ids)), each.max_new_tokens) for each in requests]

    def came(self, results: list[GenResult]) -> None:
        self.tokens += sum(len(result.tokens) for result in results)
        self.last = time.monotonic()


def worker(args: argparse.Namespace, recipe: Recipe, model: Path, name: Path) -> tuple[Clock, Path]:
    """(what the rollout worker did, the run directory of its engine)"""
    clock, kind = Clock(), engines.of(recipe)
    follow(kind, law(args), clock.came, clock.asks)
    groups = max(1, args.slots * args.waves // GROUP)
    with serving(recipe, model, name) as served, hub(name, name / "metrics.jsonl", slots=args.slots) as (_, hub_url):
        config = RolloutConfig(
            name="rollout", run_dir=name, attempt=1, hub_url=hub_url, token=TOKEN, recipe=recipe, model_path=model,
            engine=kind.name, threads=1, data_paths={"": None}, gpu_leases=(), generates=True,
            samples=SampleFile(path=name / "samples.jsonl", groups=groups),
            engines=(EngineAddress(name="engine0", url=served.url, stage_dir=served.stage),),
        )  # fmt: skip
        rollout.run(config, Reporter(config))
        return clock, served.stage.parent


def arguments(kind: str, run: Path) -> dict[str, Any]:
    """Of the offline engine: those that its server was started with."""
    if kind == "vllm":
        told = json.loads((run / "config" / "engine0.vllm.json").read_text())["engine"]
        return {key: told[key] for key in VLLM_ARGUMENTS if key in told}
    line = next(line for line in (run / "engine.log").read_text().splitlines() if line.startswith("starting sglang."))
    found: dict[str, Any] = {}
    for word in line.split()[2:]:
        if word.startswith("--"):
            key, given, value = word[2:].partition("=")
            last = key.replace("-", "_")
            found[last] = _value(value) if given else True
        else:
            found[last] = [*(found[last] if isinstance(found[last], list) else []), _value(word)]
    return {key: value for key, value in found.items() if key not in SGLANG_FLAGS}


def _value(word: str) -> Any:
    for kind in (int, float):
        try:
            return kind(word)
        except ValueError:
            continue
    return word


def offline(args: argparse.Namespace, recipe: Recipe, clock: Clock, run: Path) -> dict[str, Any]:
    kind, own = engines.of(recipe).name, recipe.resources.engine
    told = {"engine": kind, "arguments": arguments(kind, run), "requests": clock.asked}
    path = run / "offline.json"
    path.write_text(json.dumps(told))
    command = [own.python or sys.executable, str(HERE / "offline_child.py"), str(path)]
    env = {**os.environ, **own.env, "PYTHONSAFEPATH": "1"}
    try:
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=args.limit_s)
    except subprocess.TimeoutExpired:
        sys.exit(f"{kind}'s offline engine was not done within {args.limit_s:g} s")
    if done.returncode:
        sys.exit(f"{kind}'s offline engine ended with {done.returncode}:\n{done.stderr[-3000:]}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> None:
    parser = more_options(
        engine_options(__doc__), slots=256, waves={8: "completions a slot, on average"}, prompt_tokens=128,
        median={160.0: "of a completion's tokens"}, sigma={0.8: "of the logarithm of tokens"}, new_tokens=1024,
        limit_s=540.0,
    )  # fmt: skip
    args = parser.parse_args()
    args.concurrency = args.slots
    recipe, model, _ = chosen(args)
    with folder() as name:
        clock, run = worker(args, recipe, model, name)
        ours = clock.tokens / (clock.last - clock.first)
        say(worker_tokens_per_s=ours, tokens=clock.tokens)
        alone = offline(args, recipe, clock, run)
        its = alone["tokens"] / alone["seconds"]
        document = {
            "engine": engines.of(recipe).name, "slots": args.slots, "completions": len(clock.asked),
            "tokens": clock.tokens, "offline_tokens": alone["tokens"], "worker_tokens_per_s": ours,
            "offline_tokens_per_s": its, "share": ours / its, "wanted": 0.97,
        }  # fmt: skip
        show(args, document)


if __name__ == "__main__":
    main()
