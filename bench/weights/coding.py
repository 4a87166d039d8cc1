"""What the children of trainer and engine do with a version, by threads and by processes, without a GPU.

    python bench/weights/coding.py [--pieces 128] [--densities 0.0096 0.0294 0.1065] [--workers 1 2 8] [--json]

The gaps and steps of `--pieces` pieces of 4 Mi elements at random places (a 4.2 B model has 1003), in one table each:

    code     `coder`'s compression of all planes: `python` hands pieces to threads of Python, as it did; `zstd` asks for
             64 pieces at once in as many threads of zstd's own, as it does
    decode   `decoder`'s reading of the file that came of it: checksums, zstd, indices and values in shared memory:
             `threads` of Python, as it did; `forks`, as it does

Seconds are the median of `--rounds`, all ways in turn, scaled to a whole version of 1003 pieces.
"""

from __future__ import annotations

import contextlib
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # as in the children: nobody forks beside threads

import numpy as np
import xxhash

from astracli.weights.format import container, flat
from astracli.weights.format.manifest import FileEntry, Manifest, Piece, TensorEntry, seal
from astracli.weights.publish import coder
from astracli.weights.receive import decoder, reading

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from shared import folder, options, show

SIZE = 1 << 22
PIECES_OF_4B = 1003
AT_ONCE = 64


def block_of(density: float, pieces: int, draw: np.random.Generator) -> tuple[np.ndarray[Any, Any], container.Work]:
    """The changes of some pieces as a GPU leaves them for the coder."""
    gaps = [draw.geometric(density, int(SIZE * density * 0.99)) - 1 for _ in range(pieces)]
    gaps = [g[: np.searchsorted(np.cumsum(g + 1), SIZE)] for g in gaps]
    far = [g[g >= container.ESCAPE].astype(np.int32) for g in gaps]
    ends = np.cumsum([0, *map(len, gaps)])
    steps = draw.choice(np.arange(1, 5, dtype=np.uint8), ends[-1], p=[0.45, 0.45, 0.05, 0.05])
    planes = (
        np.minimum(np.concatenate(gaps), container.ESCAPE).astype(np.uint8), np.concatenate(far),
        np.cumsum([len(f) for f in far]).astype(np.int32), np.concatenate([steps, np.zeros_like(steps)]),
    )  # fmt: skip
    arrays = [np.pad(p.view(np.uint8), (0, -p.nbytes % 8)) for p in planes]
    starts = np.cumsum([0, *map(len, arrays)])
    described = [(k * SIZE, SIZE, 2, int(ends[k]), int(ends[k + 1]), -1, -1) for k in range(pieces)]
    return np.concatenate(arrays), container.Work(0, container.Planes(*map(int, starts[:4]), int(ends[-1])), described)


def one_by_one(memory: np.ndarray[Any, Any], work: container.Work) -> Iterator[Callable[[], Any]]:
    """A job a piece, for threads of Python."""
    at = work.planes
    assert at is not None
    up_to = [0, *memory[at.up_to :][: 4 * len(work.pieces)].view(np.int32).tolist()]
    for k, (_, length, _, low, high, _, _) in enumerate(work.pieces):
        short = memory[at.short + low : at.short + high]
        long = memory[at.long + 4 * up_to[k] : at.long + 4 * up_to[k + 1]].view(np.int32)
        values = [memory[at.values + byte * at.changes + low : at.values + byte * at.changes + high] for byte in (0, 1)]
        planes, counts = container.list_planes(short, long, values), (length, len(short), len(long))
        yield partial(_assembled, planes, counts)


def _assembled(planes: list[np.ndarray[Any, Any]], counts: tuple[int, int, int]) -> bytes:
    return container.put_together("gap-ulp", *counts, 2, [container.deflate(plane, 1) for plane in planes])


def code(memory: np.ndarray[Any, Any], works: int, work: container.Work, way: str, workers: int) -> list[bytes]:
    if way == "python":
        with ThreadPoolExecutor(workers) as pool:
            jobs = [job for _ in range(works) for job in one_by_one(memory, work)]
            return list(pool.map(lambda job: job(), jobs))
    with ThreadPoolExecutor(coder._TOGETHER) as pool:
        wide = [job for _ in range(works) for job in coder.encoded(memory, work, 1, workers)[1]]
        return [found.payload for told in pool.map(lambda job: job(), wide) for _, found in told]


def stage(folder: Path, payloads: list[bytes], counts: list[int]) -> None:
    """A staged version 1 of one tensor that consists of these pieces."""
    (folder / "v1").mkdir()
    name, at, pieces = "delta-00000.bin", 0, []
    for k, payload in enumerate(payloads):
        where = (k * SIZE, SIZE, name, at, len(payload), xxhash.xxh3_128_hexdigest(payload))
        pieces.append(Piece(*where, "gap-ulp", counts[k]))
        at += len(payload)
    blob = b"".join(payloads)
    (folder / "v1" / name).write_bytes(blob)
    tensor = TensorEntry("w", "bfloat16", (len(payloads) * SIZE,), "gap-ulp", sum(counts), "00" * 16, tuple(pieces))
    files = {name: FileEntry(at, xxhash.xxh3_128_hexdigest(blob))}
    (folder / "v1" / "manifest.json").write_bytes(Manifest("m", 1, 0, "delta", (tensor,), files).to_bytes())
    plan = {"version": 1, "kind": "delta", "base_version": 0, "steps": ["v1/manifest.json"], "model_path": None}
    (folder / reading.NEXT).write_bytes(seal(plan))


def in_threads(workers: int) -> Callable[..., None]:
    def fill(jobs: decoder.Jobs, groups: dict[int, flat.WidthGroup], _: int) -> None:
        with ThreadPoolExecutor(workers) as pool:
            for _ in pool.map(lambda job: decoder._fill_here([job], groups), jobs):
                pass

    return fill


def decode(folder: Path, way: str, workers: int) -> None:
    with contextlib.ExitStack() as own:
        if way == "threads":
            own.enter_context(patch.object(decoder, "_fill", in_threads(workers)))
        decoder._decode(folder, workers, own)


def main() -> None:
    args = options(__doc__, pieces=128, densities=[0.0096, 0.0294, 0.1065], workers=[1, 2, 8], rounds=3).parse_args()
    rows = []
    for density in args.densities:
        each = min(args.pieces, AT_ONCE)
        works = max(1, args.pieces // each)
        memory, work = block_of(density, each, np.random.default_rng(0))
        counts = [high - low for *_, low, high, _, _ in work.pieces] * works
        with folder(in_memory=True) as name:
            stage(name, code(memory, works, work, "zstd", 1), counts)
            ways = [
                (what, way, workers)
                for what, kinds in (("code", ("python", "zstd")), ("decode", ("threads", "forks")))
                for way in kinds
                for workers in args.workers
            ]
            seconds: dict[tuple[str, str, int], list[float]] = {key: [] for key in ways}
            for _ in range(args.rounds):
                for what, way, workers in ways:
                    begin = time.perf_counter()
                    if what == "code":
                        code(memory, works, work, way, workers)
                    else:
                        decode(name, way, workers)
                    spent = time.perf_counter() - begin
                    seconds[what, way, workers].append(spent * PIECES_OF_4B / (works * each))
        for (what, way, workers), all_of in seconds.items():
            row = {"density": density, "what": what, "way": way, "workers": workers}
            rows.append(row | {"seconds": statistics.median(all_of)})
    show(args, {"rows": rows})


if __name__ == "__main__":
    main()
