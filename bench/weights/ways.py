"""What a version of the weights costs: as a delta beside three other ways, and in full, on the same made-up data.

    python bench/weights/ways.py [--quick] [--shape 0.1b | 4b | 0.01b] [--device cpu | cuda] [--threads N] [--json]
    python bench/weights/ways.py --full [--copies 3] [--threads 1] [--json]

Updates the weights as Adam would: fp32 masters, moments that have settled on gradients of pure noise, learning rates
1e-6 and 5e-6, one and four steps a version. Then

    ours          publisher's delta and engine's apply: digests of every tensor on both sides, files, checksums
    index+value   u32 index and new value of each changed element: 6 bytes for bf16 (AstraFlow, verl)
    xor+zstd      XOR with the base, zstd level 1 (slime, miles, SkyRL); no digest
    safetensors   the whole version; no digest

`bytes` are payload; `encode_s` goes from two versions in memory to files or buffers, `decode_s` from those to the new
version in the engine's memory. On a CPU everything runs on `--threads` 1; MB/s are bytes of the full version over
seconds. With --device cuda both versions and the engine's weights lie on the GPU; encode is then also split into diff
and coding, and decode into what happens before the pause (in the decoder's process, as in an engine) and in it. Best of
`--repeats`; --quick: 10 M elements once, some seconds on two cores. --shape 4b tells every row as soon as it is known
and leaves out what does not fit into --limit-s, ours first.

`--full`: where the seconds of a full version go, from the trainer's memory into an engine's, on a CPU. `--copies` times
the tensors of the 0.1b shape (0.19 GB each): digests, publish (digests included), fetch over HTTP in one range and in
four (server and client in one process, so they share one interpreter), fetch on a shared disk (linked and checked),
reading it with its checksums in an engine, copying it out of its file, applying with digests.
"""

from __future__ import annotations

import contextlib
import math
import os
import shutil
import sys
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import zstandard
from safetensors.torch import load_file, save_file
from starlette.applications import Starlette
from starlette.routing import Mount

from astracli.process import ports
from astracli.process.server import ServerThread
from astracli.weights.device.difference import bits_torch
from astracli.weights.format.manifest import Manifest, seal
from astracli.weights.publish import payload
from astracli.weights.publish.encoder import EncoderProcess
from astracli.weights.publish.publisher import Publisher
from astracli.weights.publish.server import weights_app
from astracli.weights.publish.snapshot import lanes_of, local, take
from astracli.weights.receive import apply, reading
from astracli.weights.receive.decoder import DecoderProcess
from astracli.weights.receive.resident import Resident
from astracli.weights.receive.subscriber import Subscriber

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from shared import folder, options, say, show

from weights.made_up import SHAPES, Weights, same_bits, versions

UPDATES = [(1e-6, 1), (1e-6, 4), (5e-6, 1), (5e-6, 4)]
"""(learning rate, optimizer steps per version)"""
ENCODING = ("digest", "diff", "coding")
"""Parts of encode in `Cost.more`; the rest are parts of decode."""


@dataclass
class Cost:
    bytes: int
    encode_s: float
    decode_s: float
    more: dict[str, float] = field(default_factory=dict)
    """For the table: parts of the two, in seconds."""


@dataclass
class Case:
    """Two versions, an engine that holds the first, and where to write."""

    base: Weights
    new: Weights
    engine: Weights
    device: str
    threads: int
    folder: Path
    read: Callable[[Path], apply.Prepared] = apply.prepare
    encoder: EncoderProcess | None = None
    """On a GPU; it lives as long as a trainer."""

    def clock(self) -> float:
        if self.device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def pool(self) -> Any:
        """A thread pool, or something whose `map` is the plain one."""
        return ThreadPoolExecutor(self.threads) if self.threads > 1 else contextlib.nullcontext(_Plain())


class _Plain:
    map = staticmethod(map)


def ours(case: Case) -> Cost:
    """The publisher's own steps between snapshot and STABLE, and the engine's between plan and read-back."""
    old = {name: local(tensor, copy=False) for name, tensor in case.base.items()}
    now = {name: local(tensor, copy=False) for name, tensor in case.new.items()}
    with case.pool() as pool:
        begin = case.clock()
        names = lanes_of(now)
        digested_s = case.clock() - begin
        part = payload.write_delta(case.folder, 0, now, old, names, 1, pool.map, case.encoder)
        manifest = Manifest("bench", 1, 0, "delta", payload.merge([part]), part.files)
        (case.folder / "manifest.json").write_bytes(manifest.to_bytes())
        encode_s = case.clock() - begin
    plan = {"version": 1, "kind": "delta", "base_version": 0, "steps": ["manifest.json"], "model_path": None}
    (case.folder / "next.json").write_bytes(seal(plan))
    hands = None
    if case.device == "cuda":
        hands = Resident({name: apply.placements(tensor) for name, tensor in case.engine.items()})
        hands.digests(list(case.engine))  # its tables are made once in an engine's life
    begin = case.clock()
    prepared = case.read(case.folder)
    if hands is not None:
        hands.load(prepared)
    ready = case.clock()
    done = apply.apply(case.folder, case.engine, 0, prepared, hands)
    end = case.clock()
    more = {
        "digest": digested_s, "diff": part.diff_s, "coding": part.encode_s, "before pause": ready - begin,
        "in pause": end - ready,
    }  # fmt: skip
    more |= {"apply": done.apply_s, "verify": done.verify_s}
    return Cost(manifest.payload_bytes, encode_s, end - begin, more)


def index_value(case: Case) -> Cost:
    begin = case.clock()
    sent = []
    for name, tensor in case.new.items():
        new, old = bits_torch(tensor.view(-1)), bits_torch(case.base[name].view(-1))
        at = torch.nonzero(new != old).view(-1)
        sent.append((name, at.to(torch.int32).cpu().numpy().tobytes(), new[at].cpu().numpy().tobytes()))
    middle = case.clock()
    for name, indices, values in sent:
        if not indices:
            continue
        bits = bits_torch(case.engine[name].view(-1))
        at = torch.frombuffer(bytearray(indices), dtype=torch.int32).to(case.device).long()
        bits[at] = torch.frombuffer(bytearray(values), dtype=bits.dtype).to(case.device)
    return Cost(sum(len(i) + len(v) for _, i, v in sent), middle - begin, case.clock() - middle)


def xor_zstd(case: Case) -> Cost:
    def pack(pair: tuple[torch.Tensor, torch.Tensor]) -> bytes:
        frame: bytes = zstandard.ZstdCompressor(level=1).compress((pair[0] ^ pair[1]).cpu().numpy().data)
        return frame

    def unpack(pair: tuple[torch.Tensor, bytes]) -> tuple[torch.Tensor, torch.Tensor]:
        plain = zstandard.ZstdDecompressor().decompress(pair[1])
        return pair[0], torch.frombuffer(bytearray(plain), dtype=pair[0].dtype)

    step = 1 << 22
    parts = [
        [bits_torch(side[name].view(-1))[at : at + step] for side in (case.base, case.new, case.engine)]
        for name, tensor in case.new.items()
        for at in range(0, tensor.numel(), step)
    ]
    with case.pool() as pool:
        begin = case.clock()
        sent = list(pool.map(pack, [(old, new) for old, new, _ in parts]))
        middle = case.clock()
        for target, change in pool.map(unpack, [(p[2], blob) for p, blob in zip(parts, sent, strict=True)]):
            target ^= change.to(case.device)
        end = case.clock()
    return Cost(sum(map(len, sent)), middle - begin, end - middle)


def safetensors(case: Case) -> Cost:
    path = case.folder / "full.safetensors"
    begin = case.clock()
    save_file({name: tensor.cpu() for name, tensor in case.new.items()}, path)
    middle = case.clock()
    for name, tensor in load_file(path, device=case.device).items():
        case.engine[name].copy_(tensor)
    end = case.clock()
    size = path.stat().st_size
    path.unlink()
    return Cost(size, middle - begin, end - middle)


METHODS: dict[str, Callable[[Case], Cost]] = {
    "ours": ours, "index+value": index_value, "xor+zstd": xor_zstd, "safetensors": safetensors,
}  # fmt: skip


def measure(
    shape: str, device: str, threads: int, repeats: Mapping[str, int], folder: Path, until: float
) -> list[dict[str, Any]]:
    """A row for each update and method that fits before `until`; the others are named."""
    order = [(update, method) for update in UPDATES for method in METHODS]
    if device == "cuda":  # weights are drawn in no time there, and ours comes first
        order.sort(key=lambda pair: list(METHODS).index(pair[1]))
    rows: list[dict[str, Any]] = []
    drawn: tuple[tuple[float, int], Weights, Weights] | None = None
    took: dict[str, float] = {}
    with contextlib.closing(DecoderProcess()) as child, contextlib.closing(EncoderProcess(threads)) as encoder:
        read = child.prepare if device == "cuda" else apply.prepare
        for (lr, steps), method in order:
            begin = time.perf_counter()
            if begin + took.get(method, 0.0) > until:
                say(not_run=f"{method} at {lr:g}, {steps} steps: the time would not suffice")
                continue
            if drawn is None or drawn[0] != (lr, steps):
                drawn = None  # room for the next
                drawn = ((lr, steps), *versions(shape, lr, steps, device))
            _, base, new = drawn
            changed = sum(int((bits_torch(base[n]) != bits_torch(new[n])).sum()) for n in base)
            found: list[Cost] = []
            lossless = True
            for _ in range(repeats[method]):
                engine = {name: tensor.clone() for name, tensor in base.items()}
                found.append(METHODS[method](Case(base, new, engine, device, threads, folder, read, encoder)))
                lossless = lossless and same_bits(engine, new)
            best, quickest = min(found, key=lambda c: c.encode_s), min(found, key=lambda c: c.decode_s)
            elements = sum(t.numel() for t in base.values())
            rows.append({
                "method": method, "lr": lr, "steps_per_version": steps, "density": changed / elements,
                "bytes": best.bytes, "bytes_per_changed": best.bytes / changed, "encode_s": best.encode_s,
                "decode_s": quickest.decode_s, "lossless": lossless, "full": sum(t.nbytes for t in base.values()),
                "more": {k: (best if k in ENCODING else quickest).more[k] for k in best.more},
            })  # fmt: skip
            took[method] = time.perf_counter() - begin
            if shape == "4b":
                say(rows[-1])
    return sorted(rows, key=lambda row: UPDATES.index((row["lr"], row["steps_per_version"])))


def in_full(weights: dict[str, torch.Tensor], threads: int, folder: Path) -> dict[str, float]:
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
    app = Starlette(routes=[Mount("/weights", weights_app(folder / "weights"))])
    files = ServerThread(app, ports.bind("127.0.0.1")).start()
    ways: list[tuple[str, dict[str, Any]]] = [
        ("fetch over HTTP", {"link_bytes": None}),
        ("fetch on the same disk", {"link_bytes": 1 << 20}),
    ]
    for what, how in ways:
        stage = folder / what.replace(" ", "-")
        receiver = Subscriber(files.url, "bench-token", stage, **how)
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


def flat(row: dict[str, Any]) -> dict[str, Any]:
    """A row for a reader: megabytes, rates, and the parts of both sides in ms."""
    full, parts = row["full"], {f"{name}_ms": 1000 * seconds for name, seconds in row["more"].items()}
    shown = {key: value for key, value in row.items() if key not in ("full", "more", "bytes")}
    shown |= {"mb": row["bytes"] / 1e6, "smaller": full / row["bytes"]}
    return shown | {f"{side}_mb_per_s": full / 1e6 / row[f"{side}_s"] for side in ("encode", "decode")} | parts


def main() -> None:
    began = time.perf_counter()
    parser = options(
        __doc__, device=("cpu", "cuda"), threads={int: "that compress: 1 on a CPU, up to 16 beside a GPU"}, repeats=int,
        quick={False: "10 M elements, each method once"}, limit_s={float: "85 for 4b, else none"},
        full={False: "a full version, stage by stage"}, copies={3: "of the tensors, of --full"},
    )  # fmt: skip
    parser.add_argument("--shape", choices=list(SHAPES))
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.full:
        base, _ = versions("0.1b", 1e-6, 1, "cpu")
        weights = {f"{k}.{name}": tensor.clone() for k in range(args.copies) for name, tensor in base.items()}
        size, runs = sum(tensor.nbytes for tensor in weights.values()), []
        for _ in range(args.repeats or 2):
            with folder(in_memory=True) as name:
                runs.append(in_full(weights, args.threads or 1, name))
        best = {what: min(run[what] for run in runs) for what in runs[0]}
        rows = [{"stage": what, "seconds": spent, "gb_per_s": size / 1e9 / spent} for what, spent in best.items()]
        show(args, {"bytes": size, "rows": rows})
        return
    shape = args.shape or ("0.01b" if args.quick else "0.1b")
    until = began + (args.limit_s or (85.0 if shape == "4b" else math.inf))
    threads = args.threads or (1 if args.device == "cpu" else min(16, os.cpu_count() or 1))
    often = args.repeats or (1 if args.quick else 3)
    repeats = {name: args.repeats or (2 if name == "ours" else 1) if shape == "4b" else often for name in METHODS}
    shm = Path("/dev/shm")
    room = shm.is_dir() and shutil.disk_usage(shm).free > 20 * (1 << 30 if shape == "4b" else 1 << 26)
    with folder(in_memory=room) as name:
        rows = measure(shape, args.device, threads, repeats, name, until)
    show(args, {"rows": rows if args.json else [flat(row) for row in rows]})
    if not all(row["lossless"] for row in rows):
        sys.exit("a method did not give the new version back bit for bit")


if __name__ == "__main__":
    main()
