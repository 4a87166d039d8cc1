"""Warm up a Qwen3.5 of 20.8 million parameters on worked arithmetic of several steps, for `qwen3.5-small-m2po-delta`.

    python scripts/make_small.py DIR [--steps 125] [--tokens 32768] [--shape small|proxy|tiny|4b]
    astra eval qwen3.5-small-m2po-delta --weights DIR

Supervised, from random weights, by `astra sft` with a changed `tiny-sft`. A share `--smoothing` of the targets is a
random token, so the model stays unsure of a way it knows: the chance of a whole solution at temperature 1 levels off
near (1 - smoothing)^tokens. That is the gap which reinforcement learning closes. DIR is the export; the run itself,
with its figures and checkpoints, is DIR-run.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Collection
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from make_tiny import CONTENT, build_config, build_tokenizer, learn, save
from transformers import PreTrainedTokenizerFast, Qwen3_5ForCausalLM, Qwen3_5TextConfig

from astracli.adapters.qwen3_5_sizes import TEXT_4B
from astracli.data import arithmetic

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
engine agrees with the trainer there, on a GPU of 140 GB (`--tokens 8192 --lr 1e-4 --steps 103`)."""
EXAMPLE, LONGEST = 67, 112
"""Tokens of a problem with its solution: on average, and more than the longest has."""
SEED = 11
"""Of problems and weights, not one of a recipe."""


@lru_cache
def vocabulary() -> PreTrainedTokenizerFast:
    return build_tokenizer([*CONTENT, "(", ")"])


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
    save(model, vocabulary(), folder)


def changes_of(args: argparse.Namespace, examples: int, longest: int) -> dict[str, Any]:
    """What a warm-up changes in `tiny-sft`: `examples` of a step, each of at most `longest` tokens."""
    on_gpu = torch.cuda.is_available() and not args.cpu
    return {
        "name": args.dir.name,
        "seed": args.seed,
        "train.steps": args.steps,
        "train.warmup_steps": args.steps // 25,
        "train.learning_rate": args.lr,
        "train.schedule": "linear",
        "train.final_lr_fraction": 0.1,
        "train.batch_groups": examples,
        "train.tokens_per_microbatch": args.tokens,
        "train.packing": args.packing,
        "rollout.max_new_tokens": longest // 2,
        "rollout.context_length": longest,
        "eval.every": 0,
        "checkpoint.every": max(1, args.steps // 4),
        "resources.device": "cuda" if on_gpu else "cpu",
        "resources.train_gpus": int(on_gpu),
        "resources.threads.trainer": args.threads,
    }


def options(doc: str | None, shapes: Collection[str], **defaults: Any) -> argparse.ArgumentParser:
    """The options of a warm-up."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dir", type=Path)
    parser.add_argument("--steps", type=int, default=defaults["steps"])
    parser.add_argument("--tokens", type=int, default=32768, help="of one step, about")
    parser.add_argument("--packing", choices=["auto", "packed", "padded"], default="auto", help="as in a recipe")
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--shape", choices=shapes, default=defaults["shape"])
    parser.add_argument("--seed", type=int, default=defaults["seed"])
    parser.add_argument("--cpu", action="store_true", help="also where there is a GPU")
    parser.add_argument("--threads", type=int, default=2, help="that compute, on a CPU")
    return parser


def main() -> None:
    parser = options(__doc__, SHAPES, steps=125, shape="small", seed=SEED)
    parser.add_argument("--smoothing", type=float, default=0.012)
    args = parser.parse_args()
    changes = changes_of(args, max(1, args.tokens // EXAMPLE), LONGEST)
    changes |= {"data.levels": list(arithmetic.STEP_LEVELS), "sft.label_smoothing": args.smoothing}
    with tempfile.TemporaryDirectory() as folder:
        build(args.shape, Path(folder) / "start", args.seed)
        learn(Path(folder) / "start", args.dir, changes, args.dir.with_name(f"{args.dir.name}-run"))


if __name__ == "__main__":
    main()
