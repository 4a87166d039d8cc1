"""Weight transfer: what changed since the last version, written, served, fetched, applied and checked bit for bit."""

from __future__ import annotations

from astracli.errors import RunFailed


class WeightCorrupt(RunFailed):
    """Bytes that cannot be what the publisher wrote: a payload, a manifest or a plan. Nothing was applied from them."""


class WeightMismatch(RunFailed):
    """The weights are not those the manifest promises: wrong base, missing tensor or wrong digest. Fetch in full."""
