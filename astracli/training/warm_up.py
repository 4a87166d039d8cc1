"""Made-up rows of the real shapes through a trainer, before its first batch: kernels are compiled and tuned meanwhile.

Compiling and tuning took most of the first step of a 4B model on a machine with cold caches (docs/benchmarks.md). The
engines start at the same time, and the first batch comes later still. Weights, optimizer, gradients and random states
are the same afterwards, so a run that was warmed up trains what one does that was not.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import numpy as np
import torch

from astracli.rl.batch import MicroBatch, pad_rows
from astracli.rl.rows import Row
from astracli.rl.types import Group, Sample, Segment
from astracli.training import packing, shared_prompts
from astracli.training.fsdp import free_gathered

if TYPE_CHECKING:
    from astracli.training.step import Trainer

STEP = 1024
"""Tokens between two lengths of a row: fla compiles its convolution for every thousand tokens."""
SHORTEST = 0.5
"""Of the budget of a micro-batch. Rows of a minibatch are nearly equally long, so one is seldom shorter."""
PROMPT = 16
SHORT = 24
"""Tokens of a sample."""


def lengths(budget: int, context: int, packed: bool) -> list[int]:
    """Lengths of the rows that are computed, the longest first: packed rows up to the budget of a micro-batch, padded
    ones up to the longest sample."""
    longest = budget if packed else min(budget, context)
    shortest = max(STEP, int(SHORTEST * longest))
    return [longest, *range((longest - 1) // STEP * STEP, shortest - 1, -STEP)]


def sizes(length: int, longest: int) -> list[int]:
    """Lengths of samples that add up to `length` (2 or more), none over `longest`: each half of what is left."""
    result, left = [], length
    while left:
        size = min(longest, left if left < 2 * SHORT else left // 2)
        if 0 < left - size < SHORT:  # no rest that is too short for a sample
            size = left if left <= longest else max(2, left - SHORT, left - longest)
        result.append(size)
        left -= size
    return result


def rows_of(lengths: Sequence[int], vocabulary: int) -> list[Row]:
    """Samples of random tokens, with these lengths."""
    draw, result = np.random.default_rng(0), []
    for index, size in enumerate(lengths):
        tokens = draw.integers(0, vocabulary, size).astype(np.int32)
        begin = min(PROMPT, size - 1)
        logprobs = np.full(size - begin, -np.log(vocabulary), np.float32)
        sample = Sample(0, [Segment(0, tokens[begin:], logprobs)], "stop")
        result.append(Row(index, Group(index, "made up", tokens[:begin], [sample], "", ""), sample, 1.0))
    return result


def sharing(budget: int, context: int, vocabulary: int) -> list[Row]:
    """Two groups of two samples, as long as the context and a packed row of `budget` tokens allow."""
    draw, rows = np.random.default_rng(1), list[Row]()
    begin = max(2, min(PROMPT, context // 2))
    behind = max(1, min(context - begin, budget // 4 - begin))
    for place in range(2):
        prompt = draw.integers(0, vocabulary, begin).astype(np.int32)
        logprobs = np.full(behind, -np.log(vocabulary), np.float32)
        drawn = [draw.integers(0, vocabulary, behind).astype(np.int32) for _ in range(2)]
        samples = [Sample(index, [Segment(0, tokens, logprobs)], "stop") for index, tokens in enumerate(drawn)]
        group = Group(place, "made up", prompt, samples, "", "")
        rows += [Row(len(rows) + index, group, sample, 1.0) for index, sample in enumerate(samples)]
    return rows


def warm_up(trainer: Trainer, waiting: Callable[[str | None], None]) -> float:
    """Compute made-up rows; seconds. A collective. `waiting` is told what is compiled."""
    began, recipe, device = time.perf_counter(), trainer.recipe, trainer.ranks.device
    budget, context = recipe.train.tokens_per_microbatch, recipe.rollout.context_length
    every, vocabulary = lengths(budget, context, trainer.packed), trainer.policy.vocabulary
    with _same_state(device):
        for number, length in enumerate(every, 1):
            waiting(f"the compiler: kernels for rows of {length} tokens ({number} of {len(every)} lengths)")
            if trainer.packed:
                micro = packing.pack_rows(rows_of(sizes(length, context), vocabulary))
            else:
                micro = pad_rows(rows_of([length] * max(1, budget // length), vocabulary), trainer.pad_token)
            _passes(trainer, micro)
        if trainer.share_above is not None:
            waiting("the compiler: kernels for rows that share prompts")
            trainer.switch(packed=True)
            _passes(trainer, shared_prompts.pack(sharing(budget, context, vocabulary)))
            trainer.switch(packed=False)
        waiting("the compiler: kernels for the check of rows")
        rows = rows_of(sizes(min(budget, context), context), vocabulary)
        trainer.row_check.logprob_figures(rows, in_bf16=device.type != "cpu")
        trainer.row_check.gradient_figures(rows, in_bf16=device.type != "cpu")
        smallest = min(trainer.masters.values, key=lambda name: trainer.masters.values[name].numel())
        with trainer.masters.split_masters.whole([smallest]):
            pass  # joins and splits it again: the same bits
    trainer.masters.grads.clear()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    waiting(None)
    return time.perf_counter() - began


def _passes(trainer: Trainer, micro: MicroBatch) -> None:
    """What a step does with a micro-batch: scoring by policy and reference, forward and backward."""
    with torch.no_grad():
        trainer.row_check.logprobs(micro)
        if trainer.reference is not None and trainer.reference_offload is None:
            trainer.forward(trainer.reference, micro)
            free_gathered(trainer.reference)
    logprob_N = trainer.row_check.logprobs(micro)
    (logprob_N.sum() / len(micro.target_N)).backward()
    free_gathered(trainer.policy)
    trainer.masters.grads.clear()


@contextmanager
def _same_state(device: torch.device) -> Iterator[None]:
    """Random states are those from before, afterwards."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        yield
