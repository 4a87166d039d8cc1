"""A tiny policy and made-up groups for the tests of the training room."""

from __future__ import annotations

import os
import tempfile
import textwrap
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import warm

from astracli.adapters.qwen3_5 import ADAPTER, tiny_config
from astracli.config.recipe import Recipe
from astracli.models.adapter import ModelAdapter
from astracli.process.ports import free_ports
from astracli.rl.batch import Batch
from astracli.rl.types import Group, Sample, Segment
from astracli.training import setup
from astracli.training.fsdp import Ranks
from astracli.training.step import Trainer


def recipe(**tables: dict[str, Any]) -> Recipe:
    base: dict[str, Any] = {
        "model": {"path": "unused"},
        "data": {"source": "arithmetic"},
        "rollout": {"group_size": 4, "max_new_tokens": 16, "context_length": 64},
        "train": {
            "steps": 10,
            "batch_groups": 4,
            "minibatches": 2,
            "tokens_per_microbatch": 64,
            "learning_rate": 1e-3,
            "share_prompts": False,  # test_shared_prompts.py has the others
        },
        "algorithm": {"name": "m2po"},
    }
    for name, values in tables.items():
        base[name] = base.get(name, {}) | values
    return Recipe.model_validate(base)


TWO_LAYERS = {
    "num_hidden_layers": 2, "layer_types": ["linear_attention", "full_attention"], "full_attention_interval": 2,
}  # fmt: skip
"""One layer of each kind: a training step on a CPU takes less than half of what the adapter's four layers take."""


def save_model(directory: Path, *, seed: int = 0, std: float = 0.2, **config: Any) -> Path:
    """A random tiny hybrid as a checkpoint on disk; `config` changes its sizes."""
    from transformers import Qwen3_5ForCausalLM, Qwen3_5TextConfig

    torch.manual_seed(seed)
    model = Qwen3_5ForCausalLM(Qwen3_5TextConfig.from_dict(tiny_config() | TWO_LAYERS | config))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1 and "conv1d" not in name:
                parameter.normal_(0.0, std)
    model.save_pretrained(directory)
    return directory


def make_trainer(
    model_dir: Path, chosen: Recipe, ranks: Ranks | None = None, adapter: ModelAdapter = ADAPTER
) -> Trainer:
    return setup.build_trainer(model_dir, adapter, chosen, ranks or Ranks(), attention="sdpa")


def divided(trainer: Trainer, groups: Sequence[Group], step: int = 0) -> Batch:
    """The batch that a trainer makes of the groups."""
    return trainer.divide(groups, step)


def sample_groups(
    trainer: Trainer | None, count: int, *, seed: int, version: int = 0, size: int = 4, vocab: int = 64, first: int = 0
) -> list[Group]:
    """Groups of random completions; with a trainer their log-probabilities are its own, as from a perfect engine."""
    rng = np.random.default_rng(seed)
    groups = []
    for g in range(count):
        prompt = rng.integers(2, vocab, rng.integers(3, 8)).astype(np.int32)
        samples = []
        for s in range(size):
            tokens = rng.integers(2, vocab, rng.integers(2, 14)).astype(np.int32)
            logprobs = np.full(len(tokens), -4.0, np.float32)
            if trainer is not None:
                logprobs = own_logprobs(trainer, prompt, tokens)
            reward = float((s + g) % 2)
            verdict: Any = "right" if reward else "wrong"
            samples.append(Sample(s, [Segment(version, tokens, logprobs)], "stop", reward, verdict))
        groups.append(Group(first + g, f"p{first + g}", prompt, samples, problem="?", answer="!"))
    return groups


def uneven_groups(seed: int) -> list[Group]:
    """Groups of which one sample is far longer than the rest: with a budget of 40 tokens its rank has fewer
    micro-batches than the other."""
    groups = sample_groups(None, 4, seed=seed, version=-1)
    tokens = np.random.default_rng(seed).integers(2, 64, 50).astype(np.int32)
    groups[1].samples[0].segments[0] = Segment(-1, tokens, np.full(50, -4.0, np.float32))
    return groups


@torch.no_grad()
def own_logprobs(trainer: Trainer, prompt: np.ndarray, tokens: np.ndarray) -> np.ndarray:
    """float32 [T] of a completion alone, by the plain forward of the model."""
    row = torch.from_numpy(np.concatenate([prompt, tokens]).astype(np.int64))[None]
    logits: Any = trainer.policy.model(input_ids=row).logits.float()
    chosen = logits[0, len(prompt) - 1 : -1].log_softmax(-1).gather(1, row[0, len(prompt) :, None])[:, 0]
    return chosen.numpy()


def spawn(script: str, arguments: Sequence[str], world_size: int, *, timeout_s: float = 120) -> list[str]:
    """Run a Python script in `world_size` real processes joined over gloo; their stdouts, rank by rank. Each sees one
    GPU, where there are any. They are forks of a process that has imported torch and touched no device."""
    (port,) = free_ports(1, "127.0.0.1")
    common = {"WORLD_SIZE": str(world_size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    with tempfile.TemporaryDirectory() as name:
        folder, children = Path(name), []
        try:
            for rank in range(world_size):
                own = {"RANK": str(rank), "LOCAL_RANK": "0", "CUDA_VISIBLE_DEVICES": str(rank), "OMP_NUM_THREADS": "1"}
                words = ["-c", textwrap.dedent(script), *arguments]
                said = (folder / f"{rank}.out", folder / f"{rank}.err")
                children.append(warm.start(words, *said, env=os.environ | common | own))
            deadline = time.monotonic() + timeout_s
            for rank, child in enumerate(children):
                code = child.wait(max(0.0, deadline - time.monotonic()))
                error = (folder / f"{rank}.err").read_text()
                assert code == 0, f"rank {rank}, exit code {code}: {error[-3000:]}"
            return [(folder / f"{rank}.out").read_text() for rank in range(world_size)]
        finally:
            for child in children:
                warm.end(child)
