"""Who may use a shared GPU: one holder a GPU lease, the others in the order in which they asked.

An engine and a trainer that take turns on a GPU hold its GPU lease while they use the memory. An engine holds its GPU lease from
the start, because it reserves its memory before anyone else is there. The book lives in memory: a hub that starts again
starts its engines again, too.
"""

from __future__ import annotations

from collections.abc import Iterable


class GpuLeases:
    """GPU leases by the name of the engine whose GPU they stand for. Calls are made under the store's lock."""

    def __init__(self, engines: Iterable[str] = ()):
        self._holder: dict[str, str | None] = dict.fromkeys(engines)
        self._queue: dict[str, list[str]] = {}
        self.reset()

    def reset(self) -> None:
        """Every process begins anew: each engine holds its GPU lease, nobody waits."""
        self._holder = {name: name for name in self._holder}
        self._queue = {name: [] for name in self._holder}

    def __contains__(self, gpu_lease: str) -> bool:
        return gpu_lease in self._holder

    def take(self, gpu_lease: str, who: str) -> bool:
        """Whether `who` holds the GPU lease now; otherwise it keeps its place in the queue. Asking again changes nothing.

        Raises ValueError for a GPU lease that there is not.
        """
        if gpu_lease not in self._holder:
            raise ValueError(f"there is no GPU lease `{gpu_lease}`; there are {', '.join(self._holder) or 'none'}")
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
        """`who` holds the GPU lease, or waits for it, no longer; the first that waits may take it."""
        if self._holder.get(gpu_lease) == who:
            self._holder[gpu_lease] = None
        if who in self._queue.get(gpu_lease, []):
            self._queue[gpu_lease].remove(who)

    def forget(self, who: str) -> None:
        """A process is dead: what it held or waited for is the others'."""
        for gpu_lease in self._holder:
            self.give(gpu_lease, who)

    def wanted(self, gpu_lease: str) -> bool:
        """Whether anyone waits for the GPU lease."""
        return bool(self._queue.get(gpu_lease))

    def document(self) -> dict[str, dict[str, object]]:
        return {
            gpu_lease: {"holder": who, "waiting": list(self._queue[gpu_lease])}
            for gpu_lease, who in self._holder.items()
        }
