"""What do episodes cost the rollout worker? Single turns beside another checkout, and many episodes with a tool.

    python bench/loop/turns.py --beside DIR     samples/s of single turns, this checkout and the one in DIR in turns
    python bench/loop/turns.py                  1,000 episodes of 5 turns at once, a tool of 100 ms between two turns

The engine is simulated and costs nothing: a request takes a slot (`--slots`) for its tokens x `--token-ms`. Everything
else is real: the calls to the engine, the check of each episode, chat template and parser, the sandbox of the tools.
`slots busy` is counted from the moment when all slots were taken first until fewer episodes are left than slots.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from astracli.config import recipe_io
from astracli.data.prompts import Problem
from astracli.engines.contract import GenRequest, GenResult
from astracli.envs.contract import EnvSetup, Episode, Score
from astracli.envs.single_turn import SingleTurnEnv
from astracli.models.adapter import load_tokenizer
from astracli.rollout.episodes import play
from astracli.rollout.groups import group_of
from astracli.rollout.policy import RolloutSampling

GROUP = 8


class Simulated:
    """An engine behind its gate: slots, and a time for each token."""

    name = "engine0"

    def __init__(self, slots: int, token_s: float, turns: Sequence[Sequence[int]], told: int = -1):
        """`turns`: what it draws, by how many tokens `told` stand in the context."""
        self.slots, self._token_s, self._turns, self._told = slots, token_s, turns, told
        self._free = asyncio.Semaphore(slots)
        self.busy, self._since, self._busy_s, self._from = 0, 0.0, 0.0, 0.0

    async def generate(self, requests: Sequence[GenRequest], heard: Any) -> list[GenResult]:
        return list(await asyncio.gather(*(self._one(i, one, heard) for i, one in enumerate(requests))))

    async def _one(self, place: int, request: GenRequest, heard: Any) -> GenResult:
        turn = self._turns[list(request.input_ids).count(self._told) if self._told >= 0 else 0]
        tokens = np.array(turn, np.int32)
        if self._token_s:
            async with self._free:
                self._count(1)
                await asyncio.sleep(len(tokens) * self._token_s)
                self._count(-1)
        result = GenResult(tokens, np.full(len(tokens), -0.5, np.float32), "stop", 0, 0, "")
        if heard is not None:
            heard(place, result, True)
        return result

    def _count(self, change: int) -> None:
        now = time.monotonic()
        if self._from:
            self._busy_s += self.busy * (now - self._since)
        self._since = now
        self.busy += change
        if self.busy == self.slots and not self._from:
            self._from = now

    def share(self) -> float:
        """Of the slots, since all were taken."""
        return self._busy_s / (self.slots * (self._since - self._from))

    def count_aborted(self, samples: int, tokens: int) -> None:
        raise AssertionError("nothing is aborted here")


def recipe(*settings: str) -> Any:
    lengths = ["rollout.max_new_tokens=4000", "rollout.context_length=6000", f"rollout.group_size={GROUP}"]
    return recipe_io.load("qwen3.5-tiny-m2po-delta", [*lengths, *settings])


def problem(number: int) -> Problem:
    return Problem(f"p{number}", "12*34", "408", messages=({"role": "user", "content": "12*34"},))


async def single(samples: int, tokens: int) -> float:
    """Samples a second: episodes of one turn, played, checked and put into groups."""
    chosen = recipe()
    prompt, turn = np.arange(3, 19, dtype=np.int32), [*([5] * (tokens - 1)), 1]
    coder = load_tokenizer(Path(str(files("astracli") / "assets" / "tiny")))
    no_grader: Any = None
    env = SingleTurnEnv(EnvSetup(chosen, coder, no_grader, lambda problem: prompt))
    gate: Any = Simulated(1, 0.0, [turn])
    sampling, score = RolloutSampling(chosen, (1,)), Score(1.0, "right")
    began = time.perf_counter()
    for number in range(samples // GROUP):
        asked = problem(number)
        found = (await play(env, gate, sampling, {number: asked}, lambda change: None))[number]
        episodes = {index: one for index, one in enumerate(found) if isinstance(one, Episode)}
        for one in episodes.values():
            one.text = "12"
        group = group_of(env, number, asked, episodes, [score] * len(episodes))
        assert len(group.samples) == GROUP
    return samples / (time.perf_counter() - began)


def beside(args: argparse.Namespace) -> dict[str, Any]:
    """Both checkouts in turns, each in processes of its own."""
    here = Path(__file__).resolve().parents[2]
    found: dict[str, list[float]] = {"this": [], "other": []}
    for number in range(2 * args.rounds):
        name = ("this", "other")[(number + number // 2) % 2]
        place = here if name == "this" else Path(args.beside).resolve()
        command = [sys.executable, "-P", str(Path(__file__).resolve()), "--only-single", "--samples", str(args.samples)]
        environment = {**os.environ, "PYTHONPATH": str(place), "PYTHONSAFEPATH": "1"}
        done = subprocess.run(command, env=environment, cwd=place, capture_output=True, text=True, check=True)
        said = json.loads(done.stdout.splitlines()[-1])
        assert Path(said["package"]).is_relative_to(place), said
        found[name].append(said["samples_per_s"])
    middle = {name: statistics.median(values) for name, values in found.items()}
    return {
        "single turns": [
            {"checkout": name, "samples_per_s": round(middle[name]), "each": [round(one) for one in values]}
            for name, values in found.items()
        ],
        "this_over_other": round(middle["this"] / middle["other"], 4),
    }


async def concurrent(args: argparse.Namespace) -> dict[str, Any]:
    from astracli.envs.prompt_tokens import PromptTokens
    from astracli.envs.tool_env import ToolEnv
    from astracli.models.chat import ChatFormat

    class Slow(ToolEnv):
        """The calculator, and 100 ms besides."""

        async def answer(self, call: Any, problem: Problem) -> Any:
            result, _ = await asyncio.gather(super().answer(call, problem), asyncio.sleep(args.tool_ms / 1000))
            return result

    chosen = recipe("rollout.env=tools", 'env.tools=["calculator"]', f"env.max_turns={args.turns}")
    coder = load_tokenizer(Path(str(files("astracli") / "assets" / "tiny-tool")))
    no_grader: Any = None
    env = Slow(EnvSetup(chosen, coder, no_grader, PromptTokens(coder, ChatFormat())))
    call = '<tool_call>\n{"name": "calculator", "arguments": {"expression": "12*34*FILL"}}\n</tool_call>'
    least = len(coder(call.replace("*FILL", ""), add_special_tokens=False)["input_ids"])
    filled = call.replace("FILL", "1" * max(1, args.tokens - least - 2))
    turn = [*coder(filled, add_special_tokens=False)["input_ids"], coder.eos_token_id]
    last = [*coder("\\boxed{408}", add_special_tokens=False)["input_ids"], coder.eos_token_id]
    told = coder("<tool_response>", add_special_tokens=False)["input_ids"][0]
    padded = [*last[:-1], *[last[-2]] * (len(turn) - len(last)), last[-1]]
    gate: Any = Simulated(args.slots, args.token_ms / 1000, [*[turn] * (args.turns - 1), padded], told)
    await env.calls.call(env.found["calculator"].spec, {"expression": "1"})  # its processes are there
    began, cpu = time.perf_counter(), time.process_time()
    running, ended, share = args.episodes, 0, 0.0
    asked = {number: problem(number) for number in range(args.episodes // GROUP)}
    run = env.run

    async def counted(one: Problem, policy: Any) -> Episode:
        nonlocal ended, share
        episode = await run(one, policy)
        ended += 1
        if args.episodes - ended == args.slots:
            share = gate.share()
        return episode

    env.run = counted  # type: ignore[method-assign]
    found = await play(env, gate, RolloutSampling(chosen, (coder.eos_token_id,)), asked, lambda change: None)
    wall = time.perf_counter() - began
    episodes = [one for group in found.values() for one in group]
    env.close()
    assert all(isinstance(one, Episode) and one.parts["turns"] == args.turns for one in episodes), episodes[:1]
    assert not any(one.parts["tool_errors"] for one in episodes if isinstance(one, Episode))
    turns = running * args.turns
    return {
        "episodes": running,
        "turns": turns,
        "tokens a turn": len(turn),
        "slots": args.slots,
        "wall_s": round(wall, 2),
        "turns_per_s": round(turns / wall),
        "tool calls_per_s": round(running * (args.turns - 1) / wall),
        "slots busy": round(share, 3),
        "worker's CPU ms a turn": round(1000 * (time.process_time() - cpu) / turns, 2),
    }


def main() -> None:
    from shared import options, show

    parser = options(
        __doc__, beside={"": "another checkout"}, samples=4000, rounds=5, episodes=1000, turns=5, slots=256,
        token_ms=12.0, tokens=64, tool_ms=100.0, only_single=False,
    )  # fmt: skip
    args = parser.parse_args()
    if args.only_single:
        import astracli

        asyncio.run(single(400, 64))
        rate = asyncio.run(single(args.samples, 64))
        print(json.dumps({"samples_per_s": rate, "package": str(Path(astracli.__file__).resolve())}))
    elif args.beside:
        show(args, beside(args))
    else:
        show(args, asyncio.run(concurrent(args)))


if __name__ == "__main__":
    main()
