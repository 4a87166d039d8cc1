"""Versions of a small model, staged as a subscriber on the same disk would, and an engine that holds them fused."""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from astracli.process.atomic import write_atomic
from astracli.weights.format.digest import digest_tensor, to_hex
from astracli.weights.format.manifest import Manifest, TensorEntry, seal, version_name
from astracli.weights.publish.publisher import Publisher

sys.path.append(str(Path(__file__).parents[1] / "bench"))
from weights.damage import SHAPES

Weights = dict[str, torch.Tensor]


def first_weights() -> Weights:
    """HF tensors of a model that the fake engine below holds fused."""
    draw = torch.Generator().manual_seed(0)
    return {
        name: torch.randn(shape, generator=draw).to(torch.float32 if "A_log" in name else torch.bfloat16)
        for name, shape in SHAPES.items()
    }


def step(weights: Weights, seed: int) -> Weights:
    draw = torch.Generator().manual_seed(seed)
    return {
        name: torch.where(torch.rand(tensor.shape, generator=draw) < 0.1, tensor * 1.02, tensor)
        for name, tensor in weights.items()
    }


def chain(count: int) -> list[Weights]:
    found = [first_weights()]
    while len(found) < count:
        found.append(step(found[-1], len(found)))
    return found


def stage(directory: Path, versions: list[Weights], steps: list[str], **options: Any) -> Path:
    """Publish `versions` and stage `steps` of them, as a subscriber on the same disk would."""
    publisher = Publisher(directory / "weights", model_name="fake", keep=100, **options)
    for version, weights in enumerate(versions):
        publisher.publish(version, weights)
    publisher.close()
    return restage(directory, steps)


def restage(directory: Path, steps: list[str]) -> Path:
    target = directory / "stage"
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir(exist_ok=True)  # a watcher may have written to it meanwhile
    for name in {s.split("/")[0] for s in steps}:
        shutil.copytree(directory / "weights" / name, target / name)
    full = steps[0].endswith("full.json")
    base = Manifest.from_bytes((target / steps[0]).read_bytes()).base_version
    version = int(steps[-1][1:7])
    kind = "full" if full else "delta"
    plan = {"version": version, "kind": kind, "base_version": base, "steps": steps, "model_path": None}
    write_atomic(target / "next.json", seal(plan))  # a watcher may look at any moment
    return target


def delta(version: int) -> str:
    return f"{version_name(version)}/manifest.json"


class FusedModel(nn.Module):
    """Holds weights as SGLang does: q/k/v and gate/up fused, conv1d squeezed and written by slice assignment, names
    it does not know skipped without a word."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Parameter(torch.zeros(40, 16).bfloat16())
        self.qkv = nn.Parameter(torch.zeros(48, 16).bfloat16())
        self.gate_up = nn.Parameter(torch.zeros(48, 16).bfloat16())
        self.conv = nn.Parameter(torch.zeros(20, 4).bfloat16())
        self.a_log = nn.Parameter(torch.zeros(6))
        self.norm = nn.Parameter(torch.zeros(16).bfloat16())

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        rows = {"q_proj": (self.qkv, 0, 32), "k_proj": (self.qkv, 32, 8), "v_proj": (self.qkv, 40, 8)}
        rows |= {"gate_proj": (self.gate_up, 0, 24), "up_proj": (self.gate_up, 24, 24)}
        whole = {"model.embed_tokens.weight": self.embed, "model.norm.weight": self.norm}
        whole |= {"model.layers.0.linear_attn.A_log": self.a_log}
        for name, loaded in weights:
            part = next((p for p in rows if p in name), None)
            if part:
                parameter, start, size = rows[part]
                parameter.data.narrow(0, start, size).copy_(loaded)
            elif "conv1d" in name:  # in three blocks, as a sharded loader does
                for low, high in ((0, 8), (8, 12), (12, 20)):
                    self.conv.data[low:high] = loaded.squeeze(1)[low:high]
            elif name in whole:
                assert whole[name].shape == loaded.shape
                whole[name].data.copy_(loaded)

    def hf(self) -> Weights:
        """What it holds, under HF names, by hand."""
        prefix = "model.layers.0."
        return {
            "model.embed_tokens.weight": self.embed.data,
            prefix + "self_attn.q_proj.weight": self.qkv.data[:32],
            prefix + "self_attn.k_proj.weight": self.qkv.data[32:40],
            prefix + "self_attn.v_proj.weight": self.qkv.data[40:],
            prefix + "mlp.gate_proj.weight": self.gate_up.data[:24],
            prefix + "mlp.up_proj.weight": self.gate_up.data[24:],
            prefix + "linear_attn.conv1d.weight": self.conv.data.unsqueeze(1),
            prefix + "linear_attn.A_log": self.a_log.data,
            "model.norm.weight": self.norm.data,
        }


def entries(weights: Weights) -> list[TensorEntry]:
    return [
        TensorEntry(name, str(t.dtype).removeprefix("torch."), tuple(t.shape), "none", 0, to_hex(digest_tensor(t)), ())
        for name, t in weights.items()
    ]


def wait_for(path: Path) -> str:
    deadline = time.monotonic() + 60
    while not path.exists() and time.monotonic() < deadline:
        time.sleep(0.005)
    return path.read_text()
