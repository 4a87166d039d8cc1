"""What a trainer rank is told and settles before it computes: threads, determinism."""

from __future__ import annotations

import os

from astracli.config.recipe import Recipe
from astracli.process.config import TrainerConfig


def settle_torch(config: TrainerConfig) -> None:
    """Threads and determinism, before anything is computed."""
    if config.recipe.launch.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    import torch

    from astracli.kernels.cpu.memory import keep_freed_memory

    if config.device == "cpu":
        keep_freed_memory()
    elif config.gdn_backward == "torch":
        from astracli.kernels.gpu import fused

        fused.delta_rule_by_torch = True
    torch.set_num_threads(config.threads)
    torch.manual_seed(config.recipe.seed)
    if config.recipe.launch.deterministic:
        torch.use_deterministic_algorithms(True)


def in_background(recipe: Recipe, device: str) -> bool:
    """Whether publishing runs beside the next step. Not in deterministic mode, where nothing may run beside anything;
    otherwise as the recipe says, by itself on a GPU only (docs/benchmarks.md has the figures of a CPU)."""
    if recipe.launch.deterministic or recipe.weights.background == "off":
        return False
    return recipe.weights.background == "on" or device != "cpu"
