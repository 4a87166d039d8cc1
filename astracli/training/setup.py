"""From a checkpoint on disk to a trainer: load, round, shard, optimizer, reference."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from astracli.backends import choice as backend
from astracli.config.recipe import Recipe
from astracli.errors import RunFailed
from astracli.kernels import varlen
from astracli.kernels.cpu import linear
from astracli.models import registry
from astracli.models.adapter import ModelAdapter, WireTensor, read_config
from astracli.models.checkpoint_files import fingerprint
from astracli.models.preflight import text_config
from astracli.process.layout import RESIDENT, Split, recomputed
from astracli.training.cpu_offload import CpuOffload
from astracli.training.fsdp import Ranks, recompute, shard
from astracli.training.logprob import PolicyModel
from astracli.training.lora import Adapters
from astracli.training.lora_masters import LoraMasters
from astracli.training.optimizer import DTYPES, Masters
from astracli.training.step import Teacher, Trainer


def build_trainer(
    model_dir: Path,
    adapter: ModelAdapter,
    recipe: Recipe,
    ranks: Ranks,
    *,
    attention: str,
    split: Split = RESIDENT,
    bf16_engine: bool = False,
    teacher_dir: Path | None = None,
) -> Trainer:
    """Everything a step needs, on every rank. `attention`: an implementation that transformers knows. `split`: what
    waits in host memory between its uses. `bf16_engine`: the engine computes in bf16.
    `teacher_dir`: of the teacher that the algorithm asks for."""
    loader = _Loader(model_dir, adapter, recipe, ranks, attention)
    policy, masters = _with_adapters(loader, split) if recipe.lora is not None else _whole(loader, split)
    reference, offload, adapters_off = None, None, None
    if recipe.algorithm.kl_coef and isinstance(masters, LoraMasters):
        adapters_off = masters.adapters.off
    elif recipe.algorithm.kl_coef:
        reference = loader.reference()
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
        adapters_off=adapters_off,
        teacher=_teacher(loader, teacher_dir) if teacher_dir is not None else None,
        pad_token=pad_token(model_dir),
        packed=loader.packed,
        share_above=_share_above(loader, teacher_dir),
        bf16_engine=bf16_engine,
    )


def _share_above(loader: _Loader, teacher_dir: Path | None) -> float | None:
    """`Trainer.share_above`: a teacher computes the same rows, so its model must be able to as well. Raises RunFailed
    where it cannot and the recipe asks for it."""
    own = loader.share_above
    if own is None or teacher_dir is None:
        return own
    teacher = _of_teacher(loader, teacher_dir)
    if teacher.share_above is None and loader.recipe.train.share_prompts is True:
        raise RunFailed(
            f"train.share_prompts = true: adapter `{teacher.adapter.name}` of the teacher `{teacher_dir}` cannot",
            "`--set train.share_prompts=auto`",
        )
    return teacher.share_above


def _of_teacher(loader: _Loader, folder: Path) -> _Loader:
    model = loader.recipe.model.model_copy(update={"path": str(folder), "adapter": "auto"})
    adapter = registry.resolve(loader.recipe.model_copy(update={"model": model}), folder)
    return replace(loader, model_dir=folder, adapter=adapter)


def _teacher(loader: _Loader, folder: Path) -> Teacher:
    """A frozen model of its own family, loaded as the reference is."""
    own = _of_teacher(loader, folder)
    adapter = own.adapter
    if own.packed != loader.packed:
        raise RunFailed(
            f"the trainer packs rows, and adapter `{adapter.name}` of the teacher `{folder}` cannot compute them"
            if loader.packed
            else f"the trainer pads rows, and adapter `{adapter.name}` of the teacher `{folder}` would pack them",
            "`--set train.packing=padded`",
        )
    return Teacher(own.reference(), adapter)


def _whole(loader: _Loader, split: Split) -> tuple[PolicyModel, Masters]:
    """A policy all of whose weights are trained."""
    model, wire, exact = loader.load()
    policy, ranks = loader.policy(model, split, exact), loader.ranks
    return policy, Masters(policy.model, wire, loader.recipe.train, ranks, moments_on_host=split.moments_on_host)


def _with_adapters(loader: _Loader, split: Split) -> tuple[PolicyModel, Masters]:
    """A policy of which adapters are trained. Its own weights are stored as they are computed with."""
    recipe, ranks = loader.recipe, loader.ranks
    assert recipe.lora is not None
    model, wire, exact = loader.load()
    as_published(model, wire, exact, ranks)
    mark = ranks.broadcast(fingerprint(loader.model_dir).encode() if ranks.first else None)  # one rank reads the files
    origin = {"path": str(loader.model_dir), "fingerprint": mark.decode()}
    adapters = Adapters(model, wire, loader.adapter, recipe.lora, seed=recipe.seed, origin=origin)
    exact = [*exact, *adapters.factors.values()]
    policy = loader.policy(model, split, exact)
    masters = LoraMasters(
        policy.model,
        adapters,
        wire,
        recipe.train,
        ranks,
        exact=exact,
        base_on_host=split.reference == "host",
        moments_on_host=split.moments_on_host,
    )
    return policy, masters


def as_published(
    model: torch.nn.Module, wire: Mapping[str, WireTensor], exact: Collection[torch.nn.Parameter], ranks: Ranks
) -> None:
    """Round every parameter to what the engine holds: stored in fp32 where a policy computes in fp32, else in the
    ranks' precision, but for the `exact` ones."""
    if ranks.precision == torch.float32:
        parameters = dict(model.named_parameters())
        with torch.no_grad():
            for name, tensor in wire.items():
                parameters[name].copy_(parameters[name].to(DTYPES[tensor.dtype]))
        return
    kept = {id(parameter) for parameter in exact}
    for parameter in model.parameters():
        if id(parameter) not in kept:
            parameter.data = parameter.data.to(ranks.precision)


@dataclass(frozen=True)
class _Loader:
    """Loads the checkpoint: once to be trained, once more where the recipe asks for KL."""

    model_dir: Path
    adapter: ModelAdapter
    recipe: Recipe
    ranks: Ranks
    attention: str

    @property
    def packed(self) -> bool:
        return backend.packing(self.recipe, self.adapter, self.ranks.device.type)[0] == "packed"

    @property
    def share_above(self) -> float | None:
        config = text_config(read_config(self.model_dir))
        return backend.sharing(self.recipe, self.adapter, self.ranks.device.type, config).above

    @property
    def temperature(self) -> float:
        """Of the probabilities that are trained: those of the draws, in supervised training the model's own."""
        return self.recipe.rollout.temperature if self.recipe.sft is None else 1.0

    def load(self) -> tuple[torch.nn.Module, dict[str, WireTensor], list[torch.nn.Parameter]]:
        """The model, how its tensors travel, and the parameters that the engine holds in fp32: the trainer must not
        round those either."""
        adapter = self.adapter
        model: torch.nn.Module = adapter.load_for_training(self.model_dir, attention=self.attention)
        if self.ranks.device.type == "cpu":
            if adapter.prepare_cpu is not None:
                adapter.prepare_cpu(model)
            linear.install(model, measured=not self.recipe.launch.deterministic)
        elif adapter.prepare_gpu is not None:
            adapter.prepare_gpu(model)
        if self.packed or self.share_above is not None:
            varlen.install(model, adapter)
            if not self.packed:
                varlen.switch(model, packed=False)
            elif self.recipe.train.row_boundaries == "ignored":
                varlen.carry_state(model)
        wire, parameters = adapter.wire_tensors(model), dict(model.named_parameters())
        return model, wire, [parameters[name] for name, tensor in wire.items() if tensor.dtype == "float32"]

    def policy(self, model: torch.nn.Module, split: Split, exact: Collection[torch.nn.Parameter]) -> PolicyModel:
        """What is trained, on its device."""
        blocks = self.adapter.block_classes(model)
        policy = PolicyModel(model, temperature=self.temperature)
        recompute(policy, blocks, recomputed(self.recipe, split))
        shard(policy, blocks, self.ranks, exact=exact, sharding=self.ranks.sharding)
        return policy

    def reference(self) -> PolicyModel:
        """The checkpoint as an engine holds it, without gradients: the initial policy, or a teacher."""
        model, wire, exact = self.load()
        ranks, blocks = self.ranks, self.adapter.block_classes(model)
        as_published(model, wire, exact, ranks)
        policy = PolicyModel(model, temperature=self.temperature)
        policy.requires_grad_(False)
        shard(policy, blocks, ranks, exact=exact)
        return policy


def pad_token(model_dir: Path) -> int:
    """The token that fills the right of a row. It is never attended to and never a target, so any valid id will do."""
    config = text_config(read_config(model_dir))
    pad, rows = config.get("pad_token_id"), config.get("vocab_size", 0)
    return pad if isinstance(pad, int) and 0 <= pad < rows else 0
