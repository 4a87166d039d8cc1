"""What docs/benchmarks.md lists as "To be run", run part by part on a machine with GPUs.

    python bench/gpu_rows.py --list
    python bench/gpu_rows.py --out OUT [--only PART ...] [--minutes 25] [--model-05b DIR] [--model-15b DIR]
                             [--model-4b DIR] [--data DIR] [--engine-path PATH] [--vllm-path PATH] [--runs DIR]

Parts run one after the other, in the order of `--only` or of the list: short proofs first, long runs last. Each has a
limit of its own (`--limit-s PART=SECONDS` changes it); what runs longer is interrupted, and with it all that it
started, and the next begins. A part that needs something which is not there is left out, with the reason. So is one
that would begin after `--minutes`; a part that is still going on then ends.

OUT/PART.out and OUT/PART.err hold what a part says, as it says it; OUT/PART is a folder for its small files. Models and
runs lie in RUNS/PART (RUNS is OUT by default). OUT/summary.json is written after every part. Exit 1 when one failed or
ran out of time.
"""

from __future__ import annotations

import argparse
import json
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil

sys.path.insert(0, str(Path(__file__).resolve().parent))
from shared import options, say, show

ROOT = Path(__file__).resolve().parents[1]
GRACE_S = 30.0
"""From an interrupt to the kill: `astra` stops its processes in order."""


@dataclass(frozen=True)
class Part:
    """What Python runs in the repository's root (-P: with the installed package, not with the files there). In braces
    stand options of this script, `out`, the part's folder of results, `runs`, its folder for the rest, and `all`, the
    folder of the latter of all parts."""

    name: str
    command: str
    limit_s: float
    gpus: int = 1


def tests(name: str, limit_s: float, gpus: int = 1) -> Part:
    return Part(f"{name}_tests", f"-P -m pytest -p no:cacheprovider -q -m gpu tests/test_{name}_gpu.py", limit_s, gpus)


ENGINE = " --engine-path {engine_path} --json"
REAL = "bench/learning/real_models.py RECIPE --model MODEL --data {data} --layout shared --folder {runs} --out {out}"
GSM8K = "qwen2.5-0.5b-gsm8k-m2po-delta"
TOOLS = " --set rollout.env=tools 'env.tools=[\"python\"]' train.steps=30 eval.every=30"


def learning(name: str, recipe: str, limit_s: float, more: str = "", model: str = "{model_05b}") -> Part:
    return Part(name, REAL.replace("RECIPE", recipe).replace("MODEL", model) + ENGINE + more, limit_s)


VLLM_TESTS = (
    "import os, sys, pytest; os.environ['ASTRA_GPU_ENGINE_PATH'] = '{vllm_path}'; "
    "sys.exit(pytest.main(['-p', 'no:cacheprovider', '-q', '-m', 'gpu', 'tests/test_vllm_gpu.py']))"
)
OF = {"vllm": " --engine vllm --engine-path {vllm_path} --json", "sglang": " --engine sglang" + ENGINE}


def beside(bench: str, limit_s: float, *sides: str) -> tuple[Part, ...]:
    """A bench of an engine for each of `sides`, `ENGINE_MODEL`."""
    found = []
    for side in sides:
        engine, _, model = side.partition("_")
        command = f"bench/engine/{bench}.py --model {{model_{model}}} --limit-s {limit_s - 60:g}{OF[engine]}"
        found.append(Part(f"{bench}_{side}", command, limit_s))
    return tuple(found)


PARTS = (
    tests("lora", 180),
    tests("shared_prompts", 180),
    tests("packing", 240),
    Part("lora_merge", "bench/weights/lora_merge.py --device cuda --json", 60),
    Part("rows", "bench/trainer/rows.py --json", 150),
    Part("rows_of_one_length", "bench/trainer/rows.py --lengths 370 455 540 625 710 795 880 967 --json", 150),
    Part("shared_prompt_4000", "bench/trainer/shared_prompt.py --adapter qwen2 --shape coder-0.5b --prompts 4000"
         " --tokens 65536 --groups 4 --json", 150),
    Part("shared_prompt_4000_of_4b", "bench/trainer/shared_prompt.py --shape 4b --prompts 4000 --tokens 36864"
         " --checkpointing full --json", 240),
    Part("slots_of_turns", "bench/engine/slots.py --model {model_05b} --attention triton --slots 256 --turns 5"
         " --tool-ms 100 --episodes 1000 --seconds 40" + ENGINE, 240),
    Part("vllm_tests", f"-P -c {shlex.quote(VLLM_TESTS)}", 300),
    *beside("side_by_side", 600, "vllm_05b", "sglang_05b", "sglang_4b", "vllm_4b"),
    *beside("offline", 600, "vllm_05b", "sglang_05b", "sglang_4b"),
    *beside("prefixes", 600, "vllm_05b", "sglang_05b", "sglang_4b"),
    Part("small_card_24", "bench/learning/small_card.py --gib 24 --groups 16 --model {model_4b} --folder {runs}"
         + ENGINE, 600),
    Part("small_card_48", "bench/learning/small_card.py --gib 48 --side-by-side --steps 8 --model {model_4b}"
         " --folder {runs}" + ENGINE, 420),
    Part("warm", "-P -m astracli doctor qwen3.5-4b-m2po-delta --warm --tuned-out {out}/tuned.json"
         " --set model.path={model_4b} --set resources.rollout_gpus=1 --set resources.train_gpus=1"
         " --set resources.share_gpus=true --set resources.engine.env.PYTHONPATH={engine_path}", 420),
    Part("full_size_shared", "bench/loop/full_size.py --layout shared --time-sharing --model {model_4b} --steps 8"
         " --folder {runs}" + ENGINE, 480),
    learning("tools", GSM8K, 420, TOOLS),
    learning("tools_code", GSM8K, 420, f"{TOOLS} env.format=code"),
    learning("gsm8k_full", GSM8K, 900, " --set train.steps=50"),
    learning("gsm8k_lora", "qwen2.5-0.5b-gsm8k-lora", 900, " --set train.steps=50"),
    Part("gsm8k_lora_beside_full", "-P -m astracli eval --compare {all}/gsm8k_full/run {all}/gsm8k_lora/run"
         " --json", 120),
    learning("gsm8k", GSM8K, 1800),
    learning("math", "math", 1800, model="{model_15b}"),
    Part("beside_trl", "bench/loop/beside_trl_gpu.py --model {model_05b} --data {data} --trl-path {vllm_path}"
         " --folder {runs}" + ENGINE, 900),
    tests("fsdp", 420, gpus=2),
    Part("ranks", "bench/trainer/ranks.py --micro-batches 8 --steps 2 --json", 600, gpus=2),
    Part("full_size", "bench/loop/full_size.py --model {model_4b} --folder {runs}" + ENGINE, 480, gpus=2),
    Part("full_size_of_two_ranks", "bench/loop/full_size.py --model {model_4b} --layout 1+2 --steps 8 --folder {runs}"
         + ENGINE, 480, gpus=2),
)  # fmt: skip
OPTIONAL = {"engine_path": "", "vllm_path": ""}
"""Paths that may be empty: SGLang, or TRL and vLLM, are then in this environment."""


@dataclass
class Result:
    part: str
    state: str
    """done, failed, out of time, left out"""
    why: str = ""
    seconds: float = 0.0


def words(part: Part, given: Mapping[str, str], out: Path, runs: Path) -> list[str] | str:
    """The command of a part, or what it lacks."""
    values = {**OPTIONAL, **given, "out": str(out / part.name), "runs": str(runs / part.name), "all": str(runs)}
    try:
        return [sys.executable, *(word.format_map(values) for word in shlex.split(part.command))]
    except KeyError as missing:
        return f"needs --{missing.args[0].replace('_', '-')}"


def gpus() -> int:
    import torch

    return torch.cuda.device_count()


def run(part: Part, command: list[str], out: Path, limit_s: float) -> Result:
    """The part in a process group of its own; nothing of it is left running."""
    began = time.monotonic()
    with (out / f"{part.name}.out").open("w") as said, (out / f"{part.name}.err").open("w") as complained:
        process = subprocess.Popen(
            command, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=said, stderr=complained, start_new_session=True
        )
        try:
            code = process.wait(timeout=limit_s)
            state, why = ("done", "") if code == 0 else ("failed", f"exit {code}")
        except subprocess.TimeoutExpired:
            state, why = "out of time", f"limit {limit_s:.0f} s"
        except BaseException:
            stop(process)
            raise
        stop(process)
    return Result(part.name, state, why, round(time.monotonic() - began, 1))


def stop(process: subprocess.Popen[bytes]) -> None:
    """Interrupt the part, then kill what is left of it."""
    if process.poll() is not None:
        return
    left = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGINT)
    try:
        process.wait(GRACE_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    _, alive = psutil.wait_procs(left, timeout=GRACE_S)
    for child in alive:
        child.kill()
    psutil.wait_procs(alive, timeout=GRACE_S)


def main() -> None:
    by_name = {part.name: part for part in PARTS}
    parser = options(
        __doc__, list={False: "the parts and their commands"}, out={str: "where results go"},
        minutes={60.0: "no part begins later"}, model_05b={str: "Qwen2.5-0.5B-Instruct or its sister"},
        model_15b={str: "the same of 1.5 B"}, model_4b={str: "of bench/random_checkpoint.py"},
        data={str: "directory with train and eval"}, engine_path={str: "PYTHONPATH of the environment with SGLang"},
        vllm_path={str: "PYTHONPATH of the one with TRL and vLLM"}, runs={str: "where models and runs lie"},
    )  # fmt: skip
    parser.add_argument("--only", nargs="+", choices=by_name, metavar="PART", default=list(by_name))
    parser.add_argument("--limit-s", nargs="+", action="extend", default=[], metavar="PART=SECONDS")
    args = parser.parse_args()
    limits = {name: part.limit_s for name, part in by_name.items()} | changed(parser, args.limit_s, by_name)
    if args.list:
        show(args, {"parts": [asdict(part) for part in PARTS]})
        return
    if not args.out:
        parser.error("--out is missing")
    out, began, results, there = Path(args.out).resolve(), time.monotonic(), list[Result](), gpus()
    runs = Path(args.runs or out).resolve()
    given = {name: value for name, value in vars(args).items() if isinstance(value, str)}
    for name in args.only:
        part, command = by_name[name], words(by_name[name], given, out, runs)
        if isinstance(command, str):
            result = Result(name, "left out", command)
        elif part.gpus > there:
            result = Result(name, "left out", f"needs {part.gpus} GPUs, {there} are there")
        elif time.monotonic() - began > 60 * args.minutes:
            result = Result(name, "left out", f"{args.minutes:g} minutes are over")
        else:
            say(part=name, command=shlex.join(command))
            for folder in (out / name, runs / name):
                folder.mkdir(parents=True, exist_ok=True)
            result = run(part, command, out, limits[name])
        results.append(result)
        say(asdict(result))
        out.mkdir(parents=True, exist_ok=True)
        (out / "summary.json").write_text(json.dumps([asdict(one) for one in results], indent=1))
    show(args, {"parts": [asdict(one) for one in results]})
    sys.exit(any(one.state in ("failed", "out of time") for one in results))


def changed(parser: argparse.ArgumentParser, pairs: list[str], parts: Mapping[str, Part]) -> dict[str, float]:
    """Limits of the command line."""
    found = {}
    for pair in pairs:
        name, _, seconds = pair.partition("=")
        if name not in parts or not seconds.replace(".", "", 1).isdigit():
            parser.error(f"--limit-s {pair}: PART=SECONDS, with a part of --list")
        found[name] = float(seconds)
    return found


if __name__ == "__main__":
    main()
