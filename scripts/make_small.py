"""Warm up a Qwen3.5 of 20.8 million parameters on worked arithmetic of several steps, for `qwen3.5-small-m2po-delta`.

    python scripts/make_small.py DIR [--seconds 75] [--stop-at 0.45] [--tokens 32768] [--shape small|proxy|tiny|4b]

Supervised, from random weights, with the product's own trainer: fp32 masters; packed rows, bf16 and fla's kernels on a
GPU, padded rows and fp32 on a CPU. A share `--smoothing` of the targets is a random token, so the model stays unsure of
a way it knows: the chance of a whole solution at temperature 1 levels off near (1 - smoothing)^tokens. That is the gap
which reinforcement learning closes. `worked` in the metrics is that chance, averaged over the held-out problems: the
product of the probabilities of the worked solution's tokens (another way to a right answer does not count, so sampling
scores a little more); `surely` is the share of problems in which every one of them is over one half, which greedy
decoding solves.
The clock of `--seconds` starts after the first step, which compiles kernels. DIR is a whole checkpoint after every
measurement, with DIR/warm_up.jsonl beside the weights; a run that is cut off leaves the last one.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import random
import tempfile
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from make_tiny import CONTENT, EOS, PAD, UNK, build_config, build_tokenizer, save
from transformers import Qwen3_5ForCausalLM, Qwen3_5TextConfig

from astracli.adapters.qwen3_5_sizes import TEXT_4B
from astracli.config.recipe import Recipe
from astracli.data import arithmetic
from astracli.kernels import varlen
from astracli.models import registry
from astracli.models.adapter import chat_prompt_tokens
from astracli.training import fsdp, packing
from astracli.training.export import export
from astracli.training.setup import build_trainer
from astracli.training.step import Trainer

SHAPES: dict[str, dict[str, Any]] = {
    "small": {
        "hidden_size": 512,
        "intermediate_size": 1024,
        "num_hidden_layers": 8,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_key_head_dim": 128,
        "linear_value_head_dim": 128,
        "rope": [4, 2, 2],
    },
    "proxy": {},
    "tiny": {"hidden_size": 32, "intermediate_size": 64},
    "4b": TEXT_4B | {"linear_key_head_dim": 128, "linear_value_head_dim": 128, "rope": [11, 11, 10]},
}
"""What differs from the shipped tiny model; `proxy` is its size, `4b` that of the published one: to see whether an
engine agrees with the trainer there, on a GPU of 140 GB (`--tokens 8192 --lr 1e-4 --every 999 --seconds 60`)."""
SCALE = 100_000
"""Places of the learning rate's schedule, which runs over time and not over steps."""
SEED = 11
"""Of the problems, not one of a recipe."""


@dataclass
class Packed:
    """Solved problems in one packed row."""

    tokens_1T: np.ndarray
    bounds_S1: np.ndarray
    predict_N: np.ndarray
    target_N: np.ndarray
    owner_N: np.ndarray
    """The number of the problem that a loss token belongs to."""


@lru_cache
def vocabulary() -> tuple[Any, dict[str, int]]:
    tokenizer = build_tokenizer([*CONTENT, "(", ")"])
    return tokenizer, tokenizer.get_vocab()


def encode(text: str) -> list[int]:
    """What the tokenizer gives, without its cost."""
    ids = vocabulary()[1]
    head, box, tail = text.partition("\\boxed{")
    return [*map(ids.__getitem__, head), *([ids[box]] if box else ()), *map(ids.__getitem__, tail)]


Solved = tuple[list[int], list[int]]
"""Token ids of a prompt and of its solution."""


def solved(problem: Any) -> Solved:
    return encode(problem.question + "="), [*encode(arithmetic.worked_text(problem.question)), EOS]


def pack(rows: Sequence[Solved]) -> Packed:
    """All of them in one row; the solutions' tokens are predicted."""
    tokens, bounds, predict, target, owner = [], [0], [], [], []
    for number, (prompt, solution) in enumerate(rows):
        first = bounds[-1] + len(prompt) - 1
        predict += range(first, first + len(solution))
        target += solution
        owner += [number] * len(solution)
        tokens += prompt + solution
        bounds.append(len(tokens))
    arrays = (np.asarray(x, np.int64) for x in (bounds, predict, target, owner))
    return Packed(np.asarray(tokens, np.int64)[None], *arrays)


def draw(step: int, tokens: int, smoothing: float) -> Packed:
    """About `tokens` tokens of training problems; a share of the targets, but of no input, is a random token."""
    rng = random.Random(step)
    drawn, count = [], 0
    while count < tokens - 80:
        problem = arithmetic.draw(rng.randrange(2**62), SEED, arithmetic.STEP_LEVELS)
        drawn.append(problem)
        count += len(problem.question) + len(arithmetic.worked_text(problem.question)) - 4
    row = pack([solved(problem) for problem in drawn])
    noise = np.random.default_rng(step)
    hit = noise.random(len(row.target_N)) < smoothing
    support = np.array([EOS, *range(UNK + 1, UNK + 3 + len(CONTENT))])
    row.target_N = np.where(hit, noise.choice(support, len(hit)), row.target_N)
    return row


def batches(args: argparse.Namespace) -> Iterator[Packed]:
    """Rows in order, drawn ahead by other processes where there are some."""
    if args.workers == 0:
        for step in range(2**31):
            yield draw(step, args.tokens, args.smoothing)
    with multiprocessing.get_context("fork").Pool(args.workers) as pool:
        ahead = deque(pool.apply_async(draw, (s, args.tokens, args.smoothing)) for s in range(4 * args.workers))
        step = len(ahead)
        while True:
            yield ahead.popleft().get()
            ahead.append(pool.apply_async(draw, (step, args.tokens, args.smoothing)))
            step += 1


def build(shape: str, folder: Path, seed: int) -> None:
    """A checkpoint of random weights, with its tokenizer, as SGLang serves it."""
    own = dict(SHAPES[shape])
    rope = own.pop("rope", None)
    document = build_config().to_dict() | own | {"layer_types": None}
    if rope:
        document["rope_parameters"] = document["rope_parameters"] | {"mrope_section": rope}
    torch.manual_seed(seed)
    large = shape == "4b" and torch.cuda.is_available()  # a CPU draws as many numbers for minutes
    with torch.device("cuda" if large else "cpu"):
        model = Qwen3_5ForCausalLM(Qwen3_5TextConfig.from_dict(document))
    save(model, vocabulary()[0], folder)


def trainer_of(folder: Path, args: argparse.Namespace) -> Trainer:
    table = {
        "steps": SCALE,
        "warmup_steps": SCALE // 25,
        "learning_rate": args.lr,
        "schedule": "linear",
        "final_lr_fraction": 0.1,
        "betas": [0.9, 0.98],
        "packing": args.packing,
        "tokens_per_microbatch": args.tokens,
    }
    recipe = Recipe.model_validate({"model": {"path": str(folder)}, "data": {"source": "arithmetic"}, "train": table})
    ranks = fsdp.join("cuda" if torch.cuda.is_available() and not args.cpu else "cpu")
    return build_trainer(folder, registry.get("qwen3_5"), recipe, ranks, attention="sdpa")


def logprobs(trainer: Trainer, row: Packed) -> torch.Tensor:
    """fp32 [N]"""
    device = trainer.ranks.device
    tokens, bounds, predict = row.tokens_1T, row.bounds_S1, row.predict_N
    options: dict[str, Any] = {}
    positions = None
    if trainer.packed:
        if device.type == "cuda" and (more := -tokens.shape[1] % packing.GPU_LENGTHS):
            tokens, bounds = np.pad(tokens, ((0, 0), (0, more))), np.append(bounds, tokens.shape[1] + more)
        positions = torch.from_numpy(packing.positions(bounds)[None]).to(device)
        options = varlen.boundaries(bounds, device)
    else:
        tokens, predict = padded(row)
    given, *chosen = (torch.from_numpy(x).to(device) for x in (tokens, predict, row.target_N))
    logprob_N, _ = trainer.policy(given, None, positions, *chosen, **options)
    return logprob_N


def padded(row: Packed) -> tuple[np.ndarray, np.ndarray]:
    """(tokens [B, L], flat places of the loss tokens' predictions): one problem a row, padded on the right."""
    lengths = np.diff(row.bounds_S1)
    tokens_BL = np.full((len(lengths), lengths.max()), PAD, np.int64)
    tokens_BL[np.arange(lengths.max()) < lengths[:, None]] = row.tokens_1T[0]
    return tokens_BL, row.predict_N - row.bounds_S1[row.owner_N] + row.owner_N * lengths.max()


@torch.no_grad()
def measure(trainer: Trainer, rows: Sequence[Packed]) -> dict[str, float]:
    """The two chances of the held-out problems, see above."""
    worked, surely = [], []
    for row in rows:
        logprob_N = logprobs(trainer, row).double().cpu().numpy()
        count = len(row.bounds_S1) - 1
        total, least = np.zeros(count), np.full(count, np.inf)
        np.add.at(total, row.owner_N, logprob_N)
        np.minimum.at(least, row.owner_N, logprob_N)
        worked += list(np.exp(total))
        surely += list(least > np.log(0.5))
    return {"worked": float(np.mean(worked)), "surely": float(np.mean(surely))}


def keep(trainer: Trainer, start: Path, args: argparse.Namespace, records: list[dict[str, float]]) -> None:
    export(args.dir, start, trainer.masters.wire_full(), trainer.adapter)
    (args.dir / "warm_up.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))


def warm_up(trainer: Trainer, start: Path, source: Iterator[Packed], args: argparse.Namespace) -> None:
    held_out = arithmetic.held_out(levels=arithmetic.STEP_LEVELS)[: args.items]
    assert all(encode(p.question + "=") == chat_prompt_tokens(vocabulary()[0], p.question) for p in held_out[:8])
    size = max(1, min(len(held_out), args.tokens // 100))
    rows = [pack([solved(problem) for problem in held_out[i : i + size]]) for i in range(0, len(held_out), size)]
    records: list[dict[str, float]] = []
    began = clock = time.monotonic()
    measured = -float("inf") if args.every < args.seconds else began
    tokens, recent = 0, deque(maxlen=20)
    for step, row in enumerate(source):
        progress = 0.0 if step == 0 else (time.monotonic() - clock) / args.seconds
        loss = -logprobs(trainer, row).mean()
        loss.backward()
        trainer.masters.update(min(SCALE - 1, int(progress * SCALE)))
        recent.append(float(loss.detach()))
        tokens += row.tokens_1T.shape[1]
        now = time.monotonic()
        if step == 0:
            print(f"first step after {now - began:.1f} s", flush=True)
            clock, tokens = now, 0
        last = now - clock >= args.seconds or step + 1 == args.steps
        if last or now - measured >= args.every:
            figures = {"step": step + 1, "seconds": now - clock, "tokens": tokens, "loss": float(np.mean(recent))}
            records.append(figures | measure(trainer, rows))
            keep(trainer, start, args, records)
            measured = time.monotonic()
            print("  ".join(f"{k} {v:.3f}" if isinstance(v, float) else f"{k} {v}" for k, v in records[-1].items()),
                  flush=True)  # fmt: skip
            last = last or records[-1]["worked"] >= args.stop_at
        if last:
            return


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dir", type=Path)
    parser.add_argument("--seconds", type=float, default=75.0)
    parser.add_argument("--steps", type=int, help="at most")
    parser.add_argument("--every", type=float, default=5.0, help="seconds between two measurements")
    parser.add_argument("--stop-at", type=float, default=0.45, help="end when `worked` is so high")
    parser.add_argument("--smoothing", type=float, default=0.012)
    parser.add_argument("--tokens", type=int, default=32768, help="of one step")
    parser.add_argument("--packing", choices=["auto", "packed", "padded"], default="auto", help="as in a recipe")
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--shape", choices=SHAPES, default="small")
    parser.add_argument("--items", type=int, default=256, help="held-out problems to measure, at most 256")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cpu", action="store_true", help="also where there is a GPU")
    cores = os.cpu_count() or 1
    parser.add_argument("--workers", type=int, default=min(8, cores - 2) if cores > 4 else 0, help="that draw problems")
    args = parser.parse_args()
    source = batches(args)
    first = next(source)  # other processes are forked before anything starts threads

    def all_of() -> Iterator[Packed]:
        yield first
        yield from source

    args.dir.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=args.dir.parent) as folder:
        start = Path(folder) / "start"
        build(args.shape, start, args.seed)
        trainer = trainer_of(start, args)
        print(f"{sum(p.numel() for p in trainer.policy.parameters()):,} parameters", flush=True)
        warm_up(trainer, start, all_of(), args)
        trainer.ranks.close()


if __name__ == "__main__":
    main()
