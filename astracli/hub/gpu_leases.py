"""GPU leases: who may use a GPU that engine and trainer share in time.

A lease has one holder; the others get it in the order in which they asked. Whoever uses the GPU's memory holds the
lease. The engine holds it from the start, because it reserves its memory before anyone else is there. Leases are kept
in memory only: a hub that starts again starts its engines again, too.
"""

from __future__ import annotations

from collections.abc import Iterable

from astracli.hub.types import BadRequest, GpuLeaseStatus


class GpuLeases:
    """One lease per engine, under the engine's name. Calls are made under the store's lock."""

    def __init__(self, engines: Iterable[str] = ()):
        self._engines = tuple(engines)
        self.reset()

    def reset(self) -> None:
        """Every process starts anew: each engine holds its lease, nobody waits."""
        self._holder: dict[str, str | None] = {name: name for name in self._engines}
        self._queue: dict[str, list[str]] = {name: [] for name in self._engines}

    def take(self, gpu_lease: str, who: str) -> bool:
        """Whether `who` holds the lease now; otherwise it is in the queue, once however often it asks.

        Raises BadRequest for a GPU lease that does not exist.
        """
        if gpu_lease not in self._holder:
            raise BadRequest(f"there is no GPU lease `{gpu_lease}`; there are {', '.join(self._holder) or 'none'}")
        if self._holder[gpu_lease] == who:
            return True
        queue = self._queue[gpu_lease]
        if who not in queue:
            queue.append(who)
        if self._holder[gpu_lease] is None and queue[0] == who:
            self._holder[gpu_lease] = queue.pop(0)
            return True
        return False

    def give(self, gpu_lease: str, who: str) -> None:
        """`who` no longer holds the lease or waits for it; the first in the queue may take it."""
        if self._holder.get(gpu_lease) == who:
            self._holder[gpu_lease] = None
        if who in self._queue.get(gpu_lease, []):
            self._queue[gpu_lease].remove(who)

    def forget(self, who: str) -> None:
        """A process is dead: it holds no lease and waits for none."""
        for gpu_lease in self._holder:
            self.give(gpu_lease, who)

    def wanted(self, gpu_lease: str) -> bool:
        """Whether anyone waits for the lease."""
        return bool(self._queue.get(gpu_lease))

    def document(self) -> dict[str, GpuLeaseStatus]:
        return {gpu_lease: GpuLeaseStatus(who, list(self._queue[gpu_lease])) for gpu_lease, who in self._holder.items()}
