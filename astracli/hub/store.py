"""The hub's memory: which prompts are out, which groups are in, which batch holds what, which version is announced.

Logic over SQLite in parts: `schema` (the file), `leases` (prompts out, groups in), `batches` (groups to training),
`evals` (versions and engines); `gpu_leases` lives in memory. Every decision is committed before anyone is told: a hub
that is killed at any instant and opened again neither loses a group nor serves one in two batches.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from astracli.hub.batches import BatchBook
from astracli.hub.curriculum import Curriculum
from astracli.hub.evals import EvalBoard
from astracli.hub.gpu_leases import GpuLeases
from astracli.hub.leases import LeaseBook
from astracli.hub.schema import Database
from astracli.hub.slot_shares import SlotShares, User
from astracli.hub.types import (
    BadRequest,
    Counts,
    EngineReport,
    EngineState,
    GpuLeaseReply,
    Holders,
    HubSettings,
    HubState,
    Leases,
    NextBatch,
    NextEvaluation,
    NoSignal,
    PutStatus,
    SlotLimit,
    Target,
)
from astracli.hub.wire import refuse_large
from astracli.rl.schedule import Admission, count
from astracli.rl.types import Group, unpack_group

STOPPING = "the end: the run is being stopped"


class HubStore:
    """Thread-safe: one lock, one connection. `clock` returns monotonic seconds."""

    def __init__(
        self,
        path: Path | str,
        settings: HubSettings,
        *,
        curriculum: Curriculum | None = None,
        clock: Callable[[], float] = time.monotonic,
        checkpoint: Callable[[int], int | None] = lambda step: None,
    ):
        """`checkpoint`: as `BatchBook` takes it."""
        self.settings = settings
        self._db = Database(Path(path))
        self._board = EvalBoard(self._db, settings)
        self._batches = BatchBook(self._db, settings, checkpoint)
        self._leases = LeaseBook(self._db, settings, curriculum, clock)
        self._gpu_leases = GpuLeases(settings.gpu_leases)
        self._slots = SlotShares(settings.slots, settings.eval_slots, clock)
        self._listeners: list[Callable[[], None]] = []
        self.stop_requested = False
        self.save_requested = False
        """The trainer is to make a checkpoint and end."""
        self._wave_left = 0

    # ---- changes and the end -----------------------------------------------------------------------------------------

    def subscribe(self, listener: Callable[[], None]) -> None:
        """`listener` is called, from whichever thread, when something changed that others may wait for."""
        self._listeners.append(listener)

    def _changed(self) -> None:
        for listener in self._listeners:
            listener()

    @contextmanager
    def _changing(self) -> Iterator[None]:
        """Under the lock; then everyone who waits looks again."""
        with self._db.lock:
            yield
        self._changed()

    def request_stop(self) -> None:
        """Tell every worker to end, with its next call."""
        self.stop_requested = True
        self._changed()

    @property
    def finished(self) -> bool:
        """Every step acknowledged, the last version announced, no evaluation pending."""
        with self._db.lock:
            steps = self.settings.steps
            return self._batches.acked >= steps and self._board.latest_step >= steps and not self._board.open

    def close(self) -> None:
        self._db.close()

    # ---- leases and groups -------------------------------------------------------------------------------------------

    def lease(self, worker: str, n: int, *, engine: str | None = None, request: str | None = None) -> Leases:
        """Up to `n` prompts for `worker`, requeued ones first.

        `engine` is where they will be generated: its reported version bounds them (without it: the oldest version of
        any ready engine). The same `request` id gets the same leases again: a lost reply loses nothing.
        """
        with self._db.lock:
            self._expire()
            ids = self._leases.remembered(request)
            wait = None
            if ids is None:
                take, version, wait = self._admissible(n, engine)
                ids = self._leases.grant(worker, take, version, request) if take else []
                self._wave_left -= len(ids) if self.settings.deterministic else 0
            return Leases(self._leases.with_prompts(ids), wait, self.stop_requested)

    def _admissible(self, n: int, engine: str | None) -> tuple[int, int, str | None]:
        """(groups that may start now, the version they would start at, what is waited for when there are none)."""
        if self.stop_requested:
            return 0, 0, STOPPING
        version, wait = self._board.version_of(engine)
        if wait is not None:
            return 0, 0, wait
        admission = Admission(
            batch_groups=self.settings.batch_groups,
            max_staleness=self.settings.max_staleness,
            steps=self.settings.steps,
            next_step=self._batches.next_step,
            version=version,
            in_flight=self._leases.count("leased"),
            waiting=self._leases.count("kept"),
            replays=self._batches.replays,
        )
        if self.settings.deterministic and admission.capacity:
            if not self._wave_left and not admission.in_flight:
                self._wave_left = admission.capacity
            wait = None if self._wave_left else f"{count(admission.in_flight)} in flight: one wave at a time"
            return min(n, self._wave_left), version, wait
        return min(n, admission.capacity), version, admission.reason

    def renew(self, lease_ids: Sequence[int], worker: str | None = None) -> list[int]:
        """See `LeaseBook.renew`."""
        with self._db.lock:
            self._expire()
            return self._leases.renew(lease_ids, worker)

    def give_back(self, lease_ids: Sequence[int]) -> None:
        """Leases return to the queue; those that have ended are left alone."""
        with self._changing():
            self._leases.give_back(lease_ids)

    def release_worker(self, worker: str) -> int:
        """A worker died: its leases return to the queue, an engine of that name is down. -> how many leases."""
        with self._changing():
            if worker in self.settings.engines or worker in self._board.engines:
                self._board.report(worker, EngineReport(None, "down"))
            self._gpu_leases.forget(worker)
            return self._leases.requeue("state = 'leased' AND worker = ?", worker)

    def _expire(self) -> None:
        if self._leases.expire():
            self._changed()

    def put(self, blob: bytes) -> PutStatus:
        """A graded group comes in under its lease, see `LeaseBook.put`. Raises BadRequest for no packed group."""
        try:
            group = unpack_group(blob)
        except ValueError as error:
            raise BadRequest(str(error)) from None
        refuse_large([group.lease_id, *(segment.version for sample in group.samples for segment in sample.segments)])
        with self._changing():
            return self._leases.put(group, blob, self._batches.next_step)

    def skip(self, lease_id: int, reason: str) -> None:
        """A prompt that nothing can be generated from (too long). Frees its capacity; counted."""
        with self._changing():
            self._leases.skip(lease_id, reason)

    @property
    def no_signal(self) -> NoSignal | None:
        """Why the run is to end: no more groups will make the batch that the trainer waits for. None while some may."""
        return self._batches.hopeless

    def dropped_groups(self) -> list[Group]:
        """The newest groups that were dropped since the hub was opened, a few."""
        with self._db.lock:
            return list(self._leases.dropped)

    # ---- batches -----------------------------------------------------------------------------------------------------

    def batch(self, step: int) -> NextBatch:
        """The groups of `step`, see `BatchBook.serve`."""
        with self._db.lock:
            self._expire()
            before = self._batches.next_step
            reply = self._batches.serve(step)
            moved = self._batches.next_step != before
        if moved:
            self._changed()
        return reply

    def ack(self, step: int, version: int, checkpoint_step: int | None = None) -> None:
        """See `BatchBook.ack`."""
        with self._changing():
            self._batches.ack(step, version, checkpoint_step)

    def rewind(self, step: int, version: int) -> None:
        """Go on from a checkpoint that has trained steps < `step` and holds `version`.

        Batches of later steps stay assigned and are served again; their acknowledgements, later versions and their
        evaluations never were; leases in flight are granted again. Nothing is announced until the trainer has published
        `version` anew. A deterministic run forgets the groups that no batch holds: their waves begin again, whole.
        A run that never had a checkpoint and has let go of its batches begins anew, with its first prompt.
        Raises RunFailed when those batches are pruned.
        """
        with self._changing():
            anew = not step and self._batches.begins_anew
            if not anew:
                self._batches.check_rewind(step)
            with self._db.transaction():
                if anew:
                    self._batches.forget_all()
                self._batches.unacknowledge(step)
                self._board.rewind(version)
                self._db.set_meta("dropped_in_a_row", 0)
            self._batches.hopeless = None
            self._leases.requeue("state = 'leased'")
            self._gpu_leases.reset()
            if self.settings.deterministic:
                self._leases.forget_since_last_batch()
                self._wave_left = 0

    # ---- versions, engines, evaluations ------------------------------------------------------------------------------

    def announce(self, version: int, step: int) -> list[int]:
        """A version is stable on disk. -> versions that must stay there until the next is announced."""
        with self._changing():
            return self._board.announce(version, step)

    def target(self, engine: str) -> Target:
        """What the engine should hold, and who waits for it."""
        with self._db.lock:
            version, pinned = self._board.target(engine)
            wanted = self._gpu_leases.wanted(engine) and not pinned
            return Target(version, pinned, wanted, self._board.down(engine), self.stop_requested)

    def take_gpu_lease(self, gpu_lease: str, who: str) -> GpuLeaseReply:
        """See `GpuLeases.take`."""
        with self._db.lock:
            before = self._gpu_leases.document()
            held = self._gpu_leases.take(gpu_lease, who)
            moved = before != self._gpu_leases.document()
        if moved:
            self._changed()
        return GpuLeaseReply(held, self.stop_requested)

    def give_gpu_lease(self, gpu_lease: str, who: str) -> None:
        with self._changing():
            self._gpu_leases.give(gpu_lease, who)

    def slots(self, engine: str, user: User, wants: int, holds: int) -> SlotLimit:
        """See `SlotShares.limit`."""
        with self._db.lock:
            return self._slots.limit(engine, user, wants, holds)

    def engine_state(self, engine: str, version: int | None, state: EngineState) -> None:
        """An engine's report. Raises BadRequest for one that is ready without a version."""
        with self._changing():
            self._board.report(engine, EngineReport(version, state))

    def eval_next(self, finishing: Sequence[int] = ()) -> NextEvaluation:
        """An evaluation to work on, or what is waited for; `stop` also when none will come. See `EvalBoard.next`."""
        with self._db.lock:
            found, wait = self._board.next(finishing)
            if found is not None and not self.stop_requested:
                return NextEvaluation(found, None, False)
            return NextEvaluation(None, wait or STOPPING, self.stop_requested or self.finished)

    def eval_engines(self, version: int) -> Holders:
        """Engines that can be asked for the evaluation of `version` now."""
        with self._db.lock:
            return Holders(self._board.holders(version), self.stop_requested)

    def eval_release(self, step: int, version: int, engine: str) -> None:
        """See `EvalBoard.release`."""
        with self._changing():
            self._board.release(step, version, engine)

    def pending_evals(self) -> int:
        """Evaluations that became due and are not done."""
        return self._board.open

    def eval_done(self, step: int, version: int, results: Any) -> None:
        """See `EvalBoard.done`."""
        with self._changing():
            self._board.done(step, version, results)

    # ---- reading -----------------------------------------------------------------------------------------------------

    def counts(self) -> Counts:
        with self._db.lock:
            return self._batches.counts()

    def state(self) -> HubState:
        with self._db.lock:
            return HubState(
                steps=self.settings.steps,
                next_step=self._batches.next_step,
                latest_version=self._board.latest,
                counts=self._batches.counts(),
                dropped_in_a_row=self._db.meta("dropped_in_a_row"),
                skipped_in_a_row=self._db.meta("skipped_in_a_row"),
                engines=dict(self._board.engines),
                evals=self._board.document(),
                gpu_leases=self._gpu_leases.document(),
                finished=self.finished,
                stop=self.stop_requested,
            )
