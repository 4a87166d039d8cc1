"""What does an engine's prefix cache bring? The same completions with `rollout.prefix_cache` on and off.

    python bench/engine/prefixes.py --model DIR --engine vllm --engine-python PYTHON [--limit-s 540] --json
    python bench/engine/prefixes.py --model DIR --engine sglang --engine-path PATH [--lengths 100 1000 8000] --json

Groups of 8 samples of one prompt, for prompts of each of `--lengths` tokens, and episodes of `--turns` completions with
`--told` tokens of a tool between two of them (groups of 8, too). `--slots` requests are under way at once; every
completion has `--new-tokens`. For each a row: completions/s with the cache and without, their ratio, and the share of
prompt tokens that it had. `gap` is the largest difference of log-probabilities of the same greedy tokens, with and
without. The engine serves weights of its own; that none of older weights are found, the tests hold. `--limit-s` bounds
everything: rows that would begin later are null.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import numpy as np

from astracli.config import recipe_io
from astracli.config.recipe import Recipe
from astracli.engines import registry as engines
from astracli.engines.client import EngineClient
from astracli.engines.contract import GenRequest, GenResult
from astracli.errors import UserError

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from shared import folder, more_options, say, show

from engine.rollout import GROUP, TOKEN, chosen, engine_options, serving

Row = dict[str, Any]
FIRST_ID, IDS = 3, 20
"""Prompts are made of so many ids, which every model has."""


class Load:
    """Requests to one engine, so many at once."""

    def __init__(self, args: argparse.Namespace, client: EngineClient):
        self.args, self._client, self._room = args, client, asyncio.Semaphore(args.slots)
        self.prompt = self.cached = self.done = 0

    async def ask(self, prompt: list[int], tokens: int, seed: int, temperature: float = 1.0) -> GenResult:
        async with self._room:
            (result,) = await self._client.generate(
                [GenRequest(prompt, tokens, temperature, seed=seed, rid=f"p{seed}-{time.monotonic_ns()}")]
            )
        self.prompt += len(prompt)
        self.cached += result.cached_tokens or 0
        self.done += 1
        return result

    async def groups(self, length: int) -> None:
        """Single turns, all groups at once; what is over the slots waits here, in order."""
        asks = [
            self.ask(made(group, length), self.args.new_tokens, group * GROUP + sample)
            for group in range(self.args.groups)
            for sample in range(GROUP)
        ]
        await asyncio.gather(*asks)

    async def episodes(self, length: int) -> None:
        async def play(group: int, sample: int) -> None:
            context = made(group + 1000, length)  # none of the single turns
            for turn in range(self.args.turns):
                result = await self.ask(context, self.args.new_tokens, (group * GROUP + sample) * 100 + turn)
                context = [*context, *map(int, result.tokens), *made(group + turn, self.args.told)]

        await asyncio.gather(*(play(group, sample) for group in range(self.args.groups) for sample in range(GROUP)))


def made(number: int, length: int) -> list[int]:
    return [int(token) for token in FIRST_ID + np.random.default_rng(number).integers(0, IDS, length)]


async def rows(args: argparse.Namespace, client: EngineClient, deadline: float) -> tuple[dict[str, Row], list[Any]]:
    """(figures of each kind of prompts; greedy answers of one group, twice)"""
    warm = Load(args, client)
    greedy = [await warm.ask(made(10**6, min(args.lengths)), 16, i, 0.0) for i in range(2)]
    kinds: dict[str, tuple[Callable[[Load, int], Awaitable[None]], int]] = {
        **{f"groups, prompts of {length}": (Load.groups, length) for length in args.lengths},
        f"{args.turns} turns": (Load.episodes, min(args.lengths)),
    }
    found: dict[str, Row] = {}
    for name, (play, length) in kinds.items():
        if time.monotonic() > deadline:
            continue
        load, began = Load(args, client), time.monotonic()
        await play(load, length)
        found[name] = {
            "completions_per_s": load.done / (time.monotonic() - began),
            "hit_rate": load.cached / load.prompt,
        }
        say(found[name], kind=name)
    return found, greedy


def gap(one: list[GenResult], two: list[GenResult]) -> float:
    """Of the tokens that both drew before they first differ."""
    worst = 0.0
    for a, b in zip(one, two, strict=True):
        count = min(len(a.tokens), len(b.tokens))
        same = np.cumprod(a.tokens[:count] == b.tokens[:count]).astype(bool)
        worst = max(worst, float(np.abs(a.logprobs[:count] - b.logprobs[:count])[same].max(initial=0.0)))
    return worst


def serve(args: argparse.Namespace, recipe: Recipe, model: Path, name: Path, deadline: float) -> Any:
    with serving(recipe, model, name) as served:

        async def go() -> Any:
            kind = engines.of(recipe)
            async with kind.client(served.url, TOKEN, name="engine0", stage_dir=served.stage) as client:
                return await rows(args, client, deadline)

        return asyncio.run(go())


def main() -> None:
    parser = more_options(
        engine_options(__doc__), lengths=[100, 1000, 8000], groups=32, turns=5, told=24, new_tokens=64, slots=64,
        limit_s=540.0,
    )  # fmt: skip
    args = parser.parse_args()
    deadline = time.monotonic() + args.limit_s
    args.concurrency, args.prompt_tokens = args.slots, max(args.lengths)
    room = max(args.lengths) + (args.new_tokens + args.told) * args.turns + 64
    _, model, sets = chosen(args)
    sets += [f"rollout.context_length={room}", f"rollout.max_new_tokens={args.new_tokens}"]
    found = {}
    with folder() as name:
        for cache in ("on", "off"):
            recipe = recipe_io.load(args.recipe, [*sets, f"rollout.prefix_cache={cache}"])
            try:
                found[cache] = serve(args, recipe, model, name, deadline)
            except UserError as error:
                sys.exit(f"error: {error.message}; hint: {error.hint}")
    (on, greedy_on), (off, greedy_off) = found["on"], found["off"]
    table = []
    for kind in on:
        rates = [side.get(kind, {}).get("completions_per_s") for side in (on, off)]
        table.append({
            "prompts": kind, "completions_per_s_on": rates[0], "completions_per_s_off": rates[1],
            "ratio": rates[0] / rates[1] if rates[1] else None, "hit_rate": on[kind]["hit_rate"],
        })  # fmt: skip
    document = {"engine": engines.of(recipe).name, "groups": args.groups, "slots": args.slots}
    show(args, document | {"gap": gap(greedy_on, greedy_off), "rows": table})


if __name__ == "__main__":
    main()
