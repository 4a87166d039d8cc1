"""What a version of the weights costs on the wire: ours beside three other ways, on the same data.

    python bench/weights.py [--quick] [--json] [--shape 0.1b | 4b | 0.01b] [--device cpu | cuda] [--threads N]

Makes weights in the shapes of a Qwen3.5 config (no checkpoint is needed) and updates them as Adam would: fp32 masters,
moments that have settled on gradients of pure noise, learning rates 1e-6 and 5e-6, one and four steps a version. Then

    ours          publisher's delta and engine's apply: digests of every tensor on both sides, files, checksums
    index+value   u32 index and new value of each changed element: 6 bytes for bf16 (AstraFlow, verl)
    xor+zstd      XOR with the base, zstd level 1 (slime, miles, SkyRL); no digest
    safetensors   the whole version; no digest

`bytes` are payload; `encode_s` goes from two versions in memory to files or buffers, `decode_s` from those to the new
version in the engine's memory. On a CPU everything runs on `--threads` 1; MB/s are bytes of the full version over
seconds. With --device cuda both versions and the engine's weights lie on the GPU; the table then also splits encode
into diff and coding, and decode into what happens before the pause (in the decoder's process, as in an engine) and in
it. Best of `--repeats`; --quick: 10 M elements once, some seconds on two cores. --shape 4b tells every row as soon as
it is known and leaves out what does not fit into --limit-s, ours first.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import zstandard
from safetensors.torch import load_file, save_file

from astracli.models import registry
from astracli.weights.device.difference import bits_torch
from astracli.weights.device.resident import Resident
from astracli.weights.format import digest
from astracli.weights.format.manifest import seal
from astracli.weights.publish import payload
from astracli.weights.publish.encoder import EncoderProcess
from astracli.weights.publish.snapshot import local
from astracli.weights.receive import apply
from astracli.weights.receive.decoder import DecoderProcess

SHAPES = {
    "4b": {
        "hidden_size": 2560, "intermediate_size": 9216, "num_hidden_layers": 32, "num_attention_heads": 16,
        "num_key_value_heads": 4, "head_dim": 256, "linear_num_key_heads": 16, "linear_num_value_heads": 32,
        "linear_key_head_dim": 128, "linear_value_head_dim": 128, "vocab_size": 248320,
    },
    "0.1b": {
        "hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 8, "num_attention_heads": 4,
        "num_key_value_heads": 1, "head_dim": 128, "linear_num_key_heads": 4, "linear_num_value_heads": 8,
        "linear_key_head_dim": 128, "linear_value_head_dim": 128, "vocab_size": 49152,
    },
    "0.01b": {
        "hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 8, "num_attention_heads": 2,
        "num_key_value_heads": 1, "head_dim": 128, "linear_num_key_heads": 2, "linear_num_value_heads": 4,
        "linear_key_head_dim": 64, "linear_value_head_dim": 64, "vocab_size": 16384,
    },
    "names": {
        "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 32, "num_attention_heads": 2,
        "num_key_value_heads": 1, "head_dim": 16, "linear_num_key_heads": 2, "linear_num_value_heads": 2,
        "linear_key_head_dim": 16, "linear_value_head_dim": 16, "vocab_size": 64,
    },
}  # fmt: skip
"""`names`: as many tensors as `4b` has, of no size: what is done for each of them."""
UPDATES = [(1e-6, 1), (1e-6, 4), (5e-6, 1), (5e-6, 4)]
"""(learning rate, optimizer steps per version)"""
MOMENT = (0.1 / 1.9) ** 0.5
"""Standard deviation of Adam's settled first moment (beta 0.9) under unit noise; its second moment is then 1."""

ENCODING = ("digest", "diff", "coding")
"""Parts of encode in `Cost.more`; the rest are parts of decode."""

Weights = dict[str, torch.Tensor]


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


def versions(shape: str, lr: float, steps: int, device: str) -> tuple[Weights, Weights]:
    """Published weights before and after `steps` Adam steps; the same for the same arguments."""
    config = {"model_type": "qwen3_5_text", "tie_word_embeddings": True, **SHAPES[shape]}
    adapter = next(a for item in registry.installed() if (a := item.adapter) and "qwen3_5_text" in a.model_types)
    assert adapter.shapes is not None
    draw = torch.Generator(device).manual_seed(0)
    base, new = {}, {}
    for name, size in adapter.shapes(config).items():
        dtype = torch.float32 if any(part in name for part in adapter.keep_fp32) else torch.bfloat16
        center = 1.0 if name.endswith("norm.weight") else 0.0
        master = torch.randn(size, generator=draw, device=device).mul_(0.02).add_(center)
        base[name] = master.to(dtype, copy=True)
        moment = torch.randn(size, generator=draw, device=device).mul_(MOMENT)
        for _ in range(steps):
            moment.mul_(0.9).add_(torch.randn(size, generator=draw, device=device), alpha=0.1)
            master.sub_(moment, alpha=lr)
        new[name] = master.to(dtype)
    return base, new


def same_bits(one: Weights, two: Weights) -> bool:
    flat = [(bits_torch(one[n].view(-1)), bits_torch(two[n].view(-1))) for n in one]
    return one.keys() == two.keys() and all(torch.equal(a, b) for a, b in flat)


# ---- the four ways ---------------------------------------------------------------------------------------------------


def ours(case: Case) -> Cost:
    """The publisher's own steps between snapshot and STABLE, and the engine's between plan and read-back."""
    old = {name: local(tensor, copy=False) for name, tensor in case.base.items()}
    now = {name: local(tensor, copy=False) for name, tensor in case.new.items()}
    with case.pool() as pool:
        begin = case.clock()
        lanes = digest.digest_many([(t.flat, 0) for t in now.values()])
        names = {name: digest.to_hex(found) for name, found in zip(now, lanes, strict=True)}
        digested_s = case.clock() - begin
        part = payload.write_delta(case.folder, 0, now, old, names, 1, pool.map, case.encoder)
        manifest = payload.merge([part], model="bench", version=1, base_version=0, frozen_digests={})
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
        apply.load(prepared, hands)
    ready = case.clock()
    done = apply.apply(case.folder, case.engine, 0, prepared, hands)
    end = case.clock()
    more = {
        "digest": digested_s,
        "diff": part.diff_s,
        "coding": part.encode_s,
        "before pause": ready - begin,
        "in pause": end - ready,
    }
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


# ---- measuring -------------------------------------------------------------------------------------------------------


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
                print(f"not run for want of time: {method} at {lr:g}, {steps} steps", file=sys.stderr, flush=True)
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
                print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
    return sorted(rows, key=lambda row: UPDATES.index((row["lr"], row["steps_per_version"])))


def table(rows: list[Mapping[str, Any]], out: Any) -> None:
    print(
        f"{'method':12} {'lr':>6} {'steps':>5} {'density':>8} {'MB':>9} {'B/changed':>9} {'smaller':>8} "
        f"{'encode s':>9} {'MB/s':>7} {'decode s':>9} {'MB/s':>7} lossless",
        file=out,
    )
    for r in rows:
        print(
            f"{r['method']:12} {r['lr']:6.0e} {r['steps_per_version']:5d} {r['density']:8.2%} {r['bytes'] / 1e6:9.2f} "
            f"{r['bytes_per_changed']:9.2f} {r['full'] / r['bytes']:7.1f}x {r['encode_s']:9.3f} "
            f"{r['full'] / 1e6 / r['encode_s']:7.0f} {r['decode_s']:9.3f} {r['full'] / 1e6 / r['decode_s']:7.0f} "
            f"{'yes' if r['lossless'] else 'NO'}",
            file=out,
        )
        if r["more"]:
            print(" " * 13 + ", ".join(f"{k} {1000 * v:.1f} ms" for k, v in r["more"].items()), file=out)


def main() -> None:
    began = time.perf_counter()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=list(SHAPES))
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--threads", type=int, help="that compress: 1 on a CPU, up to 16 beside a GPU")
    parser.add_argument("--repeats", type=int)
    parser.add_argument("--quick", action="store_true", help="10 M elements, each method once")
    parser.add_argument("--json", action="store_true", help="the rows on stdout, the table on stderr")
    parser.add_argument("--limit-s", type=float, help="85 for 4b, else none")
    args = parser.parse_args()
    torch.set_num_threads(1)
    shape = args.shape or ("0.01b" if args.quick else "0.1b")
    until = began + (args.limit_s or (85.0 if shape == "4b" else math.inf))
    threads = args.threads or (1 if args.device == "cpu" else min(16, os.cpu_count() or 1))
    often = args.repeats or (1 if args.quick else 3)
    repeats = {name: args.repeats or (2 if name == "ours" else 1) if shape == "4b" else often for name in METHODS}
    shm = Path("/dev/shm")
    room = shm.is_dir() and shutil.disk_usage(shm).free > 20 * (1 << 30 if shape == "4b" else 1 << 26)
    with tempfile.TemporaryDirectory(dir=shm if room else None) as folder:
        rows = measure(shape, args.device, threads, repeats, Path(folder), until)
    table(rows, sys.stderr if args.json else sys.stdout)
    if args.json:
        print(json.dumps([{k: v for k, v in row.items() if k not in ("full", "more")} for row in rows]))
    if not all(row["lossless"] for row in rows):
        sys.exit("a method did not give the new version back bit for bit")


if __name__ == "__main__":
    main()
