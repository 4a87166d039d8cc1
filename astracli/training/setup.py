"""From a checkpoint on disk to a trainer: load, round, shard, optimizer, reference."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch

from astracli.backends import choice as backend
from astracli.config.recipe import Recipe
from astracli.kernels import varlen
from astracli.kernels.cpu import linear
from astracli.models.adapter import ModelAdapter, WireTensor, read_config
from astracli.training.cpu_offload import CpuOffload
from astracli.training.fsdp import Ranks, recompute, shard
from astracli.training.layout import RESIDENT, Split, recomputed
from astracli.training.logprob import PolicyModel
from astracli.training.optimizer import DTYPES, Masters
from astracli.training.step import Trainer


def build_trainer(
    model_dir: Path,
    adapter: ModelAdapter,
    recipe: Recipe,
    ranks: Ranks,
    *,
    attention: str,
    split: Split = RESIDENT,
    bf16_engine: bool = False,
) -> Trainer:
    """Everything a step needs, on every rank. `attention`: an implementation that transformers knows. `split`: what
    waits in host memory between its uses. `bf16_engine`: the engine computes in bf16."""
    packed = backend.packing(recipe, adapter, ranks.device.type)[0] == "packed"
    model = _load(model_dir, adapter, recipe, ranks, attention, packed)
    wire = adapter.wire_tensors(model)
    blocks = adapter.block_classes(model)
    policy, exact = PolicyModel(model, temperature=recipe.rollout.temperature), _exact(model, wire)
    recompute(policy, blocks, recomputed(recipe, split))
    shard(policy, blocks, ranks, exact=exact)
    masters = Masters(policy.model, wire, recipe.train, ranks, moments_on_host=split.moments_on_host)
    reference = _reference(model_dir, adapter, recipe, ranks, attention, packed)
    offload = None
    if reference is not None and split.reference == "host":
        offload = CpuOffload(reference.parameters(), constant=True)
        offload.to_host()
    return Trainer(
        policy,
        masters,
        adapter,
        recipe,
        ranks,
        reference=reference,
        reference_offload=offload,
        pad_token=pad_token(model_dir),
        packed=packed,
        bf16_engine=bf16_engine,
    )


def _load(
    model_dir: Path, adapter: ModelAdapter, recipe: Recipe, ranks: Ranks, attention: str, packed: bool
) -> torch.nn.Module:
    model: torch.nn.Module = adapter.load_for_training(model_dir, attention=attention)
    if ranks.device.type == "cpu":
        if adapter.prepare_cpu is not None:
            adapter.prepare_cpu(model)
        linear.install(model)
    elif adapter.prepare_gpu is not None:
        adapter.prepare_gpu(model)
    if packed:
        varlen.install(model, adapter)
        if recipe.train.row_boundaries == "ignored":
            varlen.carry_state(model)
    return model


def _exact(model: torch.nn.Module, wire: Mapping[str, WireTensor]) -> list[torch.nn.Parameter]:
    """Parameters that the engine holds in fp32: the trainer must not compute with them rounded."""
    parameters = dict(model.named_parameters())
    return [parameters[name] for name, tensor in wire.items() if tensor.dtype == "float32"]


def _reference(
    model_dir: Path, adapter: ModelAdapter, recipe: Recipe, ranks: Ranks, attention: str, packed: bool
) -> PolicyModel | None:
    """The initial policy as it was published, without gradients; None when the recipe asks for no KL."""
    if recipe.algorithm.kl_coef == 0:
        return None
    model = _load(model_dir, adapter, recipe, ranks, attention, packed)
    blocks, wire = adapter.block_classes(model), adapter.wire_tensors(model)
    exact = _exact(model, wire)
    if ranks.precision == torch.float32:
        parameters = dict(model.named_parameters())
        with torch.no_grad():
            for name, tensor in wire.items():
                parameters[name].copy_(parameters[name].to(DTYPES[tensor.dtype]))
    else:
        kept = set(exact)
        for parameter in model.parameters():
            if parameter not in kept:
                parameter.data = parameter.data.to(ranks.precision)  # what the policy is computed with
    policy = PolicyModel(model, temperature=recipe.rollout.temperature)
    policy.requires_grad_(False)
    if ranks.world_size == 1:
        policy.to(ranks.device)
    else:
        shard(policy, blocks, ranks, exact=exact)
    return policy


def pad_token(model_dir: Path) -> int:
    """What fills the right of a row: never attended to, never a target; it only has to be a valid id."""
    pad = read_config(model_dir).get("pad_token_id")
    return pad if isinstance(pad, int) and pad >= 0 else 0
