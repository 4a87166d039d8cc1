"""Does the rollout worker keep up with a fast engine? The real worker and hub, a stand-in for SGLang (`fake_sglang`).

    python bench/engine/client.py [--slots 1024] [--seconds 20] [--profile FILE] [--json]
    python bench/engine/client.py --prefill-ms 0      without what a prefill costs: the worker alone

No GPU; engine, worker and hub are three processes, which two idle cores hold. While the worker generates, a new version
of the weights comes every `--update-s` seconds: nothing is transferred, and what a pause takes is what its calls take.

`tokens_per_s` is what the engine has generated, `share` that over the engine's own rate: its queue never empty,
`share_of_best` over the best that it can do when it is filled in bursts (both computed from its law, without a client).
`slots_busy` is what the engine has seen, `slots_busy_worker` what the worker reports. `engine_late` is the share of the
time that the stand-in was late by itself: above a few per cent the machine is too slow, or busy.
"""

from __future__ import annotations

import argparse
import cProfile
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from astracli.config import recipe_io
from astracli.data import fetch
from astracli.engines import registry as engines
from astracli.process import ports
from astracli.process.config import EngineAddress, RolloutConfig
from astracli.process.worker import Reporter
from astracli.rollout import worker as rollout
from astracli.weights.receive.subscriber import StagedPlan

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from shared import ask, folder, more_options, options, records, show

from engine import fake_sglang
from engine.rollout import TOKEN, hub

BURSTS = (1, 16, 32, 64, 96, 128, 192, 256)
ENGINE = ("slots", "step_ms", "request_us", "prefill_ms", "median", "sigma", "new_tokens", "vocabulary")


@dataclass
class NothingToFetch:
    """A receiver of versions without weights."""

    stage: Path
    watched: bool = True

    def fetch(self, target_version: int, have_version: int | None = None) -> StagedPlan:
        (self.stage / "wanted.json").write_text(json.dumps(target_version))
        return StagedPlan(target_version, "delta", ("x",), 1, 1, 0.0, 0.0)

    def readback(self, version: int) -> Mapping[str, float]:
        return {}

    def wake(self, version: int) -> None: ...

    def close(self) -> None: ...


def work(path: Path, profile: Path | None) -> None:
    """The rollout worker's process."""
    config = RolloutConfig.model_validate_json(path.read_text())
    kind = engines.get(config.engine)
    kind.receiver = lambda hub_url, token, stage_dir, model: NothingToFetch(stage_dir)  # type: ignore[method-assign]
    reporter = Reporter(config)
    if profile is None:
        rollout.run(config, reporter)
    else:
        cProfile.runctx("rollout.run(config, reporter)", globals(), locals(), str(profile))


@contextmanager
def process(*words: Any, log: Path) -> Iterator[psutil.Process]:
    """A Python process of its own, ended with the block."""
    with log.open("w") as file:
        running = subprocess.Popen([sys.executable, *map(str, words)], stdout=file, stderr=file)
        try:
            yield psutil.Process(running.pid)
        finally:
            if running.poll() is None:
                running.kill()
            running.wait()


def cpu_s(worker: psutil.Process) -> float:
    times = worker.cpu_times()
    return times.user + times.system


def measure(args: argparse.Namespace, name: Path) -> dict[str, Any]:
    stage, here = name / "stage", Path(__file__).resolve()
    stage.mkdir()
    (stage / "wanted.json").write_text("0")
    (port,) = ports.free_ports(1, "127.0.0.1")
    url = f"http://127.0.0.1:{port}"
    settings = {
        "data.reward": args.reward, "rollout.engine": "sglang", "rollout.group_size": 8,
        "rollout.max_new_tokens": args.new_tokens, "rollout.context_length": args.new_tokens + 512,
        "rollout.max_running_requests": args.slots, "algorithm.drop_equal_groups": "false",
        "data.template": json.dumps("1 " * 50 + "{question}"), "data.max_prompt_tokens": 400,
    }  # fmt: skip
    recipe = recipe_io.load(args.recipe, [f"{key}={value}" for key, value in settings.items()] + args.set)
    model = fetch.local_path(recipe.model.path)
    assert model is not None
    metrics = name / "metrics.jsonl"
    served = [word for key in ENGINE for word in ("--" + key.replace("_", "-"), getattr(args, key))]
    with (
        process(
            here.with_name("fake_sglang.py"), "--port", port, "--stage-dir", stage, *served, log=name / "engine.log"
        ),
        hub(name, metrics, slots=args.slots) as (store, hub_url),
    ):
        config = RolloutConfig(
            name="rollout", run_dir=name, attempt=1, hub_url=hub_url, token=TOKEN, recipe=recipe, model_path=model,
            engine="sglang", threads=1, data_paths={"": None}, samples=None, gpu_leases=(), generates=True,
            engines=(EngineAddress(name="engine0", url=url, stage_dir=stage),),
        )  # fmt: skip
        path = name / "rollout.json"
        path.write_text(config.model_dump_json())
        store.announce(0, 0)
        words = [here, "--worker", path] + (["--profile", args.profile] if args.profile else [])
        with process(*words, log=name / "rollout.log") as worker:
            deadline = time.monotonic() + 60
            while True:
                with suppress(OSError):
                    if ask(url, TOKEN, "/stats")["finished"]:
                        break
                if not worker.is_running() or worker.status() == "zombie" or time.monotonic() > deadline:
                    sys.exit((name / "rollout.log").read_text()[-3000:])
                time.sleep(0.2)
            time.sleep(args.warm_s)
            before, cpu, version = ask(url, TOKEN, "/stats"), cpu_s(worker), 0
            end = time.monotonic() + args.seconds
            while time.monotonic() < end:
                time.sleep(args.update_s)
                version += 1
                store.announce(version, version)
            after, used = ask(url, TOKEN, "/stats"), cpu_s(worker) - cpu
            store.request_stop()
            with suppress(psutil.TimeoutExpired):
                worker.wait(20)
        made = {key: after[key] - before[key] for key in before}
        found = [line for line in records(name) if "pause_s" in line and line["step"] > 0]
    pauses = sorted(line["pause_s"] * 1e3 for line in found)
    return {
        "tokens_per_s": made["tokens"] / made["seconds"], "requests_per_s": made["finished"] / made["seconds"],
        "tokens_per_cpu_s": made["tokens"] / used, "worker_cores": used / made["seconds"],
        "slots_busy": made["busy"] / made["seconds"], "waiting_in_engine": made["waiting"] / made["seconds"],
        "slots_busy_worker": statistics.fmean(line["slots_busy"] for line in found) if found else None,
        "prefills_per_s": made["prefills"] / made["seconds"],
        "requests_per_prefill": made["prefilled"] / max(1, made["prefills"]),
        "pauses": len(pauses), "pause_p50_ms": statistics.median(pauses) if pauses else None,
        "pause_p99_ms": pauses[min(len(pauses) - 1, int(0.99 * len(pauses)))] if pauses else None,
        "engine_late": made["late"] / made["seconds"],
    }  # fmt: skip


def own(args: argparse.Namespace, burst: int) -> float:
    """tokens/s of the engine without a client."""
    scheduler = fake_sglang.Scheduler(args.slots, args.step_ms / 1e3, args.request_us / 1e6, args.prefill_ms / 1e3)
    law = fake_sglang.Law(args.median, args.sigma, args.new_tokens)
    return fake_sglang.own_rate(scheduler, law, burst)["tokens_per_s"]


def main() -> None:
    parser = more_options(
        options(__doc__, recipe={"qwen3.5-tiny-m2po-delta": "recipe"}), seconds=20.0, warm_s=6.0, update_s=0.7,
        reward={"probe": "data.reward: `probe` grades nothing, `math` has a process"},
        profile={str: "file for cProfile's figures of the worker"},
    )  # fmt: skip
    fake_sglang.arguments(parser)
    parser.add_argument("--set", action="append", default=[], help="more of the recipe")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        work(args.worker, args.profile)
        return
    with folder() as name:
        found = measure(args, name)
    rates = {burst: own(args, burst) for burst in BURSTS if burst <= max(1, args.slots // 4)}
    found |= {"own_tokens_per_s": rates[1], "share": found["tokens_per_s"] / rates[1]}
    found |= {"best_tokens_per_s": max(rates.values()), "share_of_best": found["tokens_per_s"] / max(rates.values())}
    show(args, found)


if __name__ == "__main__":
    main()
