"""A trainer rank between its start and its end: takes batches, trains, checkpoints, publishes, exports.

Order of one step s, safe against a kill at any point: train -> begin checkpoint s + 1 when due -> publish version
s + 1 -> announce -> leave a shared GPU -> metrics -> acknowledge. A resumed trainer loads checkpoint c, publishes
version c anew and asks for batch c, which the hub serves with the same groups. Rank 0 talks to the hub; other ranks get
the batch from it. In supervised training the examples of a data set take the place of groups, and only versions that
are evaluated are published (`batches`).

A checkpoint is written while the next steps run (`checkpoint_saver`), except in deterministic mode. Once it is whole
the next acknowledgement tells the hub; until then a resume begins at the one before, whose groups the hub keeps.

Everything from publishing on may happen in a thread beside step s + 1 (`weights.background`), from a copy. It is over
before checkpoint s + 2 is begun. So when a checkpoint c is on disk, every step before c - 1 has been acknowledged, and
whoever resumes from c acknowledges step c - 1. Groups of batch s + 1 that were handed out before step s was
acknowledged stay in that batch. An error in the thread ends the run at the trainer's next turn.
"""

from __future__ import annotations

import os
import sys
import time
from collections import deque
from collections.abc import Mapping

from torch import Tensor

from astracli.config.recipe import Recipe
from astracli.engines import registry as engines
from astracli.errors import RunFailed, disk_failed
from astracli.hub.client import HubClient
from astracli.hub.types import HubState
from astracli.kernels.cpu.memory import GiveBack
from astracli.kernels.gpu import tuned
from astracli.models import registry
from astracli.process.config import TrainerConfig
from astracli.process.transient import gpu_failed
from astracli.process.worker import TERM_EXIT, Reporter
from astracli.runs import names
from astracli.runs.run_dir import RunDir
from astracli.training import batches, best, checkpoint, step_figures
from astracli.training.checkpoint_saver import Saver
from astracli.training.export import export, frozen_tensors
from astracli.training.fsdp import Ranks
from astracli.training.lora import merged_into
from astracli.training.optimizer import NotFinite
from astracli.training.setup import build_trainer
from astracli.training.time_sharing import TimeSharing
from astracli.training.warm_up import warm_up
from astracli.weights.publish.publisher import Publisher, PublishResult
from astracli.weights.publish.snapshot import Shard

ENCODE_THREADS = 8
"""Threads of a rank that compress what a GPU has coded."""
GIVE_BACK_EVERY = 20
"""Steps on a CPU between two times at which freed memory goes back to the system."""
HISTORY_STEPS = 8
"""Whose figures the message of a run quotes that ends because of its numbers."""


def train(config: TrainerConfig, reporter: Reporter, ranks: Ranks) -> None:
    """All steps of the run, and the export."""
    loop = TrainLoop(config, reporter, ranks)
    loop.start()
    while loop.step < config.recipe.train.steps:
        if not loop.advance():
            loop.leave()
            return
    loop.finish()


def in_background(recipe: Recipe, device: str) -> bool:
    """Whether publishing runs beside the next step. Not in deterministic mode, where nothing runs beside anything;
    otherwise as the recipe says, and by default on a GPU only (docs/benchmarks.md has the figures of a CPU)."""
    if recipe.launch.deterministic or recipe.weights.background == "off":
        return False
    return recipe.weights.background == "on" or device != "cpu"


def _end_rank(error: BaseException) -> None:
    """End this rank, whose background failed: it has no hub to tell, and the other ranks would wait for its part."""
    known = disk_failed(error) or gpu_failed(error)
    said = known.message if known else f"a version or a checkpoint was not written: {type(error).__name__}: {error}"
    print(f"error: {said}", file=sys.stderr, flush=True)
    os._exit(known.exit_code if known else 1)


def _rates(figures: dict[str, float], step_s: float) -> None:
    """What a step took, and its trained tokens a second."""
    figures |= {"step_s": step_s, "tokens_per_s": figures["tokens"] / step_s}


class TrainLoop:
    """One rank's state between steps. `step` is the next step to train; the policy's version is the same number."""

    def __init__(self, config: TrainerConfig, reporter: Reporter, ranks: Ranks):
        self.config = config
        self.recipe = config.recipe
        self.reporter = reporter
        self.ranks = ranks
        self.step = 0
        self._once = {"ranks_bytes_per_s": ranks.rate} if ranks.world_size > 1 else {}
        """Figures of this process for the metrics of its first step."""
        self.freed_memory = GiveBack(GIVE_BACK_EVERY) if config.device == "cpu" else None
        self._history: deque[tuple[int, Mapping[str, float]]] = deque(maxlen=HISTORY_STEPS)
        self.hub = HubClient(config.hub_url, config.token) if ranks.first else None
        self.source = batches.of(config, reporter, ranks, self.hub)
        self.time_sharing = TimeSharing(config, reporter, ranks, self.hub)
        if not self.time_sharing.begin():
            raise SystemExit(TERM_EXIT)
        self.adapter = registry.resolve(self.recipe, config.model_path)
        self.trainer = build_trainer(
            config.model_path,
            self.adapter,
            self.recipe,
            ranks,
            attention=config.attention,
            split=config.split,
            bf16_engine=config.device not in engines.get(config.engine).fp32_on,
            teacher_dir=config.teacher_path,
        )
        self.checkpoints = config.run_dir / "checkpoints"
        self.saver = Saver(
            self.checkpoints,
            ranks,
            keep=self.recipe.checkpoint.keep,
            beside=not self.recipe.launch.deterministic,  # in that mode nothing runs beside anything
            others=config.host_bytes,
        )
        self.saver.kept = lambda: best.kept(RunDir(config.run_dir), self.recipe, self._pinned)
        self._pinned: set[int] = set()
        self._saved = 0
        """Step of the newest checkpoint, whole or begun."""
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
            session=f"{config.run_dir.name}-{config.attempt}-{config.start}",
            frozen=frozen_tensors(config.model_path, self.adapter) if ranks.first else None,
            tied=self.trainer.masters.tied,
            pinned=lambda version: version in self._pinned,
            threads=config.threads if config.device == "cpu" else max(config.threads, ENCODE_THREADS),
            leaves=self.time_sharing.leaves,
            base=merged_into(config.model_path, self.adapter, self.trainer.masters) if self._sends_adapter else None,
        )
        # before it gives a GPU up, a trainer waits for its version anyway
        self.background = in_background(self.recipe, config.device) and not self.time_sharing.gpu_leases
        if not ranks.first:
            self.publisher.on_failure = self.saver.on_failure = _end_rank

    def start(self) -> None:
        """Begin at version 0, or at the checkpoint to which the supervisor rewound the hub. From then on the engines
        can serve."""
        masters, resume = self.trainer.masters, self.config.resume_step
        if resume:
            found = checkpoint.read(
                checkpoint.place(self.checkpoints, resume), digests=False
            )  # the supervisor read all
            if found is None:
                raise RunFailed(f"there is no whole checkpoint of step {resume} in `{self.checkpoints}`")
            checkpoint.load(found, masters, self.ranks)
            self.step = self._saved = resume
        elif (initial := self.config.initial) is not None:
            found = checkpoint.read(initial)
            if found is None:
                raise RunFailed(f"there is no whole checkpoint in `{initial}`", "start the run anew with --from")
            checkpoint.load(found, masters, self.ranks)
        if resume is not None and self.hub is not None:
            state: HubState = self.hub.state()
            running = [one.version for one in state.evals if one.state == "running"]
            self._pinned = {version for version in running if version is not None}
        publishes = self.source.publishes(self.step, first=True)
        if publishes:
            publish = self.publisher.publish if resume is None else self.publisher.restart
            publish(self.step, self._to_publish(), owned=True)  # in full, adapters merged
            self.time_sharing.end(self.trainer)
        if self.recipe.checkpoint.every and self.saver.beside:
            self.saver.prepare(masters)
        if publishes:
            self._announce(self.step)
        if self.hub is not None and resume:
            # a kill between checkpoint and acknowledgement left this step open
            self.hub.ack(self.step - 1, self.step, self.step)
        self.reporter.ready()
        self.reporter.progress(step=self.step)
        if self.ranks.device.type == "cuda" and (choices := tuned.shipped()):
            self._once["tuned_choices"] = float(tuned.install(choices, tuned.cache_folder(), tuned.here()).files)
        if self.config.warm_up and self.step < self.recipe.train.steps:
            self._once |= {"warm_up_s": warm_up(self.trainer, self.reporter.waiting)}

    def advance(self) -> bool:
        """Train one step. False when the run is asked to stop."""
        began = time.perf_counter()
        received = self.source.receive(self.step, self._check_background)
        if received is None:
            return False
        groups, stats = received
        if not self.time_sharing.begin(self.trainer):
            return False
        wait_s = time.perf_counter() - began
        try:
            result = self.source.train(self.trainer, groups, self.step)
        except NotFinite as error:
            raise RunFailed("\n  ".join([error.message, *names.recent(self._history)]), error.hint) from error
        except ValueError as error:
            hint = "look at the rollout worker's log" if self.recipe.sft is None else None
            raise RunFailed(str(error), hint) from error
        figures: dict[str, float] = {**result.metrics, **stats, "wait_s": wait_s, **self._once}
        self._once = {}
        self._history.append((self.step, figures))
        step, version = self.step, self.step + 1
        figures["publish_wait_s"] = self._settle()
        self.saver.check()
        self._checkpoint_if_due(version, figures)
        self.step = version
        if self.source.publishes(version):
            self.source.before_publishing()
            self._publish(step, figures, began)
        else:
            _rates(figures, time.perf_counter() - began)
            self._acknowledge(step, figures)
        self.reporter.progress(step=version, trained_tokens_per_s=round(figures["tokens_per_s"], 1))
        if self.freed_memory is not None:
            self.freed_memory.passed()
        return True

    def _check_background(self) -> None:
        """Raise what went wrong beside the loop."""
        self.publisher.check()
        self.saver.check()

    def _settle(self) -> float:
        """Wait until the version before is on disk, announced and acknowledged. Seconds; raises its error."""
        if not self.publisher.busy:
            return self.publisher.settle()
        self.reporter.waiting(f"version {self.step} to be published")
        waited = self.publisher.settle()
        self.reporter.waiting(None)
        return waited

    def _publish(self, step: int, figures: dict[str, float], began: float) -> None:
        """Publish version step + 1, here or from a copy in the background; `publish_s` is what it costs the step. With
        time sharing the trainer then leaves its GPU, and its step ends."""
        version, begin = step + 1, time.perf_counter()
        tensors = self._to_publish()
        factors = self.trainer.masters.factors() if self._sends_adapter else None
        figures["snapshot_s"] = time.perf_counter() - begin

        def published(result: PublishResult) -> None:
            figures.update(step_figures.published(result))
            figures["snapshot_s"] += result.snapshot_s
            self._announce(version)
            if self.background:
                costs(0.0, handed_over + result.snapshot_s)
            else:
                self.time_sharing.end(self.trainer)
                costs(result.publish_s, time.perf_counter())
            self._acknowledge(step, figures)

        def costs(publish_s: float, ended: float) -> None:
            figures["publish_s"] = figures["publish_wait_s"] + figures["snapshot_s"] + publish_s
            _rates(figures, ended - began)

        handed_over = time.perf_counter()
        if self.background:
            costs(0.0, handed_over)
            self.publisher.publish_async(version, tensors, published, owned=True, factors=factors)
        else:
            published(self.publisher.publish(version, tensors, owned=True, factors=factors))

    def _acknowledge(self, step: int, figures: Mapping[str, float]) -> None:
        """The step's metrics; then the hub may forget what it was trained on."""
        self._metrics(step, {**figures, **self.saver.figures()})
        if self.hub is not None:
            self.hub.ack(step, step + 1, self.saver.whole)

    @property
    def _sends_adapter(self) -> bool:
        return self.recipe.weights.transfer == "adapter"

    def _to_publish(self) -> dict[str, Tensor | Shard]:
        """This rank's part of the next version. A copy, but where nobody trains before it is published; with adapters
        the publisher takes what it needs at once."""
        return self.trainer.masters.wire_shards(copy=not self.time_sharing.leaves and not self._sends_adapter)

    def finish(self) -> None:
        """Export the last version in Hugging Face format."""
        self._settle()
        if not self.time_sharing.begin(self.trainer):
            return
        self.reporter.waiting(None)
        began = time.perf_counter()
        tensors = self.trainer.masters.wire_full()
        if self.ranks.first:
            out = self.config.run_dir / "export"
            export(out, self.config.model_path, tensors, self.adapter, step=self.step)
        self.time_sharing.end(self.trainer)
        export_s = time.perf_counter() - began
        self.publisher.close()
        self.reporter.waiting("the last checkpoint to be on disk" if self.saver.busy else None)
        self.saver.wait()
        self.ranks.barrier()
        self._metrics(self.step - 1, {"export_s": export_s, **self.saver.figures()})
        if self.hub is not None and self.saver.whole is not None:
            self.hub.ack(self.step - 1, self.step, self.saver.whole)

    def leave(self) -> None:
        """The run ends before its last step. Was a checkpoint asked for, the state of now becomes one."""
        if not self.source.saves or not self.recipe.checkpoint.every:
            return
        self._settle()
        if self.step != self._saved:
            if not self.time_sharing.begin(self.trainer):
                return
            self.saver.begin(self.step, self.trainer.masters)
            self.time_sharing.end(self.trainer)
        self.publisher.close()
        self.reporter.waiting("the last checkpoint to be on disk" if self.saver.busy else None)
        self.saver.wait()
        self.ranks.barrier()
        if self.hub is not None and self.saver.whole is not None:
            self.hub.ack(self.step - 1, self.step, self.saver.whole)

    def _checkpoint_if_due(self, step: int, figures: dict[str, float]) -> None:
        """Begin a checkpoint; `checkpoint_s` is how long the step stands still for it."""
        if not self.recipe.checkpoint_due(step):
            return
        began = time.perf_counter()
        if self.saver.busy:
            self.reporter.waiting("the checkpoint before to be on disk")
        self.saver.begin(step, self.trainer.masters)
        self._saved = step
        if not self.saver.beside:
            self.saver.wait()
            self.ranks.barrier()
        self.reporter.waiting(None)
        figures["checkpoint_s"] = time.perf_counter() - began

    def _announce(self, version: int) -> None:
        """Tell the hub that a version is on disk; learn which older ones must stay there."""
        if self.hub is not None:
            self._pinned = set(self.hub.announce(version, version))

    def _metrics(self, step: int, figures: Mapping[str, float]) -> None:
        if self.hub is not None:
            self.hub.metrics([{"step": step, "process": self.config.name, **figures}])
