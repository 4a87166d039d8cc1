"""What the metrics of a step say besides its training: what arrived for its batch, and what its version took."""

from __future__ import annotations

from dataclasses import asdict

from astracli.hub.types import Batch
from astracli.weights.publish.publisher import PublishResult


def arrived(batch: Batch, *, replays: bool) -> dict[str, float]:
    """The hub's counts of a batch, by name; `replays`: whether the run trains on a batch more than once."""
    told = asdict(batch.stats)
    parts, errors = told.pop("parts"), told.pop("reward_errors")
    counts = {name.removeprefix("arrived_"): count for name, count in told.items()}
    for source, found in counts.pop("sources").items():
        counts |= {f"{name}/{source}": value for name, value in found.items()}
    stats = {f"arrived_{name}": float(count) for name, count in counts.items() if count is not None}
    stats |= {"reward_errors": float(errors)} | {f"arrived_parts/{name}": mean for name, mean in parts.items()}
    if replays:
        stats["replay"] = float(batch.replay)
    return stats


def published(result: PublishResult) -> dict[str, float]:
    """Metrics of one version; seconds are of this rank, `diff_s` to `write_s` on a CPU summed over its threads. Which
    values an adapter changes is known only where it is merged."""
    same = ("digest_s", "delta_s", "diff_s", "encode_s", "write_s")
    changes = (
        {}
        if result.by_adapter
        else {
            "delta_density": result.density,
            "bytes_per_changed": result.bytes_per_changed,
        }
    )
    return {
        **changes,
        "delta_bytes": result.bytes_delta,
        "full_bytes": result.bytes_full,
        **{name: getattr(result, name) for name in same},
        "stable_s": result.publish_s,
    }
