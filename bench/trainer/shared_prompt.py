"""What forwarding a group's prompt once saves in a step of the trainer, and that it is exact.

    python bench/trainer/shared_prompt.py [--shape tiny] [--prompts 100 1000 4000] [--answers 256] [--json]
    python bench/trainer/shared_prompt.py --adapter qwen2 --shape coder-0.5b --tokens 32768 --groups 8     on a GPU
    python bench/trainer/shared_prompt.py --shape 4b --tokens 32768 --checkpointing full                   on a GPU

The product's trainer with random weights, one minibatch of `--groups` groups of `--group` samples a step, with
`train.share_prompts` false and true, in turns. A step is forward, backward and update; the first minibatch is measured
while it trains, so nothing is scored besides. `step_s` is the median of `--steps` after one that compiles kernels,
`cpu_s` its processor seconds (which other work on the machine does not change), `tokens_per_s` counts trained tokens,
`row_tokens` those that are computed. `saved` is 1 - shared / separate of `step_s`, on a CPU of `cpu_s`; `saved_tokens`
is the part of the tokens that is left out, which decides under `train.share_prompts = auto`.

Exactness: `logprob` and `gradient` are the check at the start of a run (rows that share prompts against each alone; on
a GPU in one shape, and `..._own` each in its own). `difference` is |gradient of the step, shared minus separate| over
the latter, of one and the same minibatch.

Shapes: `tiny` (the adapter's), `small` and `dense` (20 M parameters, made for a CPU), or the end of a model id that the
adapter knows.
"""

from __future__ import annotations

import statistics
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from shared import GIB, options, say, show

from astracli.models import registry
from astracli.rl.types import Group, Sample, Segment
from astracli.training.fsdp import Ranks
from astracli.training.scoring import Work
from astracli.training.step import Trainer
from astracli.training.sums import Timer
from trainer.case import Variant, build, join, recipe, settle, shape_config

HYBRID = {
    "hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 8, "num_attention_heads": 8,
    "num_key_value_heads": 2, "head_dim": 64, "linear_num_key_heads": 2, "linear_num_value_heads": 4,
    "linear_key_head_dim": 128, "linear_value_head_dim": 128, "vocab_size": 512,
}  # fmt: skip
DENSE = {
    "vocab_size": 512, "hidden_size": 448, "intermediate_size": 1536, "num_hidden_layers": 8,
    "num_attention_heads": 8, "num_key_value_heads": 2,
}  # fmt: skip


def config_of(args: Any) -> dict[str, Any]:
    adapter = registry.get(args.adapter)
    if args.shape not in ("small", "dense"):
        return shape_config(adapter, args.shape)
    assert adapter.tiny_config is not None
    return adapter.tiny_config() | (HYBRID if args.shape == "small" else DENSE)


def drawn(args: Any, prompt: int, step: int, vocabulary: int) -> list[Group]:
    """Groups of random tokens; answers have half to all of `--answers`, three quarters on average."""
    draw, result = np.random.default_rng(step), []
    for place in range(args.groups):
        tokens = draw.integers(2, vocabulary, prompt).astype(np.int32)
        samples = []
        for s in range(args.group):
            answer = draw.integers(2, vocabulary, int(draw.integers(args.answers // 2, args.answers + 1)))
            segment = Segment(step, answer.astype(np.int32), np.full(len(answer), -4.0, np.float32))
            samples.append(Sample(s, [segment], "stop", float(s % 2), "right" if s % 2 else "wrong"))
        result.append(Group(place, f"p{place}", tokens, samples, "?", "!"))
    return result


def trainers_of(args: Any, config: dict[str, Any], prompt: int, ranks: Ranks) -> dict[bool, Trainer]:
    """One that shares prompts and one that does not, of the same weights and optimizer."""
    variant = Variant(args.checkpointing, packing="auto")
    chosen = recipe(variant, args.tokens, args.group, "grpo")  # its limits need no scoring pass
    table = {"share_prompts": True, "tokens_per_microbatch": max(args.tokens, prompt + args.answers)}
    rollout = {"context_length": prompt + args.answers, "max_new_tokens": args.answers}
    update = {
        "train": chosen.train.model_copy(update=table),
        "rollout": chosen.rollout.model_copy(update=rollout),
    }
    shares = build(registry.get(args.adapter), config, variant, chosen.model_copy(update=update), ranks)
    return {False: replace(shares, share_above=1.0), True: shares}


def gradient(trainer: Trainer, groups: list[Group], step: int) -> dict[str, torch.Tensor]:
    """fp32, of one step's only minibatch."""
    batch = trainer.divide(groups, step)
    trainer.switch(packed=trainer.shares(batch))
    work = Work(batch, step, Timer(trainer.ranks.device))
    work.first_measured = True
    work.limits = trainer.algorithm.prepare(torch.zeros(0), torch.zeros(0), trainer.recipe.algorithm.own)
    found: dict[str, torch.Tensor] = {}

    def keep(_: int) -> float:
        found.update({name: grad.clone() for name, grad in trainer.masters.grads.found().items()})
        trainer.masters.grads.clear()
        return 0.0

    update, trainer.masters.update = trainer.masters.update, keep  # type: ignore[method-assign]
    try:
        trainer.minibatch(work, 0, step)
    finally:
        trainer.masters.update = update  # type: ignore[method-assign]
    return found


def apart(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    squares = sum(float((one[name].double() - grad.double()).square().sum()) for name, grad in other.items())
    return float((squares / sum(float(grad.double().square().sum()) for grad in other.values())) ** 0.5)


def step_of(trainer: Trainer, groups: list[Group], step: int) -> dict[str, float]:
    device = trainer.ranks.device
    settle(device)
    began, cpu = time.perf_counter(), time.process_time()
    metrics = trainer.train(groups, step, step).metrics
    settle(device)
    return metrics | {"step_s": time.perf_counter() - began, "cpu_s": time.process_time() - cpu}


def measure(args: Any, config: dict[str, Any], prompt: int, ranks: Ranks) -> dict[str, Any]:
    on_gpu, vocabulary = ranks.device.type == "cuda", config["vocab_size"]
    trainers = trainers_of(args, config, prompt, ranks)
    checks = {share: step_of(one, drawn(args, prompt, 0, vocabulary), 0) for share, one in trainers.items()}
    found: dict[bool, list[dict[str, float]]] = {False: [], True: []}
    peak: dict[bool, float] = {}
    for step in range(1, 2 + args.steps):
        for share in (False, True) if step % 2 else (True, False):
            if on_gpu:
                torch.cuda.reset_peak_memory_stats()
            took = step_of(trainers[share], drawn(args, prompt, step, vocabulary), step)
            peak[share] = torch.cuda.max_memory_allocated() / GIB if on_gpu else 0.0
            if step > 1:
                found[share].append(took)
    groups = drawn(args, prompt, 99, vocabulary)
    separate, shared = (gradient(trainers[share], groups, 0) for share in (False, True))
    row: dict[str, Any] = {"shape": args.shape, "prompt": prompt, "answers": args.answers, "group": args.group}
    for share, name in ((False, "separate"), (True, "shared")):
        for figure in ("step_s", "cpu_s"):
            row[f"{name}_{figure}"] = statistics.median(one[figure] for one in found[share])
        tokens = statistics.median(one["tokens"] for one in found[share])
        row[f"{name}_tokens_per_s"] = tokens / row[f"{name}_step_s"]
        row[f"{name}_row_tokens"] = statistics.median(one["row_tokens"] for one in found[share])
        row[f"{name}_microbatches"] = found[share][-1]["microbatches"]
        if on_gpu:
            row[f"{name}_peak_gib"] = peak[share]
    figure = "step_s" if on_gpu else "cpu_s"
    row["saved"] = 1 - row[f"shared_{figure}"] / row[f"separate_{figure}"]
    row["saved_tokens"] = 1 - row["shared_row_tokens"] / row["separate_row_tokens"]
    names = {
        "logprob": "rows_max_abs", "logprob_own": "rows_own_shape_max_abs", "gradient": "rows_gradient_error",
        "gradient_own": "rows_gradient_own_shape", "gradient_noise": "rows_gradient_noise",
    }  # fmt: skip
    row |= {said: checks[True][name] for said, name in names.items() if name in checks[True]}
    row["difference"] = apart(shared, separate)
    say(row)
    return row


def main() -> None:
    parser = options(
        __doc__, adapter="qwen3_5", shape="tiny", prompts=[100, 1000, 4000], answers=256, group=8, groups=2,
        tokens={16384: "of one micro-batch"}, steps={3: "timed, after two that are not"},
        checkpointing=("none", "selective", "full"),
    )  # fmt: skip
    args = parser.parse_args()
    ranks, config = join(), config_of(args)
    if ranks.device.type == "cpu":
        torch.set_num_threads(1)
    show(args, {"rows": [measure(args, config, prompt, ranks) for prompt in args.prompts]})
    ranks.close()


if __name__ == "__main__":
    main()
