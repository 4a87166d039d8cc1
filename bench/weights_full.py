"""A full version from the trainer's memory into an engine's: where the seconds go, on a CPU.

    python bench/weights_full.py [--copies 3] [--threads 1] [--json]

`--copies` times the tensors of weights.py's 0.1b shape (0.19 GB each) in /dev/shm where there is one: digests, publish
(digests included), fetch over HTTP in one range and in four (server and client in one process, so they share one
interpreter), fetch on a shared disk (linked and checked), reading it with its checksums in an engine, copying it out of
its file, applying with digests. Best of `--repeats`.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from starlette.applications import Starlette
from weights import versions

from astracli.hub.api import serve
from astracli.process import ports
from astracli.weights.publish.publisher import Publisher
from astracli.weights.publish.server import weights_routes
from astracli.weights.publish.snapshot import lanes_of, take
from astracli.weights.receive import apply, reading
from astracli.weights.receive.subscriber import Subscriber


def measure(weights: dict[str, torch.Tensor], threads: int, folder: Path) -> dict[str, float]:
    """Stage -> seconds."""
    found: dict[str, float] = {}

    def timed(what: str, begin: float) -> None:
        found[what] = time.perf_counter() - begin

    begin = time.perf_counter()
    lanes_of(take(weights, owned=True, first=True).tensors)
    timed("digests", begin)
    publisher = Publisher(folder / "weights", model_name="bench", threads=threads)
    result = publisher.publish(0, weights, owned=True)
    found |= {"publish": result.publish_s, "of which writing and checksums": result.write_s}
    publisher.close()
    files = serve(Starlette(routes=weights_routes(folder / "weights")), ports.bind("127.0.0.1")).start()
    ways: list[tuple[str, dict[str, Any]]] = [
        ("fetch over HTTP", {"link_bytes": None, "parts": 1}),
        ("the same in four ranges at once", {"link_bytes": None, "parts": 4}),
        ("fetch on the same disk", {"link_bytes": 1 << 20}),
    ]
    for what, options in ways:
        stage = folder / what.replace(" ", "-")
        receiver = Subscriber(files.url, "bench-token", stage, **options)
        found[what] = receiver.fetch(0).transfer_s
        receiver.close()
    files.stop()
    begin = time.perf_counter()
    prepared = apply.prepare(stage)
    timed("read in the engine", begin)
    begin = time.perf_counter()
    reading.hold(prepared)
    timed("staged beside generation", begin)
    engine = {name: torch.ones_like(tensor) for name, tensor in weights.items()}
    begin = time.perf_counter()
    apply.apply(stage, engine, None, prepared)
    timed("apply and verify", begin)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--copies", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(1)
    base, _ = versions("0.1b", 1e-6, 1, "cpu")
    weights = {f"{k}.{name}": tensor.clone() for k in range(args.copies) for name, tensor in base.items()}
    size = sum(tensor.nbytes for tensor in weights.values())
    shm = Path("/dev/shm")
    runs: list[dict[str, Any]] = []
    for _ in range(args.repeats):
        with tempfile.TemporaryDirectory(dir=shm if shm.is_dir() else None) as folder:
            runs.append(measure(weights, args.threads, Path(folder)))
    best = {what: min(run[what] for run in runs) for what in runs[0]}
    if args.json:
        print(json.dumps({"bytes": size, "seconds": best}))
        return
    for what, seconds in best.items():
        print(f"{what:31} {seconds:7.3f} s  {size / 1e9 / seconds:6.2f} GB/s")


if __name__ == "__main__":
    main()
