"""What the benches share: options, how a result is printed, runs of `astra train`, temporary folders, GPU memory.

A bench makes one document: plain values, and lists of rows. It is printed as tables, or with --json as one object; both
begin with the date, the machine and the versions of what matters. What is known before the end goes to stderr (`say`).
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import psutil

from astracli.cli.output import sections, table_lines
from astracli.models import registry
from astracli.models.adapter import read_config

Record = dict[str, Any]
RECIPE = "qwen3.5-tiny-m2po-delta"
ASTRA = [sys.executable, "-m", "astracli"]
PACKAGES = ("torch", "triton", "transformers", "flash-linear-attention", "tilelang", "sglang")
GIB = 2**30


# ---- options


def options(doc: str | None, **wanted: Any) -> argparse.ArgumentParser:
    """A parser with --json and an option for each of `wanted`."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="one object instead of tables")
    return more_options(parser, **wanted)


def more_options(parser: argparse.ArgumentParser, **wanted: Any) -> argparse.ArgumentParser:
    """name=VALUE: its default, whose type is the option's. VALUE may be a type (no default), False (a flag), a list
    (one or several), a tuple (one of these, the first by default), and {VALUE: help}. `set` is always a.b=c, again and
    again."""
    for name, value in wanted.items():
        (value, text) = next(iter(value.items())) if isinstance(value, dict) else (value, None)
        flag = f"--{name.replace('_', '-')}"
        if value is False:
            parser.add_argument(flag, action="store_true", help=text)
        elif isinstance(value, type):
            parser.add_argument(flag, type=value, help=text)
        elif isinstance(value, tuple):
            parser.add_argument(flag, choices=value, default=value[0], help=text)
        elif name == "set":
            parser.add_argument(flag, nargs="+", action="extend", default=[], metavar="KEY=VALUE", help=value)
        elif isinstance(value, list):
            parser.add_argument(flag, nargs="+", type=type(value[0]), default=value, help=text)
        else:
            parser.add_argument(flag, type=type(value), default=value, help=text)
    return parser


# ---- printing


def machine() -> Record:
    """Date, machine and versions, for the head of a result."""
    import torch

    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    found = {"date": date.today().isoformat(), "machine": gpu or f"{platform.machine()}, {os.cpu_count()} cores"}
    found["python"] = platform.python_version()
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def show(args: argparse.Namespace, document: Mapping[str, Any]) -> None:
    """Print what a bench found: tables, or with --json an object."""
    if args.json:
        print(json.dumps({"environment": machine(), **document}), flush=True)
        return
    print(", ".join(f"{name} {value}" for name, value in machine().items()))
    for title, heads, rows in sections(dict(document)):
        print("\n" + (f"{title}\n" if title else "") + "\n".join(table_lines(heads, rows, 220)), flush=True)


def say(found: Mapping[str, Any] | None = None, /, **more: Any) -> None:
    """A line to stderr, as soon as it is known."""
    print(json.dumps({**(found or {}), **more}), file=sys.stderr, flush=True)


def spread(values: Iterable[float]) -> dict[str, float] | None:
    """Median, 99th percentile (of fewer than a hundred the largest) and number; None: there is no value."""
    found = sorted(values)
    if not found:
        return None
    return {"p50": statistics.median(found), "p99": found[min(len(found) - 1, int(0.99 * len(found)))], "n": len(found)}


def median_s(work: Callable[[], Any], rounds: int, warm: int = 1) -> float:
    """Seconds of `work` on this process's device, after `warm` rounds that are not counted."""
    import torch

    settle = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    seconds = []
    for _ in range(rounds + warm):
        settle()
        began = time.perf_counter()
        work()
        settle()
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds[warm:])


# ---- runs


def command(verb: str, run: Path, settings: Mapping[str, Any] | Iterable[str], recipe: str = RECIPE) -> list[str]:
    """`astra VERB` into the run directory `run`. Start it elsewhere than in the source folder: Python looks for modules
    where it is started."""
    pairs = [f"{key}={value}" for key, value in settings.items()] if isinstance(settings, Mapping) else settings
    return [*ASTRA, verb, "--recipe", recipe, "--run-dir", str(run), *(w for pair in pairs for w in ("--set", pair))]


def gpu_settings(args: argparse.Namespace, trainers: int | None = 1, *, shared: bool = True) -> Record:
    """Settings of one engine on a GPU and so many trainers on GPUs (None: no word of it)."""
    found: Record = {"resources.device": "cuda", "resources.rollout_gpus": 1}
    if trainers is not None:
        found |= {"resources.train_gpus": trainers, "resources.share_gpus": str(shared).lower()}
    return found | ({"resources.engine.env.PYTHONPATH": args.engine_path} if args.engine_path else {})


def start(
    words: list[str], folder: Path, console: Path, *, env: Mapping[str, str] | None = None, apart: bool = False
) -> subprocess.Popen[bytes]:
    """A command in `folder`; what it says goes to the file `console`. `env`: its environment, else this process's.
    `apart`: in a session of its own, so that Ctrl-C does not reach it."""
    with console.open("ab") as said:
        return subprocess.Popen(
            words, cwd=folder, env=env, stdin=subprocess.DEVNULL, stdout=said, stderr=said, start_new_session=apart
        )


def finished(words: list[str], folder: Path, *, console: Any = subprocess.PIPE) -> tuple[float, str]:
    """(seconds, stdout) of a command in `folder`; ends the bench with its last words when it fails. `talk`: where its
    stderr goes."""
    began = time.monotonic()
    done = subprocess.run(
        words, cwd=folder, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=console, text=True
    )
    if done.returncode:
        logs = [f"==> {log.name}\n{log.read_text()[-1500:]}" for log in sorted(folder.glob("*/logs/*/*.log"))]
        said = "\n".join([*logs, done.stdout[-1000:], (done.stderr or "")[-3000:]])
        sys.exit(f"{' '.join(words)} ended with {done.returncode}:\n{said}")
    return time.monotonic() - began, done.stdout


def train(run: Path, settings: Mapping[str, Any] | Iterable[str], recipe: str = RECIPE, **console: Any) -> float:
    """One `astra train` to its end. -> seconds of the whole command."""
    return finished(command("train", run, settings, recipe), run.parent, **console)[0]


def records(run: Path) -> list[Record]:
    """Lines of metrics.jsonl; half a line is left out."""
    found = []
    path = run / "metrics.jsonl"
    for line in path.read_bytes().splitlines() if path.exists() else []:
        try:
            found.append(json.loads(line))
        except ValueError:
            continue
    return found


def trained(found: Iterable[Record]) -> list[Record]:
    """The trainer's records of steps among a run's."""
    return [r for r in found if r["process"] == "trainer" and "loss" in r]


def ask(url: str, token: str, path: str = "/model_info") -> Any:
    """What an engine says of itself. Raises OSError and ValueError."""
    request = urllib.request.Request(url + path, headers={"Authorization": f"Bearer {token}"})
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(request, timeout=10) as reply:
        return json.load(reply)


def adapter_of(directory: Path) -> Any:
    """The installed adapter of a checkpoint's model type."""
    kind = read_config(directory)["model_type"]
    return next(a for item in registry.installed() if (a := item.plugin) and kind in a.model_types)


@contextmanager
def folder(within: Path | str | None = None, *, in_memory: bool = False) -> Iterator[Path]:
    """A temporary folder, `in_memory` in /dev/shm where there is one."""
    if in_memory and Path("/dev/shm").is_dir():
        within = "/dev/shm"
    with tempfile.TemporaryDirectory(dir=within, ignore_cleanup_errors=True) as name:
        yield Path(name).resolve()


# ---- memory


class MemoryWatch(threading.Thread):
    """The most GPU memory that nvidia-smi shows for this process and all that it started, in GiB, together and of each
    GPU; in a container, whose processes it does not know by these ids, what the GPUs hold more than when the watch
    began. It watches from `watched` to its end, or from `start` until `done`."""

    def __init__(self, every_s: float = 0.5) -> None:
        super().__init__(daemon=True)
        self.done = threading.Event()
        self._every_s = every_s
        self.ours = _Peaks()
        self._more = _Peaks()

    @property
    def peak_gib(self) -> float:
        """Of all GPUs together, at one time."""
        return self.ours.together or self._more.together

    @property
    def peaks_gib(self) -> dict[int, float]:
        """Of each GPU, by the index that nvidia-smi gives it; their peaks may be at different times."""
        return dict(self.ours.each if self.ours.together else self._more.each)

    def run(self) -> None:
        me, before = psutil.Process(), None
        while not self.done.is_set():
            ours = {str(pid) for pid in (me.pid, *(child.pid for child in me.children(recursive=True)))}
            gpus = _asked("--query-gpu=index,uuid,memory.used")
            index = {uuid: int(number) for number, uuid, _ in gpus}
            held = dict.fromkeys(index.values(), 0.0)
            for uuid, pid, used in _asked("--query-compute-apps=gpu_uuid,pid,used_memory"):
                if pid in ours and uuid in index:
                    held[index[uuid]] += float(used) / 1024
            self.ours.see(held)
            used_now = {int(number): float(used) / 1024 for number, _, used in gpus}
            before = before or used_now
            self._more.see({gpu: used - before.get(gpu, 0.0) for gpu, used in used_now.items()})
            self.done.wait(self._every_s)


@contextmanager
def watched(device: str) -> Iterator[MemoryWatch]:
    """A watch, at work if the device is a GPU."""
    watch = MemoryWatch()
    if device == "cuda":
        watch.start()
    try:
        yield watch
    finally:
        watch.done.set()


class _Peaks:
    def __init__(self) -> None:
        self.together, self.each = 0.0, dict[int, float]()

    def see(self, held: Mapping[int, float]) -> None:
        self.together = max(self.together, sum(held.values()))
        for gpu, gib in held.items():
            self.each[gpu] = max(self.each.get(gpu, 0.0), gib)


def _asked(what: str) -> list[list[str]]:
    """Rows of nvidia-smi whose last cell is a number."""
    done = subprocess.run(["nvidia-smi", what, "--format=csv,noheader,nounits"], capture_output=True, text=True)
    rows = [[cell.strip() for cell in line.split(",")] for line in done.stdout.splitlines() if done.returncode == 0]
    return [row for row in rows if row[-1].isdigit()]
