"""How full are an engine's slots when lengths are long-tailed? The rollout worker beside an engine process, watched.

    python bench/engine/slots.py --device cpu [--slots 32] [--seconds 60]      the embedded engine, shipped model
    python bench/engine/slots.py --model DIR [--slots 256] [--median 160] [--new-tokens 1024]      SGLang on a GPU

DIR: `python bench/random_checkpoint.py DIR`. A completion has as many tokens as a log-normal law of its seed says
(`--median`, `--sigma`, at most `--new-tokens`), and no end token comes before. The worker is the real one: leases of a
hub that always grants, groups, grading. The engine itself is asked every `--poll-s` seconds how many requests it runs
(the embedded engine's /model_info; SGLang's /get_load or /v1/loads); their mean over `--seconds`, weighted by time and
after `--warm-s`, divided by the slots is the share.

    python bench/engine/slots.py ... --turns 5 [--tool-ms 100] [--episodes 1000]      episodes with a tool

plays episodes of so many completions, with a tool of 100 ms between two of them. `--episodes` are under way at once, in
the place of as many as the worker itself would begin; the engine still has `--slots`.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import statistics
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.error import HTTPError

import numpy as np

from astracli.config.recipe import Recipe
from astracli.engines import registry as engines
from astracli.engines.contract import Engine, GenRequest, GenResult
from astracli.process.config import EngineAddress, RolloutConfig
from astracli.process.worker import Reporter
from astracli.rollout import worker as rollout

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from shared import ask, folder, more_options, show

from engine.many_turns import ManyTurns
from engine.rollout import TOKEN, chosen, engine, engine_options, hub


def law(args: argparse.Namespace) -> Callable[[int], int]:
    """Tokens of the completion with a seed."""

    def length(seed: int) -> int:
        drawn = np.random.default_rng(seed).lognormal(math.log(args.median), args.sigma)
        return int(min(max(1, round(drawn)), args.new_tokens))

    return length


def follow(
    kind: Engine,
    length: Callable[[int], int],
    came: Callable[[list[GenResult]], None],
    asks: Callable[[list[GenRequest]], None] = lambda requests: None,
) -> None:
    """From now on the engine's clients end each request where the law says. `asks` and `came` hear of every call."""
    real = kind.client

    def client(*words: Any, **told: Any) -> Any:
        made = real(*words, **told)
        generate = made.generate

        async def following(requests: Sequence[GenRequest], *more: Any) -> list[GenResult]:
            asked = [replace(r, max_new_tokens=length(r.seed) - r.draw_offset, stop_token_ids=()) for r in requests]
            asks(asked)
            results: list[GenResult] = await generate(asked, *more)
            came(results)
            return results

        made.generate = following
        return made

    kind.client = client  # type: ignore[method-assign]


def endless(model: Path, folder: Path) -> Path:
    """The checkpoint under a config without an end token."""
    out = folder / "model"
    shutil.copytree(model, out)
    for name in ("config.json", "generation_config.json"):
        if (out / name).exists():
            document = json.loads((out / name).read_text())
            document["eos_token_id"] = None
            (out / name).write_text(json.dumps(document))
    return out


class Poll(threading.Thread):
    """Asks the engine how many requests it runs, from `with` to its end."""

    def __init__(self, url: str, every_s: float):
        super().__init__()
        self._url, self._every_s, self._done = url, every_s, threading.Event()
        self.seen: list[tuple[float, int, int]] = []
        """(monotonic seconds, running, waiting in the engine)"""

    def __enter__(self) -> Poll:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self.join()

    def _counts(self) -> tuple[int, int]:
        info = ask(self._url, TOKEN)
        if "running" in info:
            return info["running"], info["waiting"]
        try:
            loads = ask(self._url, TOKEN, "/get_load")
            waiting = sum(load["num_waiting_reqs"] for load in loads)
            return sum(load["num_reqs"] for load in loads) - waiting, waiting
        except HTTPError:
            loads = ask(self._url, TOKEN, "/v1/loads")["loads"]
            return sum(load["num_running_reqs"] for load in loads), sum(load["num_waiting_reqs"] for load in loads)

    def run(self) -> None:
        while not self._done.is_set():
            with suppress(OSError):  # a busy server may answer late; the answer before stands until the next
                counts = self._counts()
                self.seen.append((time.monotonic(), *counts))
            self._done.wait(self._every_s)

    def mean(self, begin: float, end: float) -> tuple[float, float]:
        """Mean of running and of waiting, weighted by the time until the next answer."""
        spans = [
            (min(after[0], end) - max(now[0], begin), now[1], now[2])
            for now, after in zip(self.seen, self.seen[1:], strict=False)
            if after[0] > begin and now[0] < end
        ]
        total = sum(span for span, _, _ in spans)
        return sum(s * running for s, running, _ in spans) / total, sum(s * waiting for s, _, waiting in spans) / total


def with_turns(args: argparse.Namespace, recipe: Recipe, running: int) -> Recipe:
    """The recipe with episodes of `--turns` completions and room for them, `running` at once."""
    room = args.turns * (args.new_tokens + ManyTurns.told)
    own = {"env": f"{ManyTurns.__module__}:{ManyTurns.__name__}", "max_new_tokens": room}
    own |= {"context_length": args.prompt_tokens + 64 + room, "max_running_requests": running}
    return recipe.model_copy(update={"rollout": recipe.rollout.model_copy(update=own)})


def measure(args: argparse.Namespace, recipe: Recipe, model: Path, folder: Path) -> dict[str, Any]:
    worker = recipe
    if args.turns > 1 or args.episodes:
        ManyTurns.turns, ManyTurns.tool_s = args.turns, args.tool_ms / 1000
        worker = with_turns(args, recipe, args.episodes or args.slots)
        recipe = with_turns(args, recipe, args.slots)
    length, lengths = law(args), list[int]()
    kind = engines.of(recipe)
    follow(kind, length, lambda results: lengths.extend(len(result.tokens) for result in results))
    with (
        engine(recipe, model, folder) as url,
        hub(folder, folder / "metrics.jsonl", slots=args.episodes or args.slots) as (store, hub_url),
    ):
        stage = folder / f"engine-{url.rpartition(':')[2]}" / "stage"
        config = RolloutConfig(
            name="rollout", run_dir=folder, attempt=1, hub_url=hub_url, token=TOKEN, recipe=worker, model_path=model,
            engine=kind.name, threads=1, data_paths={"": None}, samples=None, gpu_leases=(), generates=True,
            engines=(EngineAddress(name="engine0", url=url, stage_dir=stage),),
        )  # fmt: skip
        marks: list[tuple[float, int]] = []

        def keep_time() -> None:
            for seconds in (args.warm_s, args.seconds):
                time.sleep(seconds)
                marks.append((time.monotonic(), sum(lengths)))
            store.request_stop()

        with Poll(url, args.poll_s) as poll:
            clock = threading.Thread(target=keep_time)
            clock.start()
            rollout.run(config, Reporter(config))
            clock.join()
    (begin, before), (end, after) = marks
    running, waiting = poll.mean(begin, end)
    drawn = [length(seed) for seed in range(8000)]
    group = recipe.rollout.group_size
    longest = [max(drawn[i : i + group]) for i in range(0, len(drawn), group)]
    return {
        "turns": args.turns, "episodes": args.episodes or "as the worker begins them",
        "slots": args.slots, "slots_busy": running / args.slots, "waiting_in_engine": waiting,
        "tokens_per_s": (after - before) / (end - begin), "completions": len(lengths),
        "mean_tokens": statistics.mean(drawn),
        "mean_by_longest_of_group": statistics.mean(drawn) / statistics.mean(longest), "polls": len(poll.seen),
    }  # fmt: skip


def main() -> None:
    parser = more_options(
        engine_options(__doc__), slots={int: "default 32, on a GPU 256"}, sigma={0.8: "of the logarithm of tokens"},
        median={float: "of a completion's tokens; default 24, on a GPU 160"}, prompt_tokens=32, warm_s=10.0,
        new_tokens={int: "at most; default 160, on a GPU 1024"}, seconds=60.0, poll_s=0.05,
        turns={1: "completions of an episode"}, tool_ms=100.0, episodes={0: "at once; 0: as many as the worker begins"},
    )  # fmt: skip
    args = parser.parse_args()
    cpu = args.device == "cpu"
    args.slots = args.concurrency = args.slots or (32 if cpu else 256)
    args.median, args.new_tokens = args.median or (24 if cpu else 160), args.new_tokens or (160 if cpu else 1024)
    recipe, model, _ = chosen(args)
    with folder() as name:
        show(args, measure(args, recipe, endless(model, name) if cpu else model, name))


if __name__ == "__main__":
    main()
