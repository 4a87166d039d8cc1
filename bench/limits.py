"""Where M2PO's limits come from: learning curves and cut tokens of each way, on the tiny recipe with stale data.

    python bench/limits.py --jobs 32 --out limits [--ways grpo "batch 0.003"] [--staleness 0 2 8] [--seeds 0 1 2]
                           [--steps 80] [--every 20] [--tier 1] [--minutes 7] [--json]

A way is a rule, a source of the limits and a threshold, all of M2PO as a clip:

- `floor`: the limit is never over max(largest |log r|, sqrt(tau)), also where nothing has to be bounded; one scoring
  pass over the batch (the rule of this package until November 2026).
- `batch`: the published rule, one scoring pass over the batch (the product).
- `minibatch`: the published rule on each minibatch's own log-ratios, taken just before its update.
- `microbatch`: the published rule on each micro-batch's own forward pass, with four micro-batches a minibatch.
- `grpo`: clip 0.2, for comparison.

Step t trains on what the policy of step t - staleness generated (`staleness.py`). Tokens cut are counted three ways in
every run, on the same forward passes: by the way itself, by the published rule on what the update computes on, and by
PPO's range of 0.2. Every run is one file in --out; what is there is not run again, so a cut-off command can be given
again, and `--minutes 0` only prints. A run that fails is a row (`failed: message`) and ends no other; the next command
tries it again, and the exit status is 1. Runs are independent processes of one thread; ways of tier 1 come first. A run
takes two to five minutes on a core.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import os
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch
from staleness import RECIPE, Run
from torch import Tensor

from astracli.config import recipe_io
from astracli.errors import UserError
from astracli.rl import losses
from astracli.rl.losses import ClipLimits, TokenLoss, Tokens, m2po
from astracli.rl.losses.clipping import ClipRange
from astracli.training.step import Trainer, Work

MICRO_BATCHES = 4
"""A minibatch of `microbatch`."""


@dataclass(frozen=True)
class Way:
    source: str
    threshold: float = 0.003

    @property
    def settings(self) -> dict[str, Any]:
        if self.source == "grpo":
            return {"name": "grpo"}
        return {"name": "m2po", "m2po.variant": "clip", "m2po.m2_threshold": self.threshold}


FIRST = ("floor", "batch", "minibatch", "microbatch")
TIERS = {
    1: [Way("grpo"), *(Way(source) for source in FIRST)],
    2: [Way(source, 0.01) for source in FIRST],
    3: [Way(source, 0.04) for source in ("batch", "minibatch")],
}
WAYS = {
    (way.source if way.source == "grpo" else f"{way.source} {way.threshold:g}"): way
    for tier in TIERS.values()
    for way in tier
}


def floor(log_ratio_N: Tensor, advantage_N: Tensor, settings: m2po.Settings) -> ClipLimits:
    """The former rule: a `prepare`."""
    tau = settings.m2_threshold
    moment_C = log_ratio_N[m2po.candidates(log_ratio_N, advantage_N)].double() ** 2
    if m2po.bounded(moment_C, tau):
        return m2po.prepare(log_ratio_N, advantage_N, settings)
    t = max(math.sqrt(float(moment_C.max())) if len(moment_C) else 0.0, math.sqrt(tau))
    low, high = (min(w, m) for w, m in zip(m2po.widths(t), m2po.CLIP_WIDEST, strict=True))
    return ClipRange(1.0 - low, 1.0 + high)


def limits_per_minibatch(trainer: Trainer) -> None:
    """Each minibatch is scored by the policy that is about to be updated."""
    update: Callable[..., float] = trainer._minibatch

    def minibatch(work: Work, index: int, step: int, *, measure: bool) -> float:
        with torch.no_grad():
            ratios = [
                trainer._forward(trainer.policy, micro)[0] - torch.from_numpy(micro.logprob_N)
                for micro in work.batch.minibatches[index]
            ]
        advantages = np.concatenate([micro.advantage_N for micro in work.batch.minibatches[index]])
        work.limits = m2po.prepare(torch.cat(ratios), torch.from_numpy(advantages), trainer.recipe.algorithm.own)
        return update(work, index, step, measure=measure)

    trainer._minibatch = minibatch  # type: ignore[assignment]


class LimitsRun(Run):
    """A run of `staleness.py` that takes its limits a certain way, and counts the tokens that each rule cuts."""

    def __init__(self, label: str, staleness: int, seed: int, args: argparse.Namespace):
        way = WAYS[label]
        super().__init__(label, staleness, seed, args, way.settings)
        self.way, self.cut = way, {"itself": 0, "published": 0, "ppo": 0, "tokens": 0}
        trainer = self.trainer
        if way.source == "microbatch":
            tokens = trainer.recipe.train.batch_groups * trainer.recipe.rollout.group_size * args.row_tokens
            share = tokens // trainer.recipe.train.minibatches // MICRO_BATCHES
            table = trainer.recipe.train.model_copy(update={"tokens_per_microbatch": share})
            trainer.recipe = trainer.recipe.model_copy(update={"train": table})
        if way.source == "floor":
            trainer.algorithm = replace(trainer.algorithm, prepare=floor)
        if way.source == "minibatch":
            limits_per_minibatch(trainer)
        trainer.algorithm = replace(trainer.algorithm, token_loss=self._counted(trainer.algorithm.token_loss))

    def _counted(self, token_loss: Callable[[Tokens, Any], TokenLoss]) -> Callable[[Tokens, Any], TokenLoss]:
        rule = m2po.Settings(variant="clip", m2_threshold=self.way.threshold)
        ppo = losses.get("grpo")

        def counted(tokens: Tokens, limits: Any) -> TokenLoss:
            with torch.no_grad():
                own = m2po.prepare(tokens.log_ratio_N, tokens.advantage_N, rule)
                published = int(m2po.token_loss(tokens, own).clipped_N.sum())
                fixed = ppo.prepare(tokens.log_ratio_N, tokens.advantage_N, ppo.settings())
                ranged = int(ppo.token_loss(tokens, fixed).clipped_N.sum())
            result = token_loss(tokens, own if self.way.source == "microbatch" else limits)
            found = (int(result.clipped_N.sum()), published, ranged, len(tokens.advantage_N))
            self.cut = {name: self.cut[name] + more for name, more in zip(self.cut, found, strict=True)}
            return result

        return counted

    def run(self) -> dict[str, Any]:
        found = super().run()
        tokens = self.cut.pop("tokens")
        return found | {f"cut_{name}": count / tokens for name, count in self.cut.items()} | {"area": area(found)}


def area(run: dict[str, Any]) -> float:
    """Under the curve, over its length: the mean height."""
    steps, values = zip(*run["curve"], strict=True)
    if steps[-1] == steps[0]:
        return float(values[0])
    return float(np.trapezoid(values, steps) / (steps[-1] - steps[0]))


def wanted(args: argparse.Namespace) -> Iterator[tuple[str, int, int]]:
    """(way, staleness, seed) by tier, seeds outermost: whatever is done when time is over can be compared."""
    for tier, ways in TIERS.items():
        if args.tier is not None and tier > args.tier:
            continue
        labels = [label for label, way in WAYS.items() if way in ways and label in args.ways]
        yield from ((label, k, seed) for seed in args.seeds for k in args.staleness for label in labels)


def place(args: argparse.Namespace, label: str, staleness: int, seed: int) -> Path:
    return Path(args.out) / f"{label.replace(' ', '-')}_k{staleness}_s{seed}.json"


def ended_well(path: Path) -> bool:
    return path.exists() and "failed" not in json.loads(path.read_text())


def one(task: tuple[str, int, int, argparse.Namespace]) -> dict[str, Any]:
    """The run's document, which is also its file. A failure is one too: the other runs have nothing to do with it."""
    torch.set_num_threads(1)
    label, staleness, seed, args = task
    found: dict[str, Any] = {"algorithm": label, "staleness": staleness, "seed": seed, "steps": args.steps}
    try:
        found |= LimitsRun(label, staleness, seed, args).run()
    except Exception as error:
        found["failed"] = (str(error).strip() or type(error).__name__).splitlines()[0]
        traceback.print_exc()
    path = place(args, label, staleness, seed)
    working = path.with_suffix(".tmp")
    working.write_text(json.dumps(found))
    os.replace(working, path)
    return found


def run_all(left: list[tuple[str, int, int]], args: argparse.Namespace) -> None:
    """`--jobs` at once, each a file; those that have not ended after `--minutes` are given up."""
    end = time.monotonic() + 60 * args.minutes
    jobs = max(1, min(args.jobs, len(left)))
    with multiprocessing.get_context("spawn").Pool(jobs) as pool:  # ends what runs when it is left
        going = pool.imap_unordered(one, [(*each, args) for each in left])
        for count in range(len(left)):
            try:
                r = going.next(max(0.0, end - time.monotonic()))
            except multiprocessing.TimeoutError:
                print(f"time is over: {count} of {len(left)} runs ended", file=sys.stderr)
                return
            which = f"{r['algorithm']}, staleness {r['staleness']}, seed {r['seed']}"
            print(f"{count + 1}/{len(left)} {which}: {outcome(r)}", file=sys.stderr, flush=True)
        pool.close()
        pool.join()


def outcome(run: dict[str, Any]) -> str:
    if "failed" in run:
        return f"failed: {run['failed']}"
    return f"{run['curve'][-1][1]:.3f} ({run['cpu_s']:.0f} CPU s)"


def table(runs: list[dict[str, Any]]) -> None:
    """Means over the seeds that did not fail, behind the last evaluation its lowest seed; then a row a failed run."""
    print(f"{'way':17} {'staleness':>9} {'seeds':>5} {'last':>6} {'lowest':>6} {'area':>6} | cut, %: {'itself':>6} "
          f"{'published':>9} {'PPO 0.2':>7} | {'mean ratio':>10} {'grad norm':>9} {'CPU s':>5}")  # fmt: skip
    for staleness in sorted({r["staleness"] for r in runs}):
        for label in WAYS:
            every = [r for r in runs if (r["staleness"], r["algorithm"]) == (staleness, label)]
            of = [r for r in every if "failed" not in r]
            if of:
                print(row(label, staleness, of))
            for r in every:
                if "failed" in r:
                    print(f"{label:17} {staleness:9d} seed {r['seed']} {outcome(r)}")


def row(label: str, staleness: int, of: list[dict[str, Any]]) -> str:
    last = [r["curve"][-1][1] for r in of]
    names = ("area", "cut_itself", "cut_published", "cut_ppo", "ratio_mean", "grad_norm", "cpu_s")
    mean = {name: statistics.mean(r[name] for r in of) for name in names}
    ended = sum(r["ended"] is not None for r in of)
    return (
        f"{label:17} {staleness:9d} {len(of):5d} {statistics.mean(last):6.3f} {min(last):6.3f} "
        f"{mean['area']:6.3f} |         {100 * mean['cut_itself']:6.2f} {100 * mean['cut_published']:9.2f} "
        f"{100 * mean['cut_ppo']:7.2f} | {mean['ratio_mean']:10.3f} {mean['grad_norm']:9.2f} "
        f"{mean['cpu_s']:5.0f}{f'  {ended} ended early' if ended else ''}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ways", nargs="+", choices=list(WAYS), default=list(WAYS))
    parser.add_argument("--staleness", type=int, nargs="+", default=[0, 2, 8])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=80)
    parser.add_argument("--every", type=int, default=20, help="steps between evaluations")
    parser.add_argument("--samples", type=int, default=8, help="an item, of the last evaluation")
    parser.add_argument("--between", type=int, default=4, help="an item, of the evaluations before")
    parser.add_argument("--tier", type=int, choices=list(TIERS), help="leave out later tiers")
    parser.add_argument("--jobs", type=int, default=1, help="runs at once")
    parser.add_argument("--minutes", type=float, default=1e6, help="after which runs are given up; 0 only prints")
    parser.add_argument("--row-tokens", type=int, default=26, help="of a row, from which `microbatch` is divided")
    parser.add_argument("--set", nargs="*", default=[], dest="settings", metavar="KEY=VALUE", help="of the recipe")
    parser.add_argument("--out", type=Path, default=Path("limits"))
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    try:
        recipe_io.load(RECIPE, args.settings)
    except UserError as error:
        parser.error(f"--set: {error}")
    args.out.mkdir(parents=True, exist_ok=True)
    everything = list(wanted(args))
    left = [each for each in everything if not ended_well(place(args, *each))]
    if left and args.minutes:
        run_all(left, args)
    runs = [json.loads(path.read_text()) for each in everything if (path := place(args, *each)).exists()]
    if {r["steps"] for r in runs} - {args.steps}:
        print(f"warning: some runs in {args.out} have other than {args.steps} steps", file=sys.stderr)
    print(json.dumps(runs)) if args.json else table(runs)
    if any("failed" in r for r in runs):
        sys.exit(1)


if __name__ == "__main__":
    main()
