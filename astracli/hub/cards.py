"""Who may use a shared GPU: one holder a card, the others in the order in which they asked.

An engine and a trainer that take turns on a GPU hold its card while they use the memory. An engine holds its card from
the start, because it reserves its memory before anyone else is there. The book lives in memory: a hub that starts again
starts its engines again, too.
"""

from __future__ import annotations

from collections.abc import Iterable

from astracli.hub.types import BadRequest, CardStatus


class CardBook:
    """Cards by the name of the engine whose GPU they stand for. Calls are made under the store's lock."""

    def __init__(self, engines: Iterable[str] = ()):
        self._engines = tuple(engines)
        self.reset()

    def reset(self) -> None:
        """Every process begins anew: each engine holds its card, nobody waits."""
        self._holder: dict[str, str | None] = {name: name for name in self._engines}
        self._queue: dict[str, list[str]] = {name: [] for name in self._engines}

    def take(self, card: str, who: str) -> bool:
        """Whether `who` holds the card now; otherwise it keeps its place in the queue. Asking again changes nothing.

        Raises BadRequest for a card that there is not.
        """
        if card not in self._holder:
            raise BadRequest(f"there is no card `{card}`; there are {', '.join(self._holder) or 'none'}")
        if self._holder[card] == who:
            return True
        queue = self._queue[card]
        if who not in queue:
            queue.append(who)
        if self._holder[card] is None and queue[0] == who:
            self._holder[card] = queue.pop(0)
            return True
        return False

    def give(self, card: str, who: str) -> None:
        """`who` holds the card, or waits for it, no longer; the first that waits may take it."""
        if self._holder.get(card) == who:
            self._holder[card] = None
        if who in self._queue.get(card, []):
            self._queue[card].remove(who)

    def forget(self, who: str) -> None:
        """A process is dead: what it held or waited for is the others'."""
        for card in self._holder:
            self.give(card, who)

    def wanted(self, card: str) -> bool:
        """Whether anyone waits for the card."""
        return bool(self._queue.get(card))

    def document(self) -> dict[str, CardStatus]:
        return {card: CardStatus(who, list(self._queue[card])) for card, who in self._holder.items()}
