"""Ten thousand damages of what travels and of what it is applied to: is every one of them detected?

    python bench/weights/damage.py [--trials 10000] [--seed 0] [--json]

A chain of two deltas is staged for an engine of nine tensors (fused ones, fp32 among bf16), once as one rank writes it
and once as three ranks do. Each trial damages one thing and asks the engine to apply:

    payload, manifest, plan     one bit, one byte, a cut, two blocks that change places
    files                       two whole files in each other's place, or one from another version or attempt
    base                        the same four, in the memory of one of the engine's own tensors

Detected means: an error, `result.json` says so, and (unless the base was what was damaged) not one bit of the engine
has changed. Every hundredth trial the engine is then given a full version and must hold it bit for bit. Beside the
trials, a tenth as many payloads are damaged and all their checksums made right again, so that the checks behind them
are reached: decoding and the digests of the result. There an error is asked for or the right weights, since a flipped
bit may be one that means nothing to zstd. Exits 1 when anything passes.
"""

from __future__ import annotations

import json
import shutil
import sys
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xxhash

from astracli.errors import RunFailed
from astracli.weights.format.digest import bits_of, digest_tensor
from astracli.weights.format.manifest import Manifest, hash_file, seal, unseal, version_name
from astracli.weights.publish.publisher import Publisher
from astracli.weights.publish.snapshot import Shard
from astracli.weights.receive import apply

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from shared import folder, options, show

Weights = dict[str, torch.Tensor]
SHAPES = {
    "model.embed_tokens.weight": (40, 16), "model.layers.0.self_attn.q_proj.weight": (32, 16),
    "model.layers.0.self_attn.k_proj.weight": (8, 16), "model.layers.0.self_attn.v_proj.weight": (8, 16),
    "model.layers.0.mlp.gate_proj.weight": (24, 16), "model.layers.0.mlp.up_proj.weight": (24, 16),
    "model.layers.0.linear_attn.conv1d.weight": (20, 1, 4), "model.layers.0.linear_attn.A_log": (6,),
    "model.norm.weight": (16,),
}  # fmt: skip
FULL_EVERY = 100
"""Trials between two resyncs in full."""


def chain(count: int, seed: int) -> list[Weights]:
    """Versions of the same tensors; a tenth of the values changes from one to the next."""
    draw = torch.Generator().manual_seed(seed)
    found = [
        {
            name: torch.randn(shape, generator=draw).to(torch.float32 if "A_log" in name else torch.bfloat16)
            for name, shape in SHAPES.items()
        }
    ]
    while len(found) < count:
        found.append(
            {
                name: torch.where(torch.rand(tensor.shape, generator=draw) < 0.1, tensor * 1.02, tensor)
                for name, tensor in found[-1].items()
            }
        )
    return found


def publish(directory: Path, versions: list[Weights], ranks: int) -> None:
    """Every version, by as many ranks, each with its rows of every tensor."""

    def part(tensor: torch.Tensor, rank: int) -> Shard:
        rows = -(-len(tensor) // ranks)
        cut = tensor[rank * rows : (rank + 1) * rows]
        return Shard(cut.reshape(-1), min(rank * rows, len(tensor)) * tensor[0].numel(), tuple(tensor.shape))

    def run(rank: int) -> None:
        publisher = Publisher(directory, keep=100, rank=rank, world_size=ranks, session="bench", model_name="bench")
        for version, weights in enumerate(versions):
            publisher.publish(version, {name: part(tensor, rank) for name, tensor in weights.items()})
        publisher.close()

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(ranks)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def same(one: Weights, two: Weights) -> bool:
    return all(digest_tensor(one[name]) == digest_tensor(two[name]) for name in two)


def damage(draw: np.random.Generator, blob: bytes) -> tuple[str, bytes]:
    """(kind, blob): a flipped bit, another byte, a cut, or two blocks that have changed places."""
    kind, size, out = ("bit", "byte", "cut", "blocks")[draw.integers(4)], len(blob), bytearray(blob)
    if kind == "bit":
        out[draw.integers(size)] ^= 1 << draw.integers(8)
    elif kind == "byte":
        out[draw.integers(size)] = draw.integers(256)
    elif kind == "cut":
        del out[draw.integers(size) :]
    else:
        width = int(draw.integers(1, max(2, size // 4)))
        one, two = sorted(draw.integers(0, size - width, size=2).tolist())
        if one + width <= two:
            out[one : one + width], out[two : two + width] = out[two : two + width], out[one : one + width]
    return kind, bytes(out)


class Stage:
    """A chain of two deltas staged for an engine that holds version 0, and files of another attempt at it."""

    def __init__(self, folder: Path, ranks: int, seed: int):
        self.versions = chain(4, seed)
        publish(folder / "weights", self.versions, ranks)
        publish(folder / "other", [self.versions[0], *chain(3, seed + 1)[1:]], ranks)
        self.where = folder / "stage"
        self.where.mkdir()
        for version in (1, 2):
            shutil.copytree(folder / "weights" / version_name(version), self.where / version_name(version))
        steps = [f"{version_name(v)}/manifest.json" for v in (1, 2)]
        self.plan(steps, 2, "delta", 0)
        paths = [p for p in sorted(self.where.rglob("*.*")) if p.name != "STABLE"]
        self.content = {path: path.read_bytes() for path in paths}
        self.strange = [p.read_bytes() for p in sorted((folder / "other").rglob("*.*")) if p.name != "STABLE"]
        self.strange += [p.read_bytes() for p in sorted((folder / "weights" / version_name(3)).glob("*.*"))]
        self.full = folder / "full"
        shutil.copytree(folder / "weights" / version_name(0), self.full / version_name(0))
        self.plan(["v000000/manifest.full.json"], 0, "full", None, self.full)

    def plan(self, steps: list[str], version: int, kind: str, base: int | None, where: Path | None = None) -> None:
        doc = {"version": version, "kind": kind, "base_version": base, "steps": steps, "model_path": None}
        ((where or self.where) / "next.json").write_bytes(seal(doc))

    def engine(self) -> Weights:
        return {name: tensor.clone() for name, tensor in self.versions[0].items()}

    def mend(self) -> None:
        for path, blob in self.content.items():
            if path.read_bytes() != blob:
                path.write_bytes(blob)


def trial(stage: Stage, engine: Weights, draw: np.random.Generator) -> str:
    """Damage one thing; what it was. An empty text when the dice changed no byte."""
    what = ("file", "files", "base")[draw.choice(3, p=[0.6, 0.1, 0.3])]
    paths = list(stage.content)
    path = paths[draw.integers(len(paths))]
    if what == "base":
        name = list(engine)[draw.integers(len(engine))]
        view = bits_of(engine[name]).view(np.uint8)
        kind, blob = damage(draw, view.tobytes())
        blob += bytes(len(view) - len(blob))  # a cut base reads as zeros
        if blob == view.tobytes():
            return ""
        view[:] = np.frombuffer(blob, np.uint8)
        return f"base, {kind}"
    if what == "files":
        other = paths[draw.integers(len(paths))]
        blob = stage.content[other] if draw.random() < 0.5 else stage.strange[draw.integers(len(stage.strange))]
        if blob == stage.content[path]:
            return ""
        path.write_bytes(blob)
        return "files in another's place"
    kind, blob = damage(draw, stage.content[path])
    if blob == stage.content[path]:
        return ""
    path.write_bytes(blob)
    return f"{'payload' if path.suffix == '.bin' else 'plan' if path.parent == stage.where else 'manifest'}, {kind}"


def sealed_again(stage: Stage, draw: np.random.Generator) -> None:
    """A damaged payload whose own and whose manifest's checksums agree with it: written well, computed wrongly."""
    manifests = [path for path in stage.content if path.name == "manifest.json"]
    path = manifests[draw.integers(len(manifests))]
    manifest = Manifest.from_bytes(stage.content[path])
    tensors = [t for t in manifest.tensors if t.pieces]
    tensor = tensors[draw.integers(len(tensors))]
    piece = tensor.pieces[draw.integers(len(tensor.pieces))]
    payload = path.parent / piece.file
    blob = bytearray(stage.content[payload])
    at = piece.offset + int(draw.integers(piece.bytes - 8))
    blob[at] ^= 1 << draw.integers(8)
    end = piece.offset + piece.bytes
    blob[end - 8 : end] = xxhash.xxh3_64_intdigest(bytes(blob[piece.offset : end - 8])).to_bytes(8, "little")
    payload.write_bytes(blob)
    doc = unseal(stage.content[path], "manifest")
    doc["files"][piece.file]["xxh3"] = hash_file(payload)
    for entry in doc["tensors"]:
        for other in entry["pieces"]:
            if entry["name"] == tensor.name and other["start"] == piece.start:
                other["xxh3"] = xxhash.xxh3_128_hexdigest(bytes(blob[piece.offset : end]))
    path.write_bytes(seal(doc))


def attempt(stage: Stage, engine: Weights, untouched: bool) -> tuple[str, str]:
    """(error's name, what is wrong with it): apply what is staged. No name: it was applied."""
    before = {name: tensor.clone() for name, tensor in engine.items()}
    try:
        apply.apply(stage.where, engine, 0)
    except RunFailed as error:
        told = not json.loads((stage.where / "result.json").read_text())["ok"]
        wrong = "" if told else "the outcome does not say so"
        return type(error).__name__, wrong or ("weights were touched" if untouched and not same(engine, before) else "")
    finally:
        stage.mend()
    return "", "applied"


def run(trials: int, seed: int, folder: Path) -> dict[str, Any]:
    draw = np.random.default_rng(seed)
    stages = []
    for ranks in (1, 3):
        (folder / str(ranks)).mkdir()
        stages.append(Stage(folder / str(ranks), ranks, seed))
    detected: Counter[str] = Counter()
    errors: Counter[str] = Counter()
    missed: list[str] = []
    resyncs = 0
    while detected.total() + len(missed) < trials:
        stage = stages[draw.integers(len(stages))]
        engine = stage.engine()
        what = trial(stage, engine, draw)
        if not what:
            continue
        error, wrong = attempt(stage, engine, untouched=not what.startswith("base"))
        if wrong:
            missed.append(f"{what}: {wrong}")
            continue
        detected[what] += 1
        errors[error] += 1
        if detected.total() % FULL_EVERY == 0:
            apply.apply(stage.full, engine, None)
            resyncs += 1
            if not same(engine, stage.versions[0]):
                missed.append("a resync in full did not put the weights right")
    sealed: Counter[str] = Counter()
    for _ in range(trials // 10):
        stage = stages[draw.integers(len(stages))]
        engine = stage.engine()
        sealed_again(stage, draw)
        error, wrong = attempt(stage, engine, untouched=False)
        if not error and same(engine, stage.versions[2]):
            error = "the right weights"
        elif wrong:
            missed.append(f"sealed again: {wrong}")
        sealed[error] += 1
    found = {"detected": dict(detected), "errors": dict(errors), "resyncs": resyncs, "sealed_again": dict(sealed)}
    return {"trials": trials, **found, "missed": missed}


def main() -> None:
    args = options(__doc__, trials=10_000, seed=0).parse_args()
    begin = time.perf_counter()
    with folder() as name:
        found = run(args.trials, args.seed, name)
    show(args, found | {"seconds": time.perf_counter() - begin})
    sys.exit(1 if found["missed"] else 0)


if __name__ == "__main__":
    main()
