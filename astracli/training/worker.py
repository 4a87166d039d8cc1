"""The trainer process: one rank. What it does between its start and its end is `loop`."""

from __future__ import annotations

import os

from astracli.process.config import TrainerConfig
from astracli.process.worker import Reporter, worker_main


def run(config: TrainerConfig, reporter: Reporter) -> None:
    """The whole life of one rank."""
    settle_torch(config)
    from astracli.training import fsdp, loop

    ranks = fsdp.join(config.device, sharding=config.split.sharding)
    fsdp.limit_memory(ranks.device, config.recipe.resources.gpu_memory_gib)
    loop.train(config, reporter, ranks)
    ranks.close()


def settle_torch(config: TrainerConfig) -> None:
    """Threads and determinism, before anything is computed."""
    if config.recipe.launch.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    import torch

    from astracli.kernels.cpu.memory import bound_memory

    if config.device == "cpu":
        bound_memory()
    elif config.gdn_backward == "torch":
        from astracli.kernels.gpu import fused

        fused.delta_rule_by_torch = True
    torch.set_num_threads(config.threads)
    torch.manual_seed(config.recipe.seed)
    if config.recipe.launch.deterministic:
        torch.use_deterministic_algorithms(True)


if __name__ == "__main__":
    worker_main(run, TrainerConfig)
