"""What is left between packed and separate rows in bf16, and where it comes from: kernels, order of sums, or the model.

    python bench/gpu_rows.py [--shape 4b] [--longest 4000] [--layers N] [--json]
    python bench/gpu_rows.py --shape tiny --longest 40 --tokens 64      on a CPU: what is printed there is fp32

Random weights in the product's trainer. The gradient of the mean log-probability of some rows packed into one, minus
the same computed another way, over its norm: the packed row once more; each row alone in the shape of the packed one;
each row alone in its own shape, as anybody would. Each in the order in which attention's kernel happens to add up, and
in one order (`varlen.one_order`). Then the parameters that most of the last but one's difference lies in (in the shape
of all, in one order: what a run's start-up check measures), and the largest difference of a token's log-probability.
"""

from __future__ import annotations

import argparse
import contextlib
import json
from collections.abc import Callable, Sequence
from typing import Any

import torch
from gpu_train import environment
from train_case import VARIANTS, build, groups, join, recipe, shape_config

from astracli import registry
from astracli.rl.batch import MicroBatch, Row, pad_rows
from astracli.training import packing, parity, varlen
from astracli.training.step import Trainer

Pass = tuple[MicroBatch, slice]
"""A micro-batch, and which of its loss tokens count"""


class Rows:
    """The same rows in every way to compute them."""

    def __init__(self, trainer: Trainer, rows: Sequence[Row], pad_token: int) -> None:
        self.trainer, self.rows = trainer, rows
        self.tokens = sum(row.loss_tokens for row in rows)
        self.packed: list[Pass] = [(packing.pack_rows(list(rows), pad_token), slice(None))]
        own = [(pad_rows([row], pad_token), slice(None)) for row in rows]
        shaped = [
            parity.in_the_shape_of_all(rows, i, join=packing.pack_rows, pad_token=pad_token) for i in range(len(rows))
        ]
        self.ways: dict[str, list[Pass]] = {"packed once more": self.packed, "in the shape of all": shaped}
        self.ways["in its own shape"] = own

    def _add(self, passes: Sequence[Pass], sign: int) -> None:
        trainer = self.trainer
        for micro, its in passes:
            logprob_N, _ = parity.logprobs(trainer.policy, trainer.adapter, micro, trainer.ranks.device)
            (sign * logprob_N[its].sum() / self.tokens).backward()

    def gradient(self, passes: Sequence[Pass]) -> tuple[float, dict[str, float]]:
        """(|packed - passes| / |packed|, share of its square in each kind of parameter), over all parameters."""
        grads, squares = self.trainer.masters.grads, self.trainer.ranks.squares
        self._add(self.packed, 1)
        whole = squares(grads.found().values())
        self._add(passes, -1)
        left = squares(grads.found().values())
        kinds: dict[str, float] = {}
        for name, gradient in grads.found().items():
            kind = ".".join(part for part in str(name).split(".")[-2:])
            kinds[kind] = kinds.get(kind, 0.0) + squares([gradient]) / left if left else 0.0
        grads.clear()
        return (left / whole) ** 0.5, kinds

    @torch.no_grad()
    def logprob(self, passes: Sequence[Pass]) -> float:
        """Largest |difference| of a loss token's log-probability."""
        trainer = self.trainer

        def of(some: Sequence[Pass]) -> torch.Tensor:
            parts = [
                parity.logprobs(trainer.policy, trainer.adapter, micro, trainer.ranks.device)[0][its]
                for micro, its in some
            ]
            return torch.cat(parts)

        return float((of(self.packed) - of(passes)).abs().max())


def measure(rows: Rows) -> dict[str, Any]:
    found: dict[str, Any] = {"lengths": [len(row) for row in rows.rows]}
    orders: dict[str, Callable[[], Any]] = {"any order": contextlib.nullcontext, "one order": varlen.one_order}
    rows.gradient(rows.packed)  # compiles and chooses kernels
    for way, passes in rows.ways.items():
        found[way] = {"logprob": rows.logprob(passes)}
        for order, inside in orders.items():
            with inside():
                found[way][order], kinds = rows.gradient(passes)
            if (way, order) == ("in the shape of all", "one order"):
                found["lies in"] = dict(sorted(kinds.items(), key=lambda item: -item[1])[:3])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--adapter", default="qwen3_5")
    parser.add_argument("--shape", default="4b", help="`tiny`, or the end of a model id that the adapter knows")
    parser.add_argument("--layers", type=int, help="as many of the shape's kind")
    parser.add_argument("--tokens", type=int, default=8192, help="of one micro-batch, at most")
    parser.add_argument("--longest", type=int, default=4000, help="longest completion, tokens")
    parser.add_argument("--variant", choices=VARIANTS, default="packed-full")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    ranks = join()
    adapter, variant = registry.get(args.adapter), VARIANTS[args.variant]
    config = shape_config(adapter, args.shape)
    if args.layers:
        config = {k: v for k, v in config.items() if k != "layer_types"} | {"num_hidden_layers": args.layers}
    chosen = recipe(variant, args.tokens, 4 if args.shape == "tiny" else 8)
    trainer = build(adapter, config, variant, chosen, ranks)
    sample = groups(args.tokens, args.longest, adapter.memory_shape(config).vocab_size, 0, chosen.rollout.group_size)
    rows = parity.spread(trainer._divide(sample, 0).rows, args.tokens)
    found = measure(Rows(trainer, rows, 0))
    if args.json:
        print(json.dumps({**found, "environment": environment(ranks.device)}))
    else:
        print("  ".join(f"{key} {value}" for key, value in environment(ranks.device).items()))
        print(f"rows of {', '.join(map(str, found['lengths']))} tokens")
        print(f"{'packed minus each row':24}{'any order':>12}{'one order':>12}{'log-probability':>18}")
        for way in ("packed once more", "in the shape of all", "in its own shape"):
            cells = found[way]
            print(f"{way:24}{cells['any order']:12.2e}{cells['one order']:12.2e}{cells['logprob']:18.2e}")
        print("of the second's square lie in " + ", ".join(f"{k} {v:.1%}" for k, v in found["lies in"].items()))
    ranks.close()


if __name__ == "__main__":
    main()
