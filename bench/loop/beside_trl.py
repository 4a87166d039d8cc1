"""Our CPU loop against TRL's GRPOTrainer: the same tiny model, prompts and completions, on the same cores, in one run.

    python bench/loop/beside_trl.py [--steps 60] [--rounds 3] [--trl-threads 1 2] [--json]

Both sides: astra:tiny, the arithmetic prompts, 8 prompts x 8 completions of at most 24 tokens a step, temperature 1,
one AdamW step on all of them, no group dropped, no KL, learning rate 2e-4. Sides take turns for `--rounds` rounds; a
side's figure is samples over wall time from the end of step 5 on, start-up excluded, and medians over rounds are taken.
Ours is `astra train` as it is (hub, rollout, grading and engine processes included, staleness up to 2 versions); TRL's
is one process with each of `--trl-threads` threads, the quickest counts. CPU seconds of all of a side's processes stand
beside it: they hold on a machine that others load too. TRL is imported from wherever it is importable.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from shared import ask, command, finished, folder, options, records, say, show, trained

PROMPTS, GROUP, TOKENS, FIRST = 8, 8, 24, 5
SAMPLES = PROMPTS * GROUP
RATE = 2e-4
PHASES = ("score_s", "forward_s", "backward_s", "optimizer_s", "batch_s", "check_s", "publish_s", "wait_s")
SETTINGS = {
    "train.batch_groups": PROMPTS, "train.minibatches": 1, "train.learning_rate": RATE, "train.schedule": '"constant"',
    "train.warmup_steps": 0, "rollout.group_size": GROUP, "rollout.max_new_tokens": TOKENS,
    "algorithm.drop_equal_groups": "false", "eval.every": 0, "checkpoint.every": 100000,
}  # fmt: skip


def ours(steps: int, extra: list[str], folder: Path) -> dict[str, Any]:
    """One `astra train`; watched from outside."""
    run = folder / f"run-{time.monotonic_ns()}"
    settings = [f"{key}={value}" for key, value in SETTINGS.items()] + [f"train.steps={steps}", *extra]
    words = command("train", run, settings)
    with (folder / "train.log").open("w") as log:
        began = time.monotonic()
        process = subprocess.Popen(words, cwd=folder, stdout=log, stderr=log)
        marks = [mark for wanted in (FIRST, steps) if (mark := _mark(process, run, wanted))]
        code = process.wait()
    if code or len(marks) < 2:
        sys.exit(f"{' '.join(words)} ended with {code}:\n{(folder / 'train.log').read_text()[-3000:]}")
    found = trained(records(run))
    steady = [r for r in found if r["step"] >= FIRST]
    window_s = steady[-1]["time"] - found[FIRST - 1]["time"]
    first, last = marks
    watched_s = last["time"] - first["time"]
    watched_steps = sum(first["time"] < r["time"] <= last["time"] for r in found)
    cpu_s = {name: used - first["cpu"].get(name, 0.0) for name, used in sorted(last["cpu"].items())}
    engine = {k: (last["engine"][k] - first["engine"][k]) / watched_s for k in first["engine"]}
    return {
        "samples_per_s": SAMPLES * len(steady) / window_s,
        "tokens_per_sample": statistics.mean(r["tokens"] for r in steady) / SAMPLES,
        "step_s": statistics.median(r["step_s"] for r in steady),
        "start_s": found[0]["time"] - found[0]["step_s"] - (time.time() - (time.monotonic() - began)),
        "staleness_mean": statistics.mean(r["staleness_mean"] for r in steady),
        "trainer_s": {p: statistics.median(r.get(p, 0.0) for r in steady) for p in PHASES},
        "engine_share": {**engine, "other": max(0.0, 1.0 - sum(engine.values()))},
        "cpu_s": sum(cpu_s.values()) / watched_steps,
        "cpu_step_s": {name: used / watched_steps for name, used in cpu_s.items()},
        "cpu_share": {name: used / watched_s for name, used in cpu_s.items()},
    }


def _mark(process: subprocess.Popen[bytes], run: Path, wanted: int) -> dict[str, Any] | None:
    """CPU seconds of every process and the engine's phases, when step `wanted` has been trained. None if it ends."""
    seen: dict[str, Any] | None = None
    while process.poll() is None:
        if len(trained(records(run))) >= wanted:
            return _look(process.pid, run) or seen
        if wanted > FIRST:  # the last step is followed by the end at once: keep the newest look
            seen = _look(process.pid, run) or seen
        time.sleep(0.25)
    return seen


def _look(pid: int, run: Path) -> dict[str, Any] | None:
    try:
        cpu = dict(_cpu(pid, run))
        config = json.loads((run / "config" / "rollout.json").read_text())
        address = next(engine["url"] for engine in config["engines"] if engine["name"] == "engine0")
        seconds = ask(address, config["token"])["seconds"]
    except (OSError, psutil.Error, ValueError):
        return None
    return {"time": time.time(), "cpu": cpu, "engine": seconds}


def _cpu(pid: int, run: Path) -> Iterator[tuple[str, float]]:
    """(process name, CPU seconds); unnamed children (graders) are summed."""
    names = {str(path): path.stem for path in (run / "config").glob("*.json")}
    supervisor = psutil.Process(pid)
    yield "supervisor + hub", sum(supervisor.cpu_times()[:2])
    graders = 0.0
    for child in supervisor.children(recursive=True):
        used = sum(child.cpu_times()[:2])
        name = next((names[part] for part in child.cmdline() if part in names), None)
        if name:
            yield name, used
        else:
            graders += used
    yield "graders", graders


def trl(steps: int, threads: int, folder: Path) -> dict[str, Any]:
    """TRL's trainer in a process of its own."""
    out = folder / "trl.json"
    env = [f"OMP_NUM_THREADS={threads}", f"MKL_NUM_THREADS={threads}", "HF_HUB_OFFLINE=1"]
    words = [sys.executable, __file__, "--trl-side", str(out), "--steps", str(steps)]
    finished(["env", *env, *words], folder)
    return {**json.loads(out.read_text()), "threads": threads}


def trl_side(steps: int, out: Path) -> None:
    import datasets
    import torch
    import transformers
    import trl as package

    import astracli
    from astracli.data import arithmetic
    from astracli.models.adapter import chat_prompt_tokens

    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    path = Path(astracli.__file__).parent / "assets" / "tiny"
    tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    problems = [arithmetic.draw(index, 0) for index in range(PROMPTS * steps)]
    rows = [
        {"prompt": tokenizer.decode(chat_prompt_tokens(tokenizer, p.question)), "answer": p.answer} for p in problems
    ]
    # with a fingerprint of its own: hashing the table fails where dill and pyarrow do not go together
    dataset = datasets.Dataset(datasets.table.InMemoryTable.from_pylist(rows), fingerprint="cpu-loop")
    ends: list[float] = []
    used: list[float] = []
    lengths: list[float] = []

    class Clock(transformers.TrainerCallback):  # type: ignore[misc]
        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            ends.append(time.perf_counter())
            used.append(time.process_time())

    def reward(completions: list[str], answer: list[str], completion_ids: list[list[int]], **_: Any) -> list[float]:
        lengths.append(statistics.mean(map(len, completion_ids)))
        found = [re.search(r"\\boxed\{(.*?)\}", text) for text in completions]
        return [float(bool(match) and match[1] == right) for match, right in zip(found, answer, strict=True)]

    config = package.GRPOConfig(
        output_dir=str(out.parent / "trl"), use_cpu=True, bf16=False, fp16=False, gradient_checkpointing=False,
        per_device_train_batch_size=SAMPLES, gradient_accumulation_steps=1, num_generations=GROUP,
        max_completion_length=TOKENS, temperature=1.0, top_p=1.0, top_k=0, beta=0.0, learning_rate=RATE,
        lr_scheduler_type="constant", adam_beta2=0.99, max_steps=steps, shuffle_dataset=False, report_to="none",
        logging_strategy="no", save_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    trainer = package.GRPOTrainer(
        model, reward, args=config, train_dataset=dataset, processing_class=tokenizer, callbacks=[Clock()]
    )
    trainer.train()
    steady = ends[FIRST - 1 :]
    figures = {
        "samples_per_s": SAMPLES * (len(steady) - 1) / (steady[-1] - steady[0]),
        "tokens_per_sample": statistics.mean(lengths[FIRST:]),
        "step_s": statistics.median(b - a for a, b in itertools.pairwise(steady)),
        "cpu_s": (used[-1] - used[FIRST - 1]) / (len(steady) - 1),
        "version": package.__version__,
    }
    out.write_text(json.dumps(figures))


def compare(args: argparse.Namespace) -> dict[str, Any]:
    rounds: list[dict[str, Any]] = []
    with folder() as name:
        for number in range(args.rounds):
            own = ours(args.steps, args.set, name)
            others = [trl(args.steps, threads, name) for threads in args.trl_threads]
            rounds.append({"ours": own, "trl": others})
            best = max(other["samples_per_s"] for other in others)
            say(round=number + 1, ours=own["samples_per_s"], trl=best)
    best = [max(r["trl"], key=lambda other: other["samples_per_s"]) for r in rounds]
    middle = sorted(range(len(rounds)), key=lambda i: rounds[i]["ours"]["samples_per_s"])[len(rounds) // 2]
    return {
        "trl": best[0]["version"],
        "ours_samples_per_s": statistics.median(r["ours"]["samples_per_s"] for r in rounds),
        "trl_samples_per_s": statistics.median(b["samples_per_s"] for b in best),
        "ratio": statistics.median(
            r["ours"]["samples_per_s"] / b["samples_per_s"] for r, b in zip(rounds, best, strict=True)
        ),
        "trl_threads": [b["threads"] for b in best],
        "middle": middle,
        "rounds": rounds,
    }


def main() -> None:
    parser = options(__doc__, steps=60, rounds=3, trl_threads=[1, 2], set="a recipe setting of our side")
    parser.add_argument("--trl-side", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.steps <= FIRST + 1:
        parser.error(f"--steps must be over {FIRST + 1}")
    if args.trl_side:
        trl_side(args.steps, args.trl_side)
        return
    result = compare(args)
    if not args.json:  # one round for a reader, the one in the middle
        result |= result.pop("rounds")[result["middle"]]
    show(args, result)


if __name__ == "__main__":
    main()
