"""The trainer that the GPU benchmarks run: its variants, random weights where they are used, and made-up samples."""

from __future__ import annotations

import argparse
import json
import math
import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from shared import more_options, options

from astracli.config.recipe import Recipe
from astracli.models import registry
from astracli.models.adapter import MemoryShape, ModelAdapter
from astracli.plan.draft import TRAINER_ON_GPU
from astracli.process.layout import RESIDENT, Split
from astracli.rl.types import Group, Sample, Segment
from astracli.training import fsdp, setup
from astracli.training.step import Trainer


@dataclass(frozen=True)
class Variant:
    checkpointing: str
    packing: str = "packed"
    boundaries: bool = True
    """False: recurrent layers run through a packed row's boundaries, which trains on leaked state."""
    fused: bool = True
    """False: without the adapter's `prepare_gpu`."""
    split: Split = RESIDENT


VARIANTS = {
    "packed-selective": Variant("selective"), "packed-none": Variant("none"), "packed-full": Variant("full"),
    "padded-selective": Variant("selective", packing="padded"), "plain-modules": Variant("selective", fused=False),
    "leaking": Variant("selective", boundaries=False),
    "moments-on-host": Variant("full", split=Split(moments_on_host=1.0)),
}  # fmt: skip


def join(*, wrapped: bool = False) -> fsdp.Ranks:
    """The only rank, on a GPU where there is one, in the environment that a plan gives its trainer."""
    if torch.version.cuda:
        os.environ.update(TRAINER_ON_GPU)  # before anything asks the driver: torch reads it once
    return fsdp.join("cuda" if torch.cuda.is_available() else "cpu", wrapped=wrapped)


def recipe(variant: Variant, tokens: int, group_size: int, algorithm: str = "m2po", supervised: bool = False) -> Recipe:
    return Recipe.model_validate(
        {
            "model": {"path": "unused"},
            "data": {"source": "arithmetic"},
            "rollout": {"group_size": group_size},
            "train": {
                "steps": 1000,
                "minibatches": 1,
                "tokens_per_microbatch": tokens,
                "learning_rate": 1e-6,
                "activation_checkpointing": variant.checkpointing,
                "packing": variant.packing,
                "share_prompts": False,
                "row_boundaries": "reset" if variant.boundaries else "ignored",
                "parity_tolerance": 1e9,  # no engine drew these samples
            },
            "algorithm": {"name": algorithm},
            **({"sft": {}} if supervised else {}),
        }
    )


def shape_config(adapter: ModelAdapter, shape: str) -> dict[str, Any]:
    if shape == "tiny":
        assert adapter.tiny_config is not None
        return adapter.tiny_config()
    known = next(config for name, config in adapter.known_configs.items() if name.lower().endswith(f"-{shape}"))
    text = dict(known.get("text_config", known))
    return text | {"model_type": f"{known['model_type']}_text" if "text_config" in known else known["model_type"]}


def build(
    adapter: ModelAdapter, config: Mapping[str, Any], variant: Variant, chosen: Recipe, ranks: fsdp.Ranks
) -> Trainer:
    """The product's trainer over random weights made where they are used."""
    from transformers import AutoConfig, AutoModelForCausalLM

    def load(path: Path, *, attention: str) -> Any:
        torch.manual_seed(0)
        settings = AutoConfig.for_model(**config)
        with torch.device(ranks.device):
            model = AutoModelForCausalLM.from_config(settings, dtype=torch.float32, attn_implementation=attention)
        return model

    drawn = replace(adapter, load_for_training=load)
    if not variant.fused:
        drawn = replace(drawn, prepare_gpu=None)
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(dict(config)))
        trainer = setup.build_trainer(Path(folder), drawn, chosen, ranks, attention="sdpa", split=variant.split)
    return trainer


def case_options(doc: str | None, **more: Any) -> argparse.ArgumentParser:
    """The options of a bench that trains made-up samples."""
    parser = options(doc, adapter="qwen3_5", shape={"4b": "`tiny`, or the end of a model id that the adapter knows"})
    return more_options(
        parser, tokens={8192: "of one micro-batch"}, micro_batches={4: "of one step, about"},
        longest={4000: "longest completion, tokens"}, **more,
    )  # fmt: skip


class Case:
    """What the options ask for: adapter, shape, samples and trainers of it on this rank."""

    def __init__(self, args: argparse.Namespace, *, wrapped: bool = False):
        self.args, self.ranks, self.adapter = args, join(wrapped=wrapped), registry.get(args.adapter)
        self.config = shape_config(self.adapter, args.shape)
        self.shape: MemoryShape = self.adapter.memory_shape(self.config)
        self.supervised = bool(getattr(args, "sft", False))
        self.size = 1 if self.supervised else 4 if args.shape == "tiny" else 8

    def groups(self, step: int) -> list[Group]:
        """About the tokens that are asked for, of random samples under weight version `step`; half of every group is
        right."""
        draw, longest, vocabulary = np.random.default_rng(step), self.args.longest, self.shape.vocab_size
        result: list[Group] = []
        left, scale = float(self.args.micro_batches * self.args.tokens), longest / 4000
        while left > 0:
            most = int(scale * math.exp(draw.uniform(math.log(64), math.log(512))))
            prompt = draw.integers(2, vocabulary, max(2, most)).astype(np.int32)
            samples = []
            for s in range(self.size):
                length = max(2, int(scale * math.exp(draw.uniform(math.log(128), math.log(4000)))))
                completion = draw.integers(2, vocabulary, length).astype(np.int32)
                segment = Segment(step, completion, np.full(length, -math.log(vocabulary), np.float32))
                samples.append(Sample(s, [segment], "stop", float(s % 2), "right" if s % 2 else "wrong"))
                left -= len(prompt) + length
            result.append(Group(len(result), f"p{len(result)}", prompt, samples, problem="?", answer="!"))
        return result

    def recipe(self, variant: Variant) -> Recipe:
        return recipe(variant, self.args.tokens, max(2, self.size), supervised=self.supervised)

    def trainer(self, variant: Variant) -> Trainer:
        chosen = self.recipe(variant)
        return build(self.adapter, self.config, variant, chosen, self.ranks)


def settle(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
