"""How fast the trainer is: tokens/s, MFU and peak memory of one optimizer step, its variants side by side.

    python bench/trainer/speed.py [--shape 4b] [--tokens 8192] [--micro-batches 4] [--steps 3] [--variants ...] [--json]
    python bench/trainer/speed.py --gpu-gib 79.6             as the plan places it on a smaller GPU, held to its memory
    python bench/trainer/speed.py --wrapped                   FSDP2 on one GPU too: what it costs
    python bench/trainer/speed.py --profile packed-selective  the kernels that take the time
    python bench/trainer/speed.py --shape tiny                    on a CPU

The trainer is the product's own (`training/setup.py`, `Trainer.train`), with random weights drawn on the GPU; a step
is one minibatch of samples of mixed lengths (prompts of 64 to 512 tokens, completions of 128 to 4000, log-uniform), cut
into micro-batches of at most `--tokens`. Timed are the forward and backward passes and the AdamW update, after a
step that measures the packed rows against separate ones and one over each timed batch, which compile kernels
(`gradient_error` in one shape, `gradient_own` each in its own; `gradient_noise` is what a unit in bf16's last place at
every block does, measured where the latter is over 1 %). MFU counts the adapter's FLOPs per token (matrix products;
the output head for completion tokens alone, which is where it is computed; no recomputation, padding, attention or
delta rule) against the dense bf16 peak of the GPU's name. `planned_gib` is what the launch plan counts for this trainer
without its CUDA context and holes, to be held against `peak_gib` (what torch allocated; `reserved_gib` with the holes).
The plan counts a micro-batch of `--tokens`; `fullest` is the most that one of a timed step had on this rank.
`moments-on-host` is packed-full with AdamW's moments in pinned memory; with `--gpu-gib` each variant has as many there
as the plan says (`on_host`), and torch may take no more than that GPU has beside its CUDA context.
Every row goes to stderr as soon as it is known; what does not fit in `--limit-s` is said.
"""

from __future__ import annotations

import gc
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from astracli.machine.memory import Component
from astracli.models.adapter import MemoryShape
from astracli.plan import cost as plan_speed
from astracli.plan import trainer as plan_trainer
from astracli.plan.cost import TrainerLoad
from astracli.plan.placement import Gpus, place
from astracli.process.layout import Split
from astracli.rl.types import Group
from astracli.training import fsdp
from astracli.training.step import Trainer
from astracli.training.supervised import train_on_examples

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from shared import GIB, machine, say, show

from trainer.case import VARIANTS, Case, case_options, settle


def timed_step(trainer: Trainer, sample: list[Group], step: int) -> tuple[float, int, int, dict[str, float]]:
    """(seconds of forward, backward and update; tokens that are no padding; completion tokens; the step's metrics)"""
    device = trainer.ranks.device
    settle(device)
    began = time.perf_counter()
    if trainer.recipe.sft is None:
        result = trainer.train(sample, step, step)
    else:
        result = train_on_examples(trainer, sample, step, None)
    settle(device)
    seconds = time.perf_counter() - began
    return seconds - scoring(result.metrics), sum(map(len, result.batch.rows)), result.batch.loss_tokens, result.metrics


def measure(
    trainer: Trainer,
    draw: Callable[[int], list[Group]],
    steps: int,
    shape: MemoryShape,
    peak: float | None,
    split: Split,
) -> dict[str, Any]:
    device = trainer.ranks.device
    began = time.perf_counter()
    first = timed_step(trainer, draw(0), 0)[3]
    for step in range(2, 2 + steps):  # the batches that are timed below: kernels are compiled by row length
        timed_step(trainer, draw(step), step)
    warm = time.perf_counter() - began
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    head = 6.0 * shape.vocab_size * shape.hidden_size
    rates, used, micros, fullest = [], [], 0, 0
    for step in range(2, 2 + steps):
        sample = draw(step)
        seconds, tokens, completion, metrics = timed_step(trainer, sample, step)
        rates.append(tokens / seconds)
        used.append((tokens * shape.flops_per_token - (tokens - completion) * head) / seconds)
        divided = [micro for minibatch in trainer.divide(sample, step).minibatches for micro in minibatch]
        micros, fullest = len(divided), max(fullest, *(int(micro.tokens_BL.size) for micro in divided))
    rate = statistics.median(rates)
    on_gpu = device.type == "cuda"
    # what FSDP2 on one rank holds is planned for nobody
    counted = on_gpu and (trainer.ranks.mesh is None or trainer.ranks.world_size > 1)
    return {
        "tokens_per_s": rate, "micro_batches": micros, "tflops": statistics.median(used) / 1e12,
        "mfu": statistics.median(used) / (peak * 1e12) if peak else None,
        "peak_gib": torch.cuda.max_memory_allocated(device) / GIB if on_gpu else None,
        "reserved_gib": torch.cuda.max_memory_reserved(device) / GIB if on_gpu else None,
        "planned_gib": planned(trainer, shape, split) / GIB if counted else None, "fullest": fullest,
        "on_host": split.moments_on_host, "gradient_error": first.get("rows_gradient_error"),
        "gradient_own": first.get("rows_gradient_own_shape"), "gradient_noise": first.get("rows_gradient_noise"),
        "warm_up_s": warm, "grad_norm": metrics["grad_norm"],
    }  # fmt: skip


def planned(trainer: Trainer, shape: MemoryShape, split: Split) -> int:
    """Bytes that the launch plan counts on the GPU, without what torch does not allocate and the holes of its cache."""
    load = TrainerLoad(trainer.recipe, shape, trainer.ranks.world_size)
    rows = plan_trainer.trainer_rows("trainer", load, "cuda", split)
    outside = (Component.CUDA_CONTEXT, Component.CACHE_HOLES)
    return sum(row.bytes for row in rows if row.where == "gpu" and row.component not in outside)


def profile(trainer: Trainer, draw: Callable[[int], list[Group]]) -> str:
    """What ran during one step, by its own time; on a GPU its kernels, and how long it ran none at all."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as profiler

    for step in range(2):
        timed_step(trainer, draw(step), step)
    on_gpu = trainer.ranks.device.type == "cuda"
    with profiler(activities=[ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU], acc_events=True) as recorded:
        seconds, tokens, _, metrics = timed_step(trainer, draw(2), 2)
    # `key_averages` takes minutes over the million operators of a step: the raw events are summed here
    assert recorded.profiler is not None and recorded.profiler.kineto_results is not None
    spans = [
        (event.name(), event.start_ns(), event.duration_ns())
        for event in recorded.profiler.kineto_results.events()
        if not on_gpu or str(event.device_type()).endswith("CUDA")
    ]
    took = f"{seconds:.3f} s, {scoring(metrics):.3f} s of scoring before it, {tokens} tokens"
    return f"{kernel_table(spans)}\none step under the profiler: {took}"


def scoring(metrics: Mapping[str, float]) -> float:
    """Seconds of a step before its first update."""
    return sum(metrics.get(name, 0.0) for name in ("batch_s", "check_s", "score_s"))


def kernel_table(spans: Sequence[tuple[str, int, int]], most: int = 40) -> str:
    """Rows of milliseconds, share of the busy time, calls and name from (name, start, duration) in ns."""
    times: dict[str, list[int]] = {}
    for name, _, duration in spans:
        entry = times.setdefault(name, [0, 0])
        entry[0] += duration
        entry[1] += 1
    busy = end = 0
    for _, start, duration in sorted(spans, key=lambda span: span[1]):
        busy += max(0, start + duration - max(start, end))
        end = max(end, start + duration)
    whole = end - min((start for _, start, _ in spans), default=0)
    lines = [f"{'ms':>10} {'share':>7} {'calls':>7}  kernel"]
    for name, (time_ns, calls) in sorted(times.items(), key=lambda item: -item[1][0])[:most]:
        lines.append(f"{time_ns / 1e6:10.2f} {time_ns / max(busy, 1):7.3f} {calls:7d}  {name[:110]}")
    lines.append(f"busy {busy / 1e6:.1f} ms of {whole / 1e6:.1f} ms from the first to the last, {len(spans)} in all")
    return "\n".join(lines)


def release() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def main() -> None:
    parser = case_options(
        __doc__, steps={3: "timed, after two that are not"}, gpu_gib={float: "memory of the GPU to plan for"},
        wrapped={False: "FSDP2 on a mesh of one"},
        sft={False: "supervised training (`astra sft`) in the place of reinforcement learning"}, limit_s=560.0,
    )  # fmt: skip
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--profile", choices=VARIANTS, help="no table: the kernels of one step of this variant")
    args = parser.parse_args()
    began = time.perf_counter()
    case = Case(args, wrapped=args.wrapped)
    device = case.ranks.device
    peak = next((float(tflops) for part, tflops in plan_speed.PEAK.items() if part in machine()["machine"]), None)

    def start(name: str) -> Trainer:
        variant = VARIANTS[name]
        if args.gpu_gib:
            gpus = Gpus({0: int(args.gpu_gib * 2**30)}, trainer=[0])
            variant = replace(variant, split=place(case.recipe(variant), case.shape, gpus).split)
        return case.trainer(variant)

    fsdp.limit_memory(device, args.gpu_gib or None)

    if args.profile:
        print(profile(start(args.profile), case.groups), flush=True)
        return
    rows: list[dict[str, Any]] = []
    measured = (case.groups, args.steps, case.shape, peak)
    longest_variant = 0.0
    for name in args.variants:
        since = time.perf_counter()
        if since - began + longest_variant > args.limit_s:
            row: dict[str, Any] = {"raised": f"not run: {args.limit_s:.0f} s would not suffice"}
        else:
            try:
                row = measure(start(name), *measured, VARIANTS[name].split)
            except Exception as problem:  # a variant that cannot run here is a result, and is printed as one
                row = {"raised": f"{type(problem).__name__}: {' '.join(str(problem).split())[:400]}"}
        release()
        longest_variant = max(longest_variant, time.perf_counter() - since) if "raised" not in row else longest_variant
        rows.append({"variant": name} | row)
        say(rows[-1])
    show(args, {"rows": rows})
    case.ranks.close()


if __name__ == "__main__":
    main()
