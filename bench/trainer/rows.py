"""What is left between packed and separate rows in bf16, and where it comes from: kernels, order of sums, or the model.

    python bench/trainer/rows.py [--shape 4b] [--lengths 370 3014] [--layers N] [--json]
    python bench/trainer/rows.py --shape tiny --lengths 7 30      on a CPU, where it is all fp32

Random weights in the product's trainer. The gradient of the mean log-probability of some rows packed into one, minus
the same computed another way, over its norm: the packed row once more; each row alone in the shape of the packed one;
each row alone in its own shape, as anybody would. Each in the order in which attention's kernel happens to add up, and
in one order (`varlen.one_order`); with the largest difference of a token's log-probability. Last the kinds of
parameters that hold most of the squared difference of `in the shape of all` in one order, which is what a run checks.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from astracli.kernels import varlen
from astracli.models import registry
from astracli.rl.batch import pad_rows
from astracli.rl.rows import Row
from astracli.rl.types import Group, Sample, Segment
from astracli.training import packing, parity
from astracli.training.parity import Pass
from astracli.training.step import Trainer

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from shared import options, show

from trainer.case import VARIANTS, build, join, recipe, shape_config


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
            (sign * trainer.row_check.logprobs(micro)[its].sum() / self.tokens).backward()

    def gradient(self, passes: Sequence[Pass]) -> tuple[float, dict[str, float]]:
        """(|packed - passes| / |packed|, share of its square in each kind of parameter), over all parameters."""
        grads, squares = self.trainer.masters.grads, self.trainer.ranks.squares
        self._add(self.packed, 1)
        whole = squares(grads.found().values())
        self._add(passes, -1)
        left = squares(grads.found().values())
        kinds: dict[str, float] = {}
        for name, gradient in grads.found().items():
            kind = ".".join(name.split(".")[-2:])
            kinds[kind] = kinds.get(kind, 0.0) + squares([gradient]) / left if left else 0.0
        grads.clear()
        return (left / whole) ** 0.5, kinds

    @torch.no_grad()
    def logprob(self, passes: Sequence[Pass]) -> float:
        """Largest |difference| of a loss token's log-probability."""

        def of(some: Sequence[Pass]) -> torch.Tensor:
            return torch.cat([self.trainer.row_check.logprobs(micro)[its] for micro, its in some])

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


def drawn(lengths: Sequence[int], vocabulary: int) -> Group:
    """Samples of random tokens, with one prompt half as long as the shortest."""
    draw = np.random.default_rng(0)
    prompt = draw.integers(2, vocabulary, min(lengths) // 2).astype(np.int32)
    samples = []
    for index, length in enumerate(lengths):
        completion = draw.integers(2, vocabulary, length - len(prompt)).astype(np.int32)
        segment = Segment(0, completion, np.zeros(len(completion), np.float32))
        samples.append(Sample(index, [segment], "stop", float(index % 2), "right" if index % 2 else "wrong"))
    return Group(0, "p0", prompt, samples, problem="?", answer="!")


def main() -> None:
    packed = (
        "packed-full",
        *(n for n, variant in VARIANTS.items() if variant.packing == "packed" and n != "packed-full"),
    )
    parser = options(
        __doc__, adapter="qwen3_5", shape={"4b": "`tiny`, or the end of a known model id"},
        layers={int: "as many of the shape's kind"}, variant=packed,
    )  # fmt: skip
    parser.add_argument("--lengths", type=int, nargs="+", default=[370, 3014], help="tokens of two or more rows")
    args = parser.parse_args()
    if len(args.lengths) < 2 or min(args.lengths) < 4:
        parser.error(f"--lengths {' '.join(map(str, args.lengths))}: two rows or more, of 4 tokens or more")
    ranks = join()
    adapter, variant = registry.get(args.adapter), VARIANTS[args.variant]
    config = shape_config(adapter, args.shape)
    if args.layers:
        config = {k: v for k, v in config.items() if k != "layer_types"} | {"num_hidden_layers": args.layers}
    trainer = build(adapter, config, variant, recipe(variant, sum(args.lengths), len(args.lengths)), ranks)
    group = drawn(args.lengths, adapter.memory_shape(config).vocab_size)
    show(args, measure(Rows(trainer, trainer.divide([group], 0).rows, 0)))
    ranks.close()


if __name__ == "__main__":
    main()
