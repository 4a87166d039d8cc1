"""The agents of a run: who may join, what each is to do, what it told. Lives in memory, for one attempt.

An agent joins with a *ticket*, the token of the file that its command names. A ticket serves one agent: it gets a token
of its own, and another agent with the same ticket is refused. When an agent leaves, or is not heard for its lease, its
token is revoked and its host gets a new ticket.
"""

from __future__ import annotations

import base64
import hmac
import re
import secrets
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from astracli.config.recipe_run import HOST_NAME, NEWCOMER
from astracli.errors import AstraError
from astracli.hub.agent_types import Joined, Order, Orders, ProcessNews
from astracli.hub.types import BadRequest

SILENT = 1.1
"""Of its lease: an agent that was not heard for so long has ended its processes by now."""
TICKET, AGENT = "ticket:", "agent:"
"""How a token's holder is called, with the host behind it."""


class Refused(AstraError):
    """An agent may not join, or not go on."""


@dataclass
class Agent:
    """One that has joined."""

    host: str
    ident: str
    """Which process it is: drawn by itself."""
    token: str
    address: str
    ports: tuple[int, ...]
    facts: Mapping[str, Any]
    heard: float
    orders: list[Order] = field(default_factory=list)
    """Not done yet, as far as it has told."""
    given: int = 0
    usage: dict[str, tuple[int, int]] = field(default_factory=dict)
    memory: dict[str, Any] = field(default_factory=dict)
    gone: str | None = None
    """Why it is no more, in words."""
    settled: bool = False
    """It has done the order to end."""


State = Literal["awaited", "here", "gone"]


class Agents:
    """Thread-safe. `clock` returns monotonic seconds."""

    def __init__(
        self,
        hosts: Iterable[str],
        *,
        run: str,
        versions: Mapping[str, str],
        lease_s: float,
        on_news: Callable[[str, ProcessNews, bytes], None] = lambda host, news, text: None,
        on_ticket: Callable[[str, str], None] = lambda host, ticket: None,
        newcomers: str | None = None,
        judge: Callable[[str, Mapping[str, Any]], str | None] = lambda host, facts: None,
        clock: Callable[[], float] = time.monotonic,
    ):
        """`versions`: of the packages that must be the same on every host. `on_news`: a process's state and what it
        wrote; `on_ticket`: a host's new ticket. `newcomers`: why no host beside these may join; None: any may.
        `judge`: why a host with these facts may not, None when it may."""
        self._run, self._versions, self.lease_s = run, dict(versions), lease_s
        self._on_news, self._on_ticket, self._clock, self._judge = on_news, on_ticket, clock, judge
        self._lock = threading.RLock()
        self._agents: dict[str, Agent] = {}
        self._tickets: dict[str, str] = {}
        self._new = ""
        """The ticket of a host that has none of its own."""
        self._used: dict[str, tuple[str, str]] = {}
        """Ticket -> (host, ident) of the agent that joined with it."""
        self._host_tokens: dict[str, str] = {}
        self._listeners: list[Callable[[], None]] = []
        self.refusals: list[str] = []
        """Why agents were turned away, newest last."""
        for host in hosts:
            self.add(host)
        if newcomers is None:
            self._renew()

    # ---- tokens ------------------------------------------------------------------------------------------------------

    def add(self, host: str) -> None:
        """A host whose agent may join."""
        with self._lock:
            self._host_tokens.setdefault(host, secrets.token_urlsafe(32))
            self._new_ticket(host)

    def _new_ticket(self, host: str) -> None:
        self._tickets[host] = secrets.token_urlsafe(32)
        self._on_ticket(host, self._tickets[host])

    def _renew(self) -> None:
        self._new = secrets.token_urlsafe(32)
        self._on_ticket(NEWCOMER, self._new)

    @property
    def hosts(self) -> list[str]:
        return list(self._tickets)

    def ticket(self, host: str) -> str:
        """Of a planned host; of `new`, that for the next host that is not planned."""
        return self._new if host == NEWCOMER else self._tickets[host]

    def host_token(self, host: str) -> str:
        """What the processes of that host, and those that talk to them, show each other."""
        return self._host_tokens[host]

    def holder(self, token: str) -> str | None:
        """Who shows this token: `ticket:HOST`, `agent:HOST`, or None."""
        with self._lock:
            tickets = [(f"{TICKET}{host}", ticket) for host, ticket in self._tickets.items()]
            tickets += [(f"{TICKET}{NEWCOMER}", self._new)] if self._new else []
            used = [(f"{TICKET}{host}", ticket) for ticket, (host, _) in self._used.items()]
            here = [(f"{AGENT}{host}", agent.token) for host, agent in self._agents.items() if agent.gone is None]
        found = None
        for name, known in (*tickets, *used, *here):
            if hmac.compare_digest(known.encode(), token.encode()):
                found = name
        return found

    # ---- what agents call --------------------------------------------------------------------------------------------

    def join(
        self,
        host: str,
        ticket: str,
        ident: str,
        address: str,
        ports: list[int],
        versions: dict[str, str],
        facts: dict[str, Any],
        name: str | None = None,
    ) -> Joined:
        """Raises Refused. The same agent may ask twice: an answer may be lost. `name`: how a host that joins later is
        called."""
        with self._lock:
            self._look()
            newcomer = host == NEWCOMER
            if newcomer:
                host = self._named(name)
            there = self._agents.get(host)
            if there is not None and there.gone is None and there.ident == ident:
                return self._joined(there)
            if ticket != (self._new if newcomer else self._tickets.get(host)):
                raise self._refusal(f"the token of host `{host}` has been used: it is good for one agent")
            for name, ours in self._versions.items():
                theirs = versions.get(name)
                if theirs != ours:
                    raise self._refusal(
                        f"host `{host}` has {name} {theirs or '(not installed)'}, this run uses {name} {ours}",
                        f"install the same versions on every host: `pip install '{name}=={ours}'`",
                    )
            if (wrong := self._judge(host, facts)) is not None:
                raise self._refusal(f"host `{host}` cannot join: {wrong}")
            if there is not None and there.address != address:
                raise self._refusal(
                    f"host `{host}` had the address {there.address}, now it comes from {address}",
                    f"start it with `--address {there.address}`: evaluations know its engines there",
                )
            if newcomer:
                self._host_tokens.setdefault(host, secrets.token_urlsafe(32))
                self._renew()
            kept = tuple(ports) if there is None else there.ports
            agent = Agent(host, ident, secrets.token_urlsafe(32), address, kept, facts, self._clock())
            self._agents[host] = agent
            self._used = {t: who for t, who in self._used.items() if who[0] != host} | {ticket: (host, ident)}
            self._tickets[host] = secrets.token_urlsafe(32)  # nobody has seen it: written down when this agent is gone
        self._changed()
        return self._joined(agent)

    def _named(self, name: str | None) -> str:
        """The host that joins with the newcomers' ticket. Raises Refused."""
        if name is None or not re.fullmatch(HOST_NAME, name) or name == NEWCOMER:
            raise self._refusal(f"`{name}` is no name of a host", "give `astra agent` another with `--name`")
        there = self._agents.get(name)
        if name in self._tickets and (there is None or there.gone is None):
            raise self._refusal(
                f"this run has a host `{name}` already", "take that host's token file, or another name: `--name NAME`"
            )
        return name

    def _joined(self, agent: Agent) -> Joined:
        return Joined(agent.token, self._host_tokens[agent.host], self.lease_s, self._run)

    def _refusal(self, message: str, hint: str | None = None) -> Refused:
        self.refusals.append(message)
        return Refused(message, hint)

    def orders(self, host: str, done: int) -> Orders:
        """What the agent has not done yet; `done`: number of the last order that it has."""
        with self._lock:
            agent = self._here(host)
            ended = next((one for one in agent.orders if one.number <= done and one.kind == "end"), None)
            agent.settled = agent.settled or ended is not None
            agent.orders = [order for order in agent.orders if order.number > done]
            return Orders(list(agent.orders))

    def report(
        self, host: str, processes: list[ProcessNews], usage: dict[str, tuple[int, int]], memory: dict[str, Any]
    ) -> None:
        """What its processes do. Telling it twice changes nothing."""
        with self._lock:
            agent = self._here(host)
            agent.usage, agent.memory = usage, memory
        for news in processes:
            try:
                text = base64.b64decode(news.text, validate=True)
            except ValueError as error:
                raise BadRequest(f"the text of a log is no base64: {error}") from None
            self._on_news(host, news, text)
        self._changed()

    def leave(self, host: str, reason: str) -> None:
        """The agent ends; its processes have ended. Its token is revoked with this call."""
        with self._lock:
            agent = self._here(host)
            agent.settled = True
            self._revoke(agent, reason)
        self._changed()

    def _here(self, host: str) -> Agent:
        agent = self._agents.get(host)
        if agent is None or agent.gone is not None:
            raise Refused(f"host `{host}` has no agent in this run any more")
        agent.heard = self._clock()
        return agent

    # ---- what the supervisor calls -----------------------------------------------------------------------------------

    def subscribe(self, listener: Callable[[], None]) -> None:
        self._listeners.append(listener)

    def _changed(self) -> None:
        for listener in self._listeners:
            listener()

    def order(self, host: str, kind: Literal["start", "stop", "stacks", "end"], **more: Any) -> None:
        """Tell an agent what to do; nothing when it is gone."""
        with self._lock:
            agent = self._agents.get(host)
            if agent is None or agent.gone is not None:
                return
            agent.given += 1
            agent.orders.append(Order(agent.given, kind, **more))
        self._changed()

    def agent(self, host: str) -> Agent | None:
        """The newest agent of a host, here or gone."""
        with self._lock:
            self._look()
            return self._agents.get(host)

    def state(self, host: str) -> State:
        agent = self.agent(host)
        return "awaited" if agent is None else "here" if agent.gone is None else "gone"

    def all(self) -> dict[str, Agent]:
        with self._lock:
            self._look()
            return dict(self._agents)

    def silent_s(self, host: str) -> float:
        """Seconds since the agent was heard."""
        agent = self._agents.get(host)
        return 0.0 if agent is None else self._clock() - agent.heard

    def _look(self) -> None:
        """Agents that were silent for too long are gone."""
        for agent in self._agents.values():
            if agent.gone is None and self._clock() - agent.heard > SILENT * self.lease_s:
                self._revoke(agent, f"was not heard for {self.lease_s:g} s")

    def _revoke(self, agent: Agent, reason: str) -> None:
        agent.gone = reason
        self._new_ticket(agent.host)
