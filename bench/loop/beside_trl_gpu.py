"""Our loop against TRL's GRPOTrainer with vLLM colocated: a real model on the same card, one after the other.

    python bench/loop/beside_trl_gpu.py --model ./q05 --data DATA --engine-path $EP [--trl-path PATH] [--steps 40]
    python bench/loop/beside_trl_gpu.py --device cpu --model TINY --data DATA --prompts 2 --new-tokens 8 --steps 8

Both sides: GSM8K's training problems in the same order, asked with the same prompt; `--prompts` x `--group` completions
of at most `--new-tokens` tokens a step at temperature 1, one AdamW step on all of them, no group dropped, no KL, fp32
masters under bf16, the same grader. Ours is `astra train` on one GPU, engine and trainer side by side, staleness at
most `--staleness`; with `--layout 1+1` a GPU each (TRL has one). TRL's side is one process: vLLM is in it where the
device is a GPU, transformers' `generate` on a CPU. Rates are of the steps from `--skip` on, start-up and first
compilations left out. `trainer` rates leave out waiting for samples (ours) and making and grading them (TRL's). Lengths
are each policy's own, so tokens/s stands beside samples/s. `reward` is the mean over the last quarter of the steps:
both have then trained on as many samples.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from shared import Record, command, finished, folder, gpu_settings, options, records, say, show, trained

RECIPE = "qwen2.5-0.5b-gsm8k-m2po-delta"


def ours(args: argparse.Namespace, place: Path) -> Record:
    """One `astra train`, by its metrics."""
    values: Record = {
        "model.path": Path(args.model).resolve(), "data.path": Path(args.data).resolve(), "train.steps": args.steps,
        "train.batch_groups": args.prompts, "rollout.group_size": args.group, "train.minibatches": 1,
        "train.learning_rate": args.lr, "train.warmup_steps": 0, "train.max_staleness": args.staleness,
        "rollout.max_new_tokens": args.new_tokens, "algorithm.name": "grpo", "algorithm.kl_coef": 0.0,
        "algorithm.batch_norm_advantage": "false", "algorithm.drop_equal_groups": "false",
        "data.decontaminate": "off", "rollout.max_dropped_batches": 0, "eval.every": 0, "checkpoint.every": 0,
    }  # fmt: skip
    if args.device == "cuda":
        values |= gpu_settings(args, 1, shared=args.layout == "shared")
    else:
        values |= {"resources.device": "cpu", "resources.rollout_gpus": 0, "resources.train_gpus": 0}
    run = place / "ours"
    finished(command("train", run, [f"{k}={v}" for k, v in values.items()] + args.set, RECIPE), place)
    steps = trained(records(run))
    later = steps[args.skip :]
    spent = steps[-1]["time"] - steps[args.skip - 1]["time"]
    work = sum(r["step_s"] - r["wait_s"] for r in later)
    return figures(args, [r["tokens"] for r in later], spent, work, [r["reward_mean"] for r in steps]) | {
        "staleness_mean": statistics.mean(r["staleness_mean"] for r in later)
    }


def figures(args: argparse.Namespace, tokens: list[float], spent: float, work: float, rewards: list[float]) -> Record:
    """`tokens` of completions by counted step; seconds of all counted steps, and of the trainer's part of them."""
    samples, last = args.prompts * args.group * len(tokens), rewards[-max(1, len(rewards) // 4) :]
    return {
        "samples_per_s": samples / spent, "tokens_per_s": sum(tokens) / spent,
        "trainer_samples_per_s": samples / work, "trainer_tokens_per_s": sum(tokens) / work,
        "step_s": spent / len(tokens), "tokens_per_sample": sum(tokens) / samples,
        "reward_first": rewards[0], "reward": statistics.mean(last),
    }  # fmt: skip


def trl(args: argparse.Namespace, place: Path) -> Record:
    """TRL's trainer in a process of its own."""
    out = place / "trl.json"
    names = ("model", "data", "device", "steps", "skip", "prompts", "group", "new_tokens", "lr", "micro", "vllm_memory")
    given = [word for name in names for word in (f"--{name.replace('_', '-')}", str(getattr(args, name)))]
    path = os.pathsep.join(filter(None, [args.trl_path, os.environ.get("PYTHONPATH")]))
    env = os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONPATH": path}
    log = place / "trl.log"
    with log.open("w") as file:
        words = [sys.executable, __file__, "--trl-side", str(out), *given]
        done = subprocess.run(words, cwd=place, env=env, stdin=subprocess.DEVNULL, stdout=file, stderr=file)
    if done.returncode:
        raise SystemExit(f"TRL's side ended with {done.returncode}:\n{log.read_text()[-3000:]}")
    found: Record = json.loads(out.read_text())
    return found


def trl_side(args: argparse.Namespace) -> None:
    import datasets
    import torch
    import transformers
    import trl as package

    from astracli.config import recipe_io
    from astracli.config.benchmarks import MATH_PROMPT
    from astracli.data.prompts import PromptSource
    from astracli.data.turns import render
    from astracli.rewards.grader import grade_math

    recipe = recipe_io.load(RECIPE, [f"data.path={args.data}"])
    place = Path(args.data)
    source = PromptSource(recipe.data, recipe.seed, next(p for p in place.rglob("gsm8k_train.jsonl")))
    rows = [
        {"prompt": [{"role": "user", "content": render(MATH_PROMPT, p.question)}], "answer": p.answer}
        for p in map(source.problem, range(args.prompts * args.steps))
    ]
    ends: list[float] = []
    made: list[tuple[float, float]] = []
    """(seconds of making and grading, tokens) of every batch."""
    rewards: list[float] = []

    class Clock(transformers.TrainerCallback):  # type: ignore[misc]
        def on_step_end(self, *_: Any, **__: Any) -> None:
            ends.append(time.perf_counter())

    def reward(completions: Any, answer: list[str], completion_ids: list[list[int]], **_: Any) -> list[float]:
        texts = [c if isinstance(c, str) else c[0]["content"] for c in completions]
        found = [float(grade_math(right, text) == "right") for right, text in zip(answer, texts, strict=True)]
        rewards.append(statistics.mean(found))
        made.append((0.0, float(sum(map(len, completion_ids)))))
        return found

    class Timed(package.GRPOTrainer):  # type: ignore[misc]
        def _generate_and_score_completions(self, inputs: Any) -> Any:
            began = time.perf_counter()
            result = super()._generate_and_score_completions(inputs)
            if args.device == "cuda":
                torch.cuda.synchronize()
            made[-1] = (time.perf_counter() - began, made[-1][1])
            return result

    batch, cuda = args.prompts * args.group, args.device == "cuda"
    micro = min(args.micro, batch)
    vllm = {"use_vllm": True, "vllm_mode": "colocate", "vllm_gpu_memory_utilization": args.vllm_memory} if cuda else {}
    config = package.GRPOConfig(
        output_dir=str(Path(args.trl_side).parent / "trl"), use_cpu=not cuda, bf16=cuda, gradient_checkpointing=False,
        per_device_train_batch_size=micro, gradient_accumulation_steps=batch // micro, num_generations=args.group,
        max_completion_length=args.new_tokens, temperature=1.0, top_p=1.0, top_k=0, beta=0.0, loss_type="grpo",
        learning_rate=args.lr, lr_scheduler_type="constant", weight_decay=0.01, max_grad_norm=1.0, adam_beta2=0.999,
        max_steps=args.steps, shuffle_dataset=False, report_to="none", logging_strategy="no", save_strategy="no",
        disable_tqdm=True, **vllm,
    )  # fmt: skip
    trainer = Timed(
        transformers.AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32),
        reward,
        args=config,
        # with a fingerprint of its own: hashing the table fails where dill and pyarrow do not go together
        train_dataset=datasets.Dataset(datasets.table.InMemoryTable.from_pylist(rows), fingerprint="beside-trl"),
        processing_class=transformers.AutoTokenizer.from_pretrained(args.model),
        callbacks=[Clock()],
    )
    trainer.train()
    spent = ends[-1] - ends[args.skip - 1]
    later = made[args.skip : len(ends)]
    work = spent - sum(seconds for seconds, _ in later)
    found = figures(args, [tokens for _, tokens in later], spent, work, rewards[: len(ends)])
    steps = [b - a for a, b in itertools.pairwise(ends[args.skip - 1 :])]
    versions = {"version": package.__version__, "step_s_p50": statistics.median(steps)}
    Path(args.trl_side).write_text(json.dumps(found | versions))


def main() -> None:
    parser = options(
        __doc__, model=str, data={str: "directory with train/gsm8k_train.jsonl"}, device=("cuda", "cpu"),
        layout=("shared", "1+1"), steps=40, skip=5, prompts=32, group=8, new_tokens=400, lr=2e-6, staleness=2,
        micro={32: "TRL's samples of a forward pass"}, vllm_memory={0.4: "part of the GPU that vLLM takes"},
        engine_path={str: "PYTHONPATH of the environment with SGLang"}, trl_path={str: "PYTHONPATH for TRL and vLLM"},
        only=("both", "ours", "trl"), set="changes our recipe", folder={str: "where both lie; default a temporary one"},
    )  # fmt: skip
    parser.add_argument("--trl-side", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.steps <= args.skip + 1 or not (args.model and args.data):
        parser.error("--model and --data are needed, and --steps must be over --skip")
    if args.trl_side:
        trl_side(args)
        return
    result: Record = {}
    with folder(args.folder) as place:
        for name, side in (("ours", ours), ("trl", trl)):
            if args.only in ("both", name):
                result[name] = side(args, place)
                say(result[name], side=name)
    if len(result) == 2:
        pairs = ("samples_per_s", "tokens_per_s", "trainer_samples_per_s", "trainer_tokens_per_s")
        result["times"] = {name: result["ours"][name] / result["trl"][name] for name in pairs}
    show(args, result)


if __name__ == "__main__":
    main()
