"""Keeps agents running on the hosts of a run: starts them, starts lost ones again, and takes hosts that arrive."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from astracli.config.recipe_run import NEWCOMER
from astracli.errors import RunFailed
from astracli.launch.clusters.contract import LEFT, AgentCall, AgentEnd, AgentProcess, Hosts
from astracli.process.console import say

LOOK_S = 0.2
FIRST_DELAY_S, LONGEST_DELAY_S = 2.0, 60.0
"""Before a lost agent is started again; twice as long after each time that none came of it."""


class Members(Protocol):
    """Which agents a run has: `hub.agents.Agents`, as far as it is asked here."""

    def state(self, host: str) -> str:
        """`awaited`, `here` or `gone`"""

    def ticket(self, host: str) -> str: ...


@dataclass
class _Place:
    """A host, and the agent that was started there last."""

    planned: bool
    delay_s: float
    """Before the next start."""
    process: AgentProcess | None = None
    next_start: float = 0.0
    joined: bool = False
    """An agent was there once."""
    left: bool = False
    """Its user took it back: no agent is started there again."""


class Keeper:
    """`failure` says which host of the plan cannot take part, before it ever did. Later losses are only said: the run
    goes on without a host, and `launch.away` decides for how long."""

    def __init__(
        self,
        hosts: Hosts,
        planned: Sequence[str],
        members: Members,
        url: str,
        logs: Path,
        *,
        newcomers: bool,
        delay_s: float = FIRST_DELAY_S,
    ):
        """`newcomers`: whether hosts beside the planned may join. `delay_s`: before a lost agent is started again."""
        self._hosts, self._members, self._url, self._logs, self._newcomers = hosts, members, url, logs, newcomers
        self._delay_s = delay_s
        self.places = {host: _Place(True, delay_s) for host in planned}
        self._failure: RunFailed | None = None
        self._held = threading.Event()
        self._thread = threading.Thread(target=self._run, name="keeper", daemon=True)

    def begin(self) -> Keeper:
        self._thread.start()
        return self

    def failure(self) -> RunFailed | None:
        return self._failure

    def awaited(self, host: str) -> str:
        """What a host waits for, in words; "" for its agent alone."""
        return self._hosts.awaited(host)

    def hold(self) -> None:
        """Start nothing more: the run ends."""
        self._held.set()
        self._thread.join()

    def close(self) -> None:
        """End what is left. After the hub has told every agent that the run ends, that is nothing."""
        self.hold()
        processes = [place.process for place in self.places.values() if place.process is not None]
        if processes:
            with ThreadPoolExecutor(len(processes)) as pool:
                list(pool.map(lambda process: process.end(), processes))
        self._hosts.close()

    def _run(self) -> None:
        while not self._held.is_set():
            try:
                for host in self._hosts.arrivals() if self._newcomers else ():
                    self.places.setdefault(host, _Place(False, self._delay_s))
                for host, place in self.places.items():
                    self._look(host, place)
            except RunFailed as error:
                self._failure = error
                return
            self._held.wait(LOOK_S)

    def _look(self, host: str, place: _Place) -> None:
        """Raises RunFailed for a host of the plan that was never there."""
        here = self._members.state(host) == "here"
        if here:
            place.joined, place.delay_s = True, self._delay_s
        if place.process is not None:
            end = place.process.ended()
            if end is None:
                return
            place.process = None
            place.left = end.code == LEFT and place.joined
            self._say_end(host, place, end)
        own = place.planned or place.joined
        if place.joined and not here and not place.left and self._hosts.lost(host):
            place.left = True
            say(f"warning: host `{host}` is lost, and no agent is started there again")
        if place.left or here or time.monotonic() < place.next_start or not (own or self._ticket_is_free()):
            return
        call = AgentCall(self._url, host, self._members.ticket(host if own else NEWCOMER))
        place.process = self._hosts.start(host, call, self._log(host))

    def _ticket_is_free(self) -> bool:
        """Hosts that arrive share a ticket, which is good once: one after the other."""
        arriving = [place for place in self.places.values() if not (place.planned or place.joined)]
        return all(place.process is None for place in arriving)

    def _log(self, host: str) -> Path:
        return self._logs / f"agent-{host}.log"

    def _say_end(self, host: str, place: _Place, end: AgentEnd) -> None:
        place.next_start = time.monotonic() + place.delay_s
        again = f"another is started in {place.delay_s:g} s"
        place.delay_s = min(2 * place.delay_s, LONGEST_DELAY_S)
        if place.left:
            say(f"host `{host}` was taken back: its agent was told to leave, and none is started there again")
        elif not place.joined and place.planned:
            raise RunFailed(
                f"the agent of host `{host}` ended before it joined the run: {end.words}",
                f"its whole log is {self._log(host)}; `astra doctor` with the same recipe checks the hosts",
            )
        elif end.code != 0:
            say(f"warning: the agent of host `{host}` ended: {end.words}; {again}")
