"""What must hold of a run's files when it has come to its end, however often it was killed on the way."""

from __future__ import annotations

import csv
import json
import sqlite3
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import psutil

FATES = ("assigned", "dropped", "expired", "skipped")
Rules = dict[str, list[object]]
"""Rule -> what breaks it."""


def recipe_of(run: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((run / "recipe.json").read_text())
    return found


def acked(run: Path) -> int:
    """Steps that have a batch."""
    with sqlite3.connect(run / "hub.sqlite") as hub:
        return int(hub.execute("SELECT COALESCE(MAX(step) + 1, 0) FROM batches").fetchone()[0])


def check_hub(run: Path, steps: int) -> Rules:
    """No group lost, none trained twice, none outside its staleness."""
    train = recipe_of(run)["train"]
    size, staleness = train["batch_groups"], train["max_staleness"]
    with sqlite3.connect(run / "hub.sqlite") as hub:
        batches = hub.execute("SELECT step, lease_ids, acked, version FROM batches ORDER BY step").fetchall()
        groups = hub.execute("SELECT lease_id, state, step, version FROM groups ORDER BY lease_id").fetchall()
    trained = [lease for _, ids, _, _ in batches for lease in json.loads(ids)]
    of_step = {lease: step for step, ids, _, _ in batches for lease in json.loads(ids)}
    assigned = [group for group in groups if group[1] == "assigned"]
    return {
        "reached the last step": [len(batches)] if len(batches) != steps else [],
        "no lease in two batches": [lease for lease, times in Counter(trained).items() if times > 1],
        f"every batch is of {size} groups": [step for step, ids, _, _ in batches if len(json.loads(ids)) != size],
        "every batch acknowledged once": [s for s, _, acked, v in batches if acked != 1 or v != s + 1],
        "no lease id is missing": sorted(set(range(len(groups))) - {row[0] for row in groups}),
        "every lease has one fate": [row for row in groups if row[1] not in FATES],
        "groups and batches agree": [g for g in groups if (g in assigned) != (g[0] in of_step)]
        + [g for g in groups if g[2] != of_step.get(g[0])],
        "no token too old or too new": [g for g in assigned if not g[2] - staleness <= g[3] <= g[2]],
    }


def check_files(run: Path, steps: int, items: Mapping[str, int]) -> Rules:
    """Evaluations, the export, and what should not be there. `items`: benchmark -> its items."""
    every = recipe_of(run)["eval"]["every"]
    due = [*range(0, steps, every), steps]
    rows = list(csv.DictReader((run / "eval" / "eval.csv").open(errors="replace")))
    spans = [(int(row["due_step"]), int(row["step"]), row["benchmark"]) for row in rows]
    found = Counter((step, name) for first, last, name in spans for step in due if first <= step <= last)
    wanted = Counter((step, name) for step in due for name in (*items, "overall"))
    torn = [
        file.name
        for name, count in items.items()
        for file in (run / "eval" / "items").glob(f"*_{name}.jsonl")
        if len(file.read_bytes().splitlines()) != count
    ]
    return {
        "eval.csv: one row stands for every due step": sorted(((found - wanted) + (wanted - found)).items()),
        "every evaluation has all its items": torn,
        "no unfinished evaluation is left": [path.name for path in (run / "eval").glob("partial/*")],
        "the last version's digests are the export's": wrong_digests(run, steps),
        "nothing is left running": list(processes_of(run)),
    }


def wrong_digests(run: Path, version: int) -> list[object]:
    """Tensors of the export that are not, bit for bit, what the last manifest says."""
    import torch
    from safetensors.torch import load_file

    from astracli.weights.format.digest import digest_tensor, to_hex
    from astracli.weights.format.manifest import MANIFEST, Manifest, read_stable, version_name

    kind = next(iter(read_stable(run / "weights", version)["manifests"]))
    manifest = Manifest.from_bytes((run / "weights" / version_name(version) / MANIFEST[kind]).read_bytes())
    exported = load_file(run / "export" / "model.safetensors")
    return [
        entry.name
        for entry in manifest.tensors
        if to_hex(digest_tensor(exported[entry.name].to(getattr(torch, entry.dtype)).contiguous())) != entry.digest
    ]


def processes_of(run: Path) -> list[int]:
    """Ids of processes that still run with a config of this run."""
    found = []
    for process in psutil.process_iter():
        try:
            if any(str(run / "config") in word for word in process.cmdline()):
                found.append(process.pid)
        except psutil.Error:
            continue
    return found
