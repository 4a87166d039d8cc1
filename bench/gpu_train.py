"""How fast the trainer is: tokens/s, MFU and peak memory of one optimizer step, its variants side by side.

    python bench/gpu_train.py [--shape 4b] [--tokens 8192] [--micro-batches 4] [--steps 3] [--variants ...] [--json]
    python bench/gpu_train.py --gpu-gib 79.6                 as the plan places it on a smaller GPU, held to its memory
    python bench/gpu_train.py --wrapped                       FSDP2 on one GPU too: what it costs
    python bench/gpu_train.py --profile packed-selective      the kernels that take the time
    python bench/gpu_train.py --shape tiny                    on a CPU

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
Every row is printed as soon as it is known; what does not fit in `--limit-s` is said.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from train_case import VARIANTS, build, groups, join, recipe, settle, shape_config

from astracli.models import registry
from astracli.models.adapter import MemoryShape
from astracli.plan import cost as plan_speed
from astracli.plan import placement as plan_place
from astracli.plan import trainer as plan_trainer
from astracli.plan.memory import CUDA_CONTEXT, HOLES
from astracli.rl.types import Group
from astracli.training.layout import Split
from astracli.training.step import Trainer


def timed_step(trainer: Trainer, sample: list[Group], step: int) -> tuple[float, int, int, dict[str, float]]:
    """(seconds of forward, backward and update; tokens that are no padding; completion tokens; the step's metrics)"""
    device = trainer.ranks.device
    settle(device)
    began = time.perf_counter()
    result = trainer.train(sample, step, step)
    settle(device)
    seconds = time.perf_counter() - began
    return seconds - scoring(result.metrics), sum(map(len, result.batch.rows)), result.batch.loss_tokens, result.metrics


def measure(
    trainer: Trainer, draw: Callable[[int], list[Group]], steps: int, shape: MemoryShape, peak: float | None
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
        divided = [micro for minibatch in trainer._divide(sample, step).minibatches for micro in minibatch]
        micros, fullest = len(divided), max(fullest, *(int(micro.tokens_BL.size) for micro in divided))
    rate = statistics.median(rates)
    row: dict[str, Any] = {"tokens_per_s": round(rate, 1), "micro_batches": micros}
    row["tflops"] = round(statistics.median(used) / 1e12, 3)
    row["mfu"] = round(statistics.median(used) / (peak * 1e12), 4) if peak else None
    row["peak_gib"] = round(torch.cuda.max_memory_allocated(device) / 2**30, 2) if device.type == "cuda" else None
    row["reserved_gib"] = round(torch.cuda.max_memory_reserved(device) / 2**30, 2) if device.type == "cuda" else None
    row["fullest"] = fullest
    row["on_host"] = trainer.masters.adam.moments_on_host
    # what FSDP2 on one rank holds is planned for nobody
    counted = device.type == "cuda" and (trainer.ranks.mesh is None or trainer.ranks.world_size > 1)
    row["planned_gib"] = round(planned(trainer, shape) / 2**30, 2) if counted else None
    row["gradient_error"] = first.get("rows_gradient_error")
    row["gradient_own"] = first.get("rows_gradient_own_shape")
    row["gradient_noise"] = first.get("rows_gradient_noise")
    row["warm_up_s"] = round(warm, 1)
    row["grad_norm"] = round(metrics["grad_norm"], 4)
    return row


def planned(trainer: Trainer, shape: MemoryShape) -> int:
    """Bytes that the launch plan counts on the GPU, without what torch does not allocate and the holes of its cache."""
    split = Split(moments_on_host=trainer.masters.adam.moments_on_host)
    rows = plan_trainer.trainer_rows("trainer", shape, trainer.recipe, "cuda", trainer.ranks.world_size, split)
    return sum(row.bytes for row in rows if row.where == "gpu" and row.what not in ("CUDA context", HOLES))


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


def environment(device: torch.device) -> dict[str, str]:
    found = {"device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"}
    for name in ("torch", "triton", "transformers", "flash-linear-attention", "tilelang"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "-"
    return found


COLUMNS = (
    "tokens_per_s",
    "tflops",
    "mfu",
    "peak_gib",
    "reserved_gib",
    "planned_gib",
    "fullest",
    "on_host",
    "micro_batches",
    "gradient_error",
    "gradient_own",
    "gradient_noise",
    "warm_up_s",
    "grad_norm",
)


def line(name: str, row: Mapping[str, Any]) -> str:
    if "raised" in row:
        return f"{name:18} {row['raised']}"

    def cell(value: Any) -> str:
        if value is None:
            return "-"
        return f"{value:.2e}" if isinstance(value, float) and 0 < abs(value) < 1e-3 else f"{value:.8g}"

    return f"{name:18}" + "".join(f"{cell(row[column]):>16}" for column in COLUMNS)


def release() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--adapter", default="qwen3_5")
    parser.add_argument("--shape", default="4b", help="`tiny`, or the end of a model id that the adapter knows")
    parser.add_argument("--tokens", type=int, default=8192, help="of one micro-batch")
    parser.add_argument("--micro-batches", type=int, default=4, help="of one step, about")
    parser.add_argument("--longest", type=int, default=4000, help="longest completion, tokens")
    parser.add_argument("--steps", type=int, default=3, help="timed, after two that are not")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--profile", choices=VARIANTS, help="no table: the kernels of one step of this variant")
    parser.add_argument("--gpu-gib", type=float, help="memory of the GPU to plan for; 79.6 is an H100 of 80 GB")
    parser.add_argument("--wrapped", action="store_true", help="FSDP2 on a mesh of one")
    parser.add_argument("--limit-s", type=float, default=560.0)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    began = time.perf_counter()
    ranks = join(wrapped=args.wrapped)
    adapter = registry.get(args.adapter)
    config = shape_config(adapter, args.shape)
    shape = adapter.memory_shape(config)
    where = environment(ranks.device)
    peak = next((float(tflops) for part, tflops in plan_speed.PEAK.items() if part in where["device"]), None)
    size = 4 if args.shape == "tiny" else 8

    def draw(step: int) -> list[Group]:
        return groups(args.micro_batches * args.tokens, args.longest, shape.vocab_size, step, size)

    def start(name: str) -> Trainer:
        variant = VARIANTS[name]
        chosen = recipe(variant, args.tokens, size)
        if args.gpu_gib:
            held = plan_place.place(chosen, shape, {0: int(args.gpu_gib * 2**30)}, [], [0], plan_speed.Pace())
            variant = replace(variant, split=held.split)
        return build(adapter, config, variant, chosen, ranks)

    if args.gpu_gib and ranks.device.type == "cuda":
        room = args.gpu_gib * 2**30 - CUDA_CONTEXT
        torch.cuda.set_per_process_memory_fraction(room / torch.cuda.get_device_properties(ranks.device).total_memory)

    print("  ".join(f"{k} {v}" for k, v in where.items()), file=sys.stderr, flush=True)
    if args.profile:
        print(profile(start(args.profile), draw), flush=True)
        return
    if not args.json:
        print(f"{'variant':18}" + "".join(f"{column:>16}" for column in COLUMNS), flush=True)
    longest_variant = 0.0
    for name in args.variants:
        since = time.perf_counter()
        if since - began + longest_variant > args.limit_s:
            row: dict[str, Any] = {"raised": f"not run: {args.limit_s:.0f} s would not suffice"}
        else:
            try:
                row = measure(start(name), draw, args.steps, shape, peak)
            except Exception as problem:  # a variant that cannot run here is a result, and is printed as one
                row = {"raised": f"{type(problem).__name__}: {' '.join(str(problem).split())[:400]}"}
        release()
        longest_variant = max(longest_variant, time.perf_counter() - since) if "raised" not in row else longest_variant
        print(json.dumps({"variant": name, **row, "environment": where}) if args.json else line(name, row), flush=True)
    ranks.close()


if __name__ == "__main__":
    main()
