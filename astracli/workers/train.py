"""The trainer process: takes batches from the hub, trains, checkpoints, publishes, acknowledges; exports at the end.

Order of one step s, safe against a kill at any point: train -> checkpoint s + 1 when due -> publish version s + 1 ->
announce -> metrics -> acknowledge. A resumed trainer loads checkpoint c, publishes version c anew and asks for batch c,
which the hub serves with the same groups. Rank 0 talks to the hub; other ranks get the batch from it.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from typing import Any

import msgpack

from astracli.errors import RunFailed
from astracli.plan_trainer import RESIDENT, Split
from astracli.rl.types import Group, unpack_group
from astracli.workers.common import Reporter, WorkerConfig, worker_main

BATCH_WAIT_S = 5.0
"""One long poll for a batch; between two, a stop is noticed."""


def run(config: WorkerConfig, reporter: Reporter) -> None:
    """The whole life of one rank."""
    from astracli.training import fsdp

    _settle_torch(config)
    ranks = fsdp.join(config.device)
    _train(config, reporter, ranks)
    ranks.close()


def _train(config: WorkerConfig, reporter: Reporter, ranks: Any) -> None:
    loop = TrainLoop(config, reporter, ranks)
    loop.start()
    while loop.step < config.recipe.train.steps:
        if not loop.advance():
            return
    loop.finish()


def _split(config: WorkerConfig) -> Split:
    """What the plan lets wait on the host. On a CPU there is one place."""
    told = config.extra.get("placement", {})
    return Split(told.get("reference", "gpu"), told.get("optimizer", "gpu")) if config.device == "cuda" else RESIDENT


def _settle_torch(config: WorkerConfig) -> None:
    """Threads and determinism, before anything is computed."""
    if config.recipe.launch.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    import torch

    from astracli.cpu.memory import keep_freed_memory

    if config.device == "cpu":
        keep_freed_memory()
    torch.set_num_threads(config.threads)
    torch.manual_seed(config.recipe.seed)
    if config.recipe.launch.deterministic:
        torch.use_deterministic_algorithms(True)


class TrainLoop:
    """One rank's state between steps. `step` is the next step to train; the policy's version is the same number."""

    def __init__(self, config: WorkerConfig, reporter: Reporter, ranks: Any):
        from astracli import registry
        from astracli.hub.client import HubClient
        from astracli.training.export import frozen_tensors
        from astracli.training.setup import build_trainer
        from astracli.weights.publisher import Publisher

        self.config = config
        self.recipe = config.recipe
        self.reporter = reporter
        self.ranks = ranks
        self.step = 0
        self.adapter = registry.resolve(self.recipe, config.model_path)
        attention = config.backends.get("attention", "sdpa")
        self.trainer = build_trainer(
            config.model_path, self.adapter, self.recipe, ranks, attention=attention, split=_split(config)
        )
        self.hub: HubClient | None = HubClient(config.hub_url, config.token) if ranks.first else None
        self.checkpoints = config.run_dir / "checkpoints"
        self._pinned: set[int] = set()
        table = self.recipe.weights
        self.publisher = Publisher(
            config.run_dir / "weights",
            transfer=table.transfer,
            full_interval=table.full_interval,
            keep=table.keep,
            level=table.compression_level,
            model_name=self.recipe.model.path,
            rank=ranks.rank,
            world_size=ranks.world_size,
            session=f"{config.run_dir.name}-{config.attempt}",
            frozen=frozen_tensors(config.model_path, self.adapter) if ranks.first else None,
            tied=self.trainer.masters.tied,
            pinned=lambda version: version in self._pinned,
        )

    def start(self) -> None:
        """Begin at version 0, or where the checkpoint stands; from then on the engines can serve."""
        from astracli.training import checkpoint

        masters = self.trainer.masters
        found = self._checkpoint_to_resume() if self.config.resume else None
        if found is not None:
            checkpoint.load(found, masters, self.ranks)
            self.step = found.step
        if self.config.resume:
            if self.hub is not None:
                evals = self.hub.state()["evals"]
                self._pinned = {item["version"] for item in evals if item["state"] == "pending"}
            self.publisher.restart(self.step, masters.wire_shards())
        else:
            self.publisher.publish(0, masters.wire_shards())
        self._announce()
        if self.hub is not None and found is not None and self.step > 0:
            # a kill between checkpoint and acknowledgement left this step open
            self.hub.ack(self.step - 1, self.step, self.step)
        self.reporter.ready()
        self.reporter.progress(step=self.step)

    def _checkpoint_to_resume(self) -> Any:
        """The checkpoint that the supervisor rewound the hub to, else the newest; None = from the beginning."""
        from astracli.training import checkpoint

        step = self.config.extra.get("step")
        if step is None:
            return checkpoint.latest(self.checkpoints)
        if step == 0:
            return None
        found = checkpoint.read(checkpoint.place(self.checkpoints, int(step)))
        if found is None:
            raise RunFailed(f"there is no whole checkpoint of step {step} in `{self.checkpoints}`")
        return found

    def advance(self) -> bool:
        """Train one step. False when the run is asked to stop."""
        from astracli.training.samples import write_samples

        began = time.perf_counter()
        received = self._receive()
        if received is None:
            return False
        groups, stats = received
        wait_s = time.perf_counter() - began
        try:
            result = self.trainer.train(groups, self.step, self.step)
        except ValueError as error:
            raise RunFailed(str(error), "look at the rollout worker's log") from error
        figures: dict[str, float] = {**result.metrics, **stats, "wait_s": wait_s}
        version = self.step + 1
        saved = self._checkpoint_if_due(version, figures)
        published = self.publisher.publish(version, self.trainer.masters.wire_shards())
        figures |= {
            "publish_s": published.publish_s,
            "delta_density": published.density,
            "delta_bytes": published.bytes_delta,
            "full_bytes": published.bytes_full,
        }
        if self.hub is not None:
            count = self.recipe.metrics.samples_per_step
            write_samples(self.config.run_dir / "samples", result.batch, self.step, self.recipe.seed, count)
        step, self.step = self.step, version
        self._announce()
        step_s = time.perf_counter() - began
        figures |= {"step_s": step_s, "tokens_per_s": figures["tokens"] / step_s}
        self._metrics(step, figures)
        if self.hub is not None:
            self.hub.ack(step, version, version if saved else None)
        self.reporter.progress(step=version, tokens_per_s=round(figures["tokens_per_s"], 1))
        return True

    def finish(self) -> None:
        """Export the last version in Hugging Face format."""
        from astracli.training.export import export

        self.reporter.waiting(None)
        began = time.perf_counter()
        tensors = self.trainer.masters.wire_full()
        if self.ranks.first:
            export(self.config.run_dir / "export", self.config.model_path, tensors, self.adapter)
        self.publisher.close()
        self.ranks.barrier()
        self._metrics(self.step - 1, {"export_s": time.perf_counter() - began})

    def _receive(self) -> tuple[list[Group], dict[str, float]] | None:
        """This step's groups on every rank, and the hub's counts of what arrived for it; None on a stop."""
        if self.hub is None:
            self.reporter.waiting("waiting for the first rank's batch")
        message = msgpack.packb(self._poll()) if self.hub is not None else None
        reply = msgpack.unpackb(self.ranks.broadcast(message))
        self.reporter.waiting(None)
        if "groups" not in reply:
            return None
        stats = {f"arrived_{name.removeprefix('arrived_')}": float(v) for name, v in reply.get("stats", {}).items()}
        if self.recipe.train.replay_ratio:
            stats["replay"] = float(reply["replay"])
        return [unpack_group(blob) for blob in reply["groups"]], stats

    def _poll(self) -> Mapping[str, Any]:
        assert self.hub is not None
        while not self.reporter.stop_requested.is_set():
            reply: Mapping[str, Any] = self.hub.batch(self.step, wait_s=BATCH_WAIT_S)
            if "groups" in reply:
                return reply
            self.reporter.waiting(reply["wait"])
        return {"stop": True}

    def _checkpoint_if_due(self, step: int, figures: dict[str, float]) -> bool:
        from astracli.training import checkpoint

        table = self.recipe.checkpoint
        if step % table.every and step != self.recipe.train.steps:
            return False
        began = time.perf_counter()
        checkpoint.save(self.checkpoints, step, step, self.trainer.masters, self.ranks, keep=table.keep)
        figures["checkpoint_s"] = time.perf_counter() - began
        return True

    def _announce(self) -> None:
        """Tell the hub that the policy's version is on disk; learn which older ones must stay there."""
        if self.hub is not None:
            reply = self.hub.announce(self.step, self.step)
            self._pinned = set(reply.get("pinned", ()))

    def _metrics(self, step: int, figures: Mapping[str, float]) -> None:
        if self.hub is not None:
            self.hub.metrics([{"step": step, "process": self.config.name, **figures}])


if __name__ == "__main__":
    worker_main(run)
