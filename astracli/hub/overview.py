"""What the terminal and the reports show of the hub's store: groups by fate, steps, versions, engines, evaluations."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from astracli.hub.batches import BatchBook
from astracli.hub.evals import EvalBoard
from astracli.hub.gpu_leases import GpuLeases
from astracli.hub.leases import LeaseBook
from astracli.hub.schema import Database


@dataclass(frozen=True)
class Overview:
    """Part of the store, which holds the database's lock around every call. Changes nothing."""

    database: Database
    leases: LeaseBook
    batches: BatchBook
    board: EvalBoard
    gpu_leases: GpuLeases
    batch_groups: int
    steps: int

    def counts(self) -> dict[str, int]:
        """Groups by fate; `timeouts` counts samples. Rows that retention deleted are among them."""
        count, forgotten = self.leases.count, self.batches.forgotten
        acked, replayed = self.batches.acked, self.batches.replayed
        timeouts = self.database.scalar("SELECT COALESCE(SUM(timeouts), 0) FROM groups WHERE timeouts > 0")
        return {
            "in_flight": count("leased"),
            "queued": count("queued"),
            "waiting": count("kept"),
            "dropped": count("dropped") + forgotten("dropped"),
            "expired": count("expired") + forgotten("expired"),
            "skipped": count("skipped") + forgotten("skipped"),
            "timeouts": timeouts + forgotten("timeouts"),
            "consumed_steps": acked,
            "consumed_groups": (acked - replayed) * self.batch_groups,
            "replayed_steps": replayed,
        }

    def document(self) -> dict[str, Any]:
        return {
            "steps": self.steps,
            "next_step": self.batches.next_step,
            "latest_version": self.board.latest,
            "counts": self.counts(),
            "dropped_in_a_row": self.database.meta("dropped_in_a_row"),
            "skipped_in_a_row": self.database.meta("skipped_in_a_row"),
            "engines": {name: dict(report) for name, report in self.board.engines.items()},
            "evals": self.board.document(),
            "gpu_leases": self.gpu_leases.document(),
        }
