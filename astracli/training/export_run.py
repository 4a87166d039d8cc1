"""A run's checkpoint as a Hugging Face directory, without the run: for a stopped run, an older step, another layout."""

from __future__ import annotations

from pathlib import Path

from astracli.config.recipe import Recipe
from astracli.errors import UserError
from astracli.process.console import say
from astracli.training import checkpoint


def export_checkpoint(
    checkpoints: Path, recipe: Recipe, model_dir: Path, out: Path, *, step: int | None = None, text_only: bool = False,
    adapter_only: bool = False,
) -> int:  # fmt: skip
    """Write the checkpoint of `step` (None: the newest) to `out`; returns its step. `adapter_only`: the LoRA adapter
    alone, in the format of `peft`; otherwise it is merged.

    `model_dir` is the checkpoint that training started from: layout, untouched tensors, config, tokenizer. Raises
    UserError when there is no such whole checkpoint or `out` is taken.
    """
    if out.exists():
        raise UserError(f"`{out}` exists", "give another --out, or remove it")
    if adapter_only and recipe.lora is None:
        raise UserError("this run trained all weights: it has no adapter", "leave out --adapter")
    found = checkpoint.latest(checkpoints) if step is None else checkpoint.read(checkpoint.place(checkpoints, step))
    if found is not None and step is None and (lost := checkpoint.damaged(checkpoints)):
        say(f"warning: newer checkpoints are damaged, of step {', '.join(map(str, lost))}: step {found.step} is taken")
    if found is None:
        there = ", ".join(str(c.step) for c in checkpoint.find(checkpoints)) or "none"
        wanted = "whole checkpoint" if step is None else f"whole checkpoint of step {step}"
        raise UserError(f"no {wanted} in `{checkpoints}`", f"steps that can be exported: {there}")
    from transformers.utils import logging

    from astracli.models import registry
    from astracli.training import adapter_files  # torch, which a refusal need not wait for
    from astracli.training.export import export
    from astracli.training.fsdp import join
    from astracli.training.lora_masters import LoraMasters
    from astracli.training.setup import build_trainer

    logging.disable_progress_bar()
    adapter = registry.resolve(recipe, model_dir)
    plain = recipe.model_copy(update={"algorithm": recipe.algorithm.model_copy(update={"kl_coef": 0.0})})
    ranks = join("cpu", {})
    trainer = build_trainer(model_dir, adapter, plain, ranks, attention="sdpa")
    checkpoint.load(found, trainer.masters, ranks)
    if adapter_only and isinstance(trainer.masters, LoraMasters):
        adapter_files.write(out, trainer.masters.adapters, recipe.model, step=found.step)
    else:
        export(out, model_dir, trainer.masters.wire_full(), adapter, text_only=text_only, step=found.step)
    return found.step
