"""The hub's memory: which prompts are out, which groups are in, which batch holds what, which version is announced.

Logic over SQLite in parts: `schema` (the file), `leases` (prompts out, groups in), `batches` (groups to training),
`evals` (versions and engines), `overview` (what is shown of it). Every decision is committed before anyone is told: a
hub that is killed at any instant and opened again neither loses a group nor serves one in two batches.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

from astracli.hub.batches import BatchBook
from astracli.hub.curriculum import Curriculum
from astracli.hub.evals import EvalBoard
from astracli.hub.gpu_leases import GpuLeases
from astracli.hub.leases import LeaseBook, PutStatus
from astracli.hub.overview import Overview
from astracli.hub.schema import Database
from astracli.rl.schedule import Admission, count
from astracli.rl.types import unpack_group

STOPPING = "the end: the run is being stopped"


class HubStore:
    """Thread-safe: one lock, one connection. `clock` returns monotonic seconds.

    `engines` are the names of those that serve evaluations. `eval_every` 0 switches in-run evaluation off.
    Without `checkpoints` nothing is kept for a resume: what a step was trained on goes with the next one.
    Deterministic runs (staleness 0) get their batches in the order of lease ids, and their leases in waves: nothing new
    is granted before every group of the wave before is in. Which groups are generated together, and so the last bits of
    their log-probabilities, then depends on nothing but their ids.
    """

    def __init__(
        self,
        path: Path | str,
        *,
        batch_groups: int,
        max_staleness: int,
        drop_equal_groups: bool,
        lease_timeout_s: float,
        steps: int,
        eval_every: int,
        engines: list[str],
        deterministic: bool = False,
        consume: Literal["edf", "fifo"] = "edf",
        replay_ratio: int = 0,
        curriculum: Curriculum | None = None,
        history_steps: int = 1000,
        max_dropped_batches: int = 0,
        checkpoints: bool = True,
        gpu_leases: Iterable[str] = (),
        clock: Callable[[], float] = time.monotonic,
    ):
        assert not (deterministic and max_staleness), "deterministic runs have staleness 0"
        self.batch_groups = batch_groups
        self.max_staleness = max_staleness
        self.steps = steps
        self._db = Database(Path(path))
        self._board = EvalBoard(
            self._db, steps=steps, eval_every=eval_every, engines=engines, deterministic=deterministic
        )
        self._batches = BatchBook(
            self._db,
            batch_groups=batch_groups,
            max_staleness=max_staleness,
            steps=steps,
            deterministic=deterministic,
            consume=consume,
            replay_ratio=replay_ratio,
            history_steps=history_steps,
            max_dropped=max_dropped_batches * batch_groups,
            checkpoints=checkpoints,
        )
        self._leases = LeaseBook(
            self._db,
            max_staleness=max_staleness,
            drop_equal_groups=drop_equal_groups,
            lease_timeout_s=lease_timeout_s,
            curriculum=curriculum,
            clock=clock,
        )
        self._gpu_leases = GpuLeases(gpu_leases)
        parts = (self._db, self._leases, self._batches, self._board, self._gpu_leases)
        self._overview = Overview(*parts, batch_groups=batch_groups, steps=steps)
        self._listeners: list[Callable[[], None]] = []
        self._stop = False
        self._deterministic = deterministic
        self._wave_left = 0

    # ---- changes and the end -----------------------------------------------------------------------------------------

    def subscribe(self, listener: Callable[[], None]) -> None:
        """`listener` is called, from whichever thread, when something changed that others may wait for."""
        self._listeners.append(listener)

    def _changed(self) -> None:
        for listener in self._listeners:
            listener()

    def request_stop(self) -> None:
        """Tell every worker to end, with its next call."""
        self._stop = True
        self._changed()

    @property
    def stop_requested(self) -> bool:
        return self._stop

    @property
    def finished(self) -> bool:
        """Every step acknowledged, the last version announced, no evaluation pending."""
        with self._db.lock:
            trained = self._batches.acked >= self.steps and self._board.latest_step >= self.steps
            return trained and not self._board.open

    def close(self) -> None:
        self._db.close()

    # ---- leases and groups -------------------------------------------------------------------------------------------

    def lease(self, worker: str, n: int, *, engine: str | None = None, request: str | None = None) -> dict[str, Any]:
        """Up to `n` prompts for `worker`, requeued ones first.

        `engine` is where they will be generated: its reported version bounds them (without it: the oldest version of
        any ready engine). The same `request` id gets the same leases again: a lost reply loses nothing.
        -> {"leases": [{"lease_id", "prompt_index"}], "wait": None or the reason, "stop": bool}
        """
        with self._db.lock:
            self._expire()
            ids = self._leases.remembered(request)
            wait = None
            if ids is None:
                take, version, wait = self._admissible(n, engine)
                ids = self._leases.grant(worker, take, version, request) if take else []
                self._wave_left -= len(ids) if self._deterministic else 0
            prompts = self._leases.prompts(ids)
            leases = [{"lease_id": i, "prompt_index": p} for i, p in zip(ids, prompts, strict=True)]
            return {"leases": leases, "wait": wait, "stop": self._stop}

    def _admissible(self, n: int, engine: str | None) -> tuple[int, int, str | None]:
        """(groups that may start now, the version they would start at, what is waited for when there are none)."""
        if self._stop:
            return 0, 0, STOPPING
        version, wait = self._board.version_of(engine)
        if wait is not None:
            return 0, 0, wait
        admission = Admission(
            batch_groups=self.batch_groups,
            max_staleness=self.max_staleness,
            steps=self.steps,
            next_step=self._batches.next_step,
            version=version,
            in_flight=self._leases.count("leased"),
            waiting=self._leases.count("kept"),
            replays=self._batches.replays,
        )
        if self._deterministic and admission.capacity:
            if not self._wave_left and not admission.in_flight:
                self._wave_left = admission.capacity
            wait = None if self._wave_left else f"{count(admission.in_flight)} in flight: one wave at a time"
            return min(n, self._wave_left), version, wait
        return min(n, admission.capacity), version, admission.reason

    def renew(self, lease_ids: Iterable[int], worker: str | None = None) -> list[int]:
        """Prolong leases. -> those that are lost: ended, expired, or held by another worker now."""
        with self._db.lock:
            self._expire()
            return self._leases.renew(lease_ids, worker)

    def give_back(self, lease_ids: Iterable[int]) -> None:
        """Leases return to the queue; those that have ended are left alone."""
        with self._db.lock:
            self._leases.give_back(lease_ids)
        self._changed()

    def release_worker(self, worker: str) -> int:
        """A worker died: its leases return to the queue, an engine of that name is down. -> how many leases."""
        with self._db.lock:
            released = self._leases.requeue("state = 'leased' AND worker = ?", worker)
            if worker in self._board.engines:
                self._board.report(worker, {"version": None, "state": "down"})
            self._gpu_leases.forget(worker)
        self._changed()
        return released

    def _expire(self) -> None:
        if self._leases.expire():
            self._changed()

    def put(self, blob: bytes) -> PutStatus:
        """A graded group comes in under its lease. Raises ValueError when `blob` is no packed group.

        The first arrival counts, even when its lease has expired meanwhile; every later one is a duplicate.
        """
        group = unpack_group(blob)
        with self._db.lock:
            status = self._leases.put(group, blob, self._batches.next_step)
        self._changed()
        return status

    def skip(self, lease_id: int, reason: str) -> None:
        """A prompt that nothing can be generated from (too long). Frees its capacity; counted."""
        with self._db.lock:
            self._leases.skip(lease_id, reason)
        self._changed()

    # ---- batches -----------------------------------------------------------------------------------------------------

    def batch(self, step: int) -> dict[str, Any]:
        """The groups of `step`: always the same ones, once they were assigned.

        -> {"step", "groups": [packed], "stats": {...}, "replay": how often they were trained on before} or
        {"wait": reason}. `stats` speaks of everything that came in
        while this step was the next one, dropped groups included: arrived_groups, dropped_groups, expired_groups,
        reward_mean (absent when nothing came in), tokens, samples, timeouts. Raises RunFailed for a step out of order,
        and when it would wait for groups although `max_dropped_batches` batches' worth in a row had no signal (0:
        never).
        """
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
        with self._db.lock:
            self._batches.ack(step, version, checkpoint_step)
        self._changed()

    def rewind(self, step: int, version: int) -> None:
        """Go on from a checkpoint that has trained steps < `step` and holds `version`.

        Batches of later steps stay assigned and are served again; their acknowledgements, later versions and their
        evaluations never were; leases in flight are granted again. Nothing is announced until the trainer has published
        `version` anew. A deterministic run forgets the groups that no batch holds: their waves begin again, whole.
        A run that never had a checkpoint and has let go of its batches begins anew, with its first prompt.
        Raises RunFailed when those batches are pruned.
        """
        with self._db.lock:
            anew = not step and self._batches.begins_anew
            if not anew:
                self._batches.check_rewind(step)
            with self._db.transaction():
                if anew:
                    self._batches.forget_all()
                self._batches.unacknowledge(step)
                self._board.rewind(version)
                self._db.set_meta("dropped_in_a_row", 0)
            self._leases.requeue("state = 'leased'")
            self._gpu_leases.reset()
            if self._deterministic:
                self._leases.forget_since_last_batch()
                self._wave_left = 0
        self._changed()

    # ---- versions, engines, evaluations ------------------------------------------------------------------------------

    def announce(self, version: int, step: int) -> dict[str, Any]:
        """See `EvalBoard.announce`."""
        reply = self._board.announce(version, step)
        self._changed()
        return reply

    def target(self, engine: str) -> dict[str, Any]:
        """-> {"version": int or None, "pinned": bool, "stop": bool}; of an engine with a GPU lease also
        "wanted": whether someone waits for it and no evaluation is pinned to it; of one that was lost "down"."""
        with self._db.lock:
            version, pinned = self._board.target(engine)
            more = {"wanted": self._gpu_leases.wanted(engine) and not pinned} if engine in self._gpu_leases else {}
            more |= {"down": True} if self._board.down(engine) else {}
        return {"version": version, "pinned": pinned, "stop": self._stop, **more}

    def take_gpu_lease(self, gpu_lease: str, who: str) -> dict[str, Any]:
        """-> {"held": bool, "stop": bool}. See `GpuLeases.take`."""
        with self._db.lock:
            before = self._gpu_leases.document()
            held = self._gpu_leases.take(gpu_lease, who)
            moved = before != self._gpu_leases.document()
        if moved:
            self._changed()
        return {"held": held, "stop": self._stop}

    def give_gpu_lease(self, gpu_lease: str, who: str) -> None:
        with self._db.lock:
            self._gpu_leases.give(gpu_lease, who)
        self._changed()

    def engine_state(self, engine: str, version: int | None, state: str, **info: Any) -> None:
        """An engine's report: what it holds and whether it is `ready`, `updating` or `down`."""
        self._board.report(engine, {"version": version, "state": state, **info})
        self._changed()

    def eval_next(self, finishing: Collection[int] = ()) -> dict[str, Any]:
        """-> {"step", "version", "due_step", "served"} or {"wait": reason, "stop": bool}: also when none will come.
        See `EvalBoard.next`."""
        with self._db.lock:
            found, wait = self._board.next(finishing)
            if found is not None and not self._stop:
                return asdict(found)
            return {"wait": wait or STOPPING, "stop": self._stop or self.finished}

    def eval_engines(self, version: int) -> dict[str, Any]:
        """-> {"engines": names of those that can be asked for the evaluation of `version` now, "stop": bool}"""
        with self._db.lock:
            return {"engines": self._board.holders(version), "stop": self._stop}

    def eval_release(self, step: int, version: int, engine: str) -> None:
        """See `EvalBoard.release`."""
        self._board.release(step, version, engine)
        self._changed()

    def pending_evals(self) -> int:
        """Evaluations that became due and are not done."""
        return self._board.open

    def eval_done(self, step: int, version: int, results: Any) -> None:
        """See `EvalBoard.done`."""
        self._board.done(step, version, results)
        self._changed()

    # ---- reading -----------------------------------------------------------------------------------------------------

    def counts(self) -> dict[str, int]:
        """Groups by fate, for the terminal; `timeouts` counts samples."""
        with self._db.lock:
            return self._overview.counts()

    def state(self) -> dict[str, Any]:
        """Everything that the terminal shows of the store."""
        with self._db.lock:
            return self._overview.document() | {"finished": self.finished, "stop": self._stop}
