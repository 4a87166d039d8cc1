"""What `into_sglang.py` finds of versions: one line each to stderr at once, all so far to a file, a summary."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

from astracli.weights.format.manifest import write_atomic

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from shared import say, spread

BEGAN = time.monotonic()
FIGURES = (
    "density", "bytes_per_changed", "publish_s", "digest_s", "delta_s", "diff_s", "encode_s", "transfer_s", "stage_s",
    "decode_s", "decode_gb_per_s", "load_s", "abort_ms", "pause_ms", "pause", "call", "begin", "record", "apply",
    "digest", "digest_tables", "digest_launch", "digest_device", "loader", "end", "continue", "readback_s",
    "readback_wait_s", "readback_place_s", "readback_tables_s", "readback_launch_s", "readback_device_s",
    "readback_seen_s", "tokens_per_s", "staging_tokens_per_s", "staging_s", "recovery_s", "again_s",
)  # fmt: skip


class Record:
    """What is known so far: to stderr at once, and whole to --out."""

    def __init__(self, out: Path | None):
        self.out, self.doc = out, {"setup": {}, "rows": []}
        self.setup, self.rows = self.doc["setup"], self.doc["rows"]

    def note(self, **found: Any) -> None:
        """A figure of the setup, with the seconds since the start."""
        self.setup.update(found)
        self._tell({"at_s": round(time.monotonic() - BEGAN, 2), **found})

    def row(self, row: dict[str, Any]) -> None:
        self.rows.append(row)
        self._tell(row)

    def _tell(self, doc: dict[str, Any]) -> None:
        say(doc)
        if self.out is not None:
            self.doc["summary"] = summary(self.rows)
            write_atomic(self.out, json.dumps(self.doc, indent=1).encode())


def summary(rows: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Mode -> figure -> median, 99th percentile (the worst of fewer than a hundred), number of counted versions."""
    found: dict[str, dict[str, Any]] = {}
    for mode in dict.fromkeys(row["mode"] for row in rows if row.get("counted")):
        flat = [row | row["split_ms"] for row in rows if row.get("counted") and row["mode"] == mode]
        found[mode] = {}
        for key in FIGURES:
            if values := spread(row[key] for row in flat if row.get(key) is not None):
                found[mode][key] = values
        if late := [row for row in flat if row.get("recovery_s", 0.0) is None]:
            found[mode]["not_recovered"] = {"p50": len(late), "p99": len(late), "n": len(flat)}
        staged = [row for row in flat if row.get("tokens_per_s")]
        if staged:  # a window is a fraction of a second: all together
            usual = sum(row["tokens_per_s"] * row["staging_s"] for row in staged)
            ratio = sum(row["staging_tokens_per_s"] * row["staging_s"] for row in staged) / max(1e-9, usual)
            found[mode]["staging_ratio"] = {"p50": ratio, "p99": ratio, "n": len(staged)}
    return found
