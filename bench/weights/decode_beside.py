"""Decoding a version inside an engine whose scheduler never sleeps: who waits for whom, and how long.

    python bench/weights/decode_beside.py [--shape 0.1b | 0.01b] [--rounds 5] [--json]

The main thread spins in Python as SGLang's event loop does; a thread beside it decodes a staged version and brings it
into the form that the pause needs (on the CPU here: two copies instead of two transfers). Three ways:

    thread, 5 ms        the thread decodes, the interpreter changes hands every 5 ms (Python's default)
    thread, 0.5 ms      the same at a switch interval of 0.5 ms
    process             a child process decodes, the thread takes over arrays (what our loader does)

`stage_ms` is from the plan's appearance to its being ready, `alone_ms` the same while the main thread sleeps; `loop` is
what is left of the main thread's turns meanwhile, and `longest_ms` the longest that one turn of about 0.1 ms took.

The read-back under HF names runs beside the scheduler too. Besides one kernel it must know where the weights lie, at
the number of tensors of a 4.2 B model (426, small here): `mapping, anew` asks the model's own `load_weights` again, as
it was done once for each read-back; `mapping, kept` asks whether every parameter is where it was. Both at the interval
of 0.2 ms that is set meanwhile.
"""

from __future__ import annotations

import functools
import statistics
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from astracli.engines import loader as engine_loader
from astracli.weights.format.manifest import TensorEntry
from astracli.weights.publish.publisher import Publisher
from astracli.weights.receive import apply
from astracli.weights.receive.decoder import DecoderProcess
from astracli.weights.receive.placement import PlacementRecorder
from astracli.weights.receive.reading import Prepared, prepare
from astracli.weights.receive.resident import Resident

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from shared import folder, options, show

from weights.made_up import versions

WAYS = {"thread, 5 ms": 5e-3, "thread, 0.5 ms": 5e-4, "process": 5e-3}


def publish(folder: Path, shape: str) -> Resident:
    """Versions 0 and 1; version 1 is staged for the hands that come back."""
    from astracli.weights.format.manifest import seal

    base, new = versions(shape, 1e-6, 4, "cpu")
    publisher = Publisher(folder, full_interval=1000)
    publisher.publish(0, base)
    publisher.publish(1, new)
    publisher.close()
    plan = {"version": 1, "kind": "delta", "base_version": 0, "model_path": None}
    (folder / "next.json").write_bytes(seal({**plan, "steps": ["v000001/manifest.json"]}))
    return Resident({name: apply.placements(tensor) for name, tensor in base.items()})


def turn() -> int:
    """About a tenth of a millisecond of Python."""
    found = 0
    for k in range(2000):
        found += k
    return found


def spin(stop: threading.Event) -> tuple[int, float]:
    """(turns, the longest in seconds) until `stop`."""
    time_sharing, longest, before = 0, 0.0, time.perf_counter()
    while not stop.is_set():
        turn()
        now = time.perf_counter()
        longest, before, time_sharing = max(longest, now - before), now, time_sharing + 1
    return time_sharing, longest


def timed(call: Callable[[], Any], stop: threading.Event, out: list[float]) -> None:
    begin = time.perf_counter()
    try:
        call()
        out.append(time.perf_counter() - begin)
    finally:
        stop.set()  # after an error too: the main thread spins until then


def stage(read: Any, folder: Path, hands: Resident) -> None:
    prepared: Prepared = read(folder)
    hands.load(prepared)


def require(times: list[float], rounds: int) -> None:
    if len(times) < rounds:
        sys.exit(f"{rounds - len(times)} of {rounds} rounds failed, see above")


def measure(shape: str, rounds: int, folder: Path) -> list[dict[str, Any]]:
    hands = publish(folder, shape)
    quiet = threading.Event()
    threading.Timer(1.0, quiet.set).start()
    time_sharing, _ = spin(quiet)
    free = time_sharing / 1.0
    child = DecoderProcess()
    rows = []
    for way, interval in WAYS.items():
        read = child.prepare if way == "process" else prepare
        read(folder)  # the child has started, files are in memory
        rows.append(beside(way, shape, functools.partial(stage, read, folder, hands), rounds, free, interval))
    child.close()
    return rows + mappings(rounds, folder / "engine", free)


class Model(torch.nn.Module):
    """As many modules and parameters as a model of 32 layers; loads through views, as fused parameters are."""

    def __init__(self, weights: dict[str, torch.Tensor]):
        super().__init__()
        self.held: dict[str, torch.nn.Parameter] = {}
        for name, tensor in weights.items():
            owner: torch.nn.Module = self
            *path, last = name.split(".")
            for part in path:
                if not hasattr(owner, part):
                    owner.add_module(part, torch.nn.Module())
                owner = getattr(owner, part)
            self.held[name] = torch.nn.Parameter(tensor, requires_grad=False)
            owner.register_parameter(last, self.held[name])

    def load_weights(self, weights: Any) -> None:
        known = dict(self.named_parameters())
        for name, loaded in weights:
            rows = known[name].data.narrow(0, 0, len(loaded))
            rows.copy_(loaded.narrow(0, 0, len(loaded)))


def mappings(rounds: int, folder: Path, free: float) -> list[dict[str, Any]]:
    """What a read-back does besides its kernel, beside a main thread that spins."""
    weights = versions("names", 1e-6, 1, "cpu")[0]
    entries = [
        TensorEntry(name, str(t.dtype).removeprefix("torch."), tuple(t.shape), "none", 0, "", ())
        for name, t in weights.items()
    ]
    model = Model(weights)
    engine = engine_loader.LoadedModel(model, folder)
    engine.place(entries)
    ways = {
        "mapping, anew": lambda: PlacementRecorder().record(model, entries),
        "mapping, kept": lambda: engine.place(entries),
    }
    rows = [beside(way, "names", call, rounds, free, 2e-4) | {"tensors": len(entries)} for way, call in ways.items()]
    engine.watcher.close()
    return rows


def beside(way: str, shape: str, call: Callable[[], Any], rounds: int, free: float, interval: float) -> dict[str, Any]:
    """`call` alone, and beside a thread that spins at that switch interval; it made `free` turns a second alone."""
    alone: list[float] = []
    times: list[float] = []
    left, longest = [], 0.0
    for _ in range(rounds):
        timed(call, threading.Event(), alone)
    sys.setswitchinterval(interval)
    for _ in range(rounds):
        stop = threading.Event()
        thread = threading.Thread(target=timed, args=(call, stop, times))
        begin = time.perf_counter()
        thread.start()
        time_sharing, worst = spin(stop)
        left.append(time_sharing / (time.perf_counter() - begin) / free)
        longest = max(longest, worst)
        thread.join()
    sys.setswitchinterval(5e-3)
    require(times, rounds)
    return {
        "way": way, "shape": shape, "alone_ms": 1000 * statistics.median(alone),
        "stage_ms": 1000 * statistics.median(times), "worst_stage_ms": 1000 * max(times),
        "loop": statistics.median(left), "longest_ms": 1000 * longest,
    }  # fmt: skip


def main() -> None:
    args = options(__doc__, shape=("0.1b", "0.01b"), rounds=5).parse_args()
    torch.set_num_threads(1)
    with folder(in_memory=True) as name:
        show(args, {"rows": measure(args.shape, args.rounds, name)})


if __name__ == "__main__":
    main()
