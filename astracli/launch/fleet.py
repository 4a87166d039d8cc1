"""The hosts of a run as its supervisor sees them: a launcher whose processes agents start, and what they fetch.

A process of another host has its log here too: its agent tells what it writes, and `runs logs` and messages read that.
"""

from __future__ import annotations

import importlib.metadata
import json
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from astracli.config.recipe_run import NEWCOMER, LaunchTable
from astracli.errors import RunFailed, UserError
from astracli.hub.agent_types import ProcessNews
from astracli.hub.agents import Agents
from astracli.launch import configs, shared_dir
from astracli.launch.clusters.keeper import Keeper
from astracli.launch.configs import RunContext, Site
from astracli.launch.host_inputs import HostInputs
from astracli.launch.launcher import Launcher, Process, Started
from astracli.launch.remote import RemoteProcess
from astracli.machine.facts import Machine, validate
from astracli.machine.memory import speed
from astracli.plan import hosts
from astracli.process.atomic import write_atomic
from astracli.process.config import Role
from astracli.process.console import say

SAME_EVERYWHERE = ("astracli", "transformers")
"""Packages whose version must be the same on every host."""
WORDS_S = 15.0
"""Between two lines that say which hosts are awaited."""
REPORT_S = 5.0
"""Beyond its grace, for an agent to tell that a process has ended."""
END_S = 15.0
"""For agents to end everything when the run ends."""


def versions() -> dict[str, str]:
    found = {}
    for name in SAME_EVERYWHERE:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


class Fleet:
    """`launcher.Launcher` over several hosts: `local` starts what is of this one, agents the rest."""

    def __init__(self, context: RunContext, local: Launcher):
        self._context, self._local, self._run = context, local, context.run_dir
        self._limits: LaunchTable = context.recipe.launch
        self._planned = context.recipe.agents
        self.keeper: Keeper | None = None
        """What starts the agents; None: their user does."""
        self._tokens = self._run.path / "agents"
        self._tokens.mkdir(mode=0o700, exist_ok=True)
        self._started: dict[int, RemoteProcess] = {}
        self._starts = 0
        self._lock = threading.Lock()
        self._joined: list[str] = []
        """Hosts beside the plan's."""
        self._named = Counter(process.role for process in context.plan.processes)
        """Processes that have a name, by role."""
        self._told: set[tuple[str, str]] = set()
        self.url = ""
        self.inputs = HostInputs(context.inputs)
        self.agents = Agents(
            self._planned,
            run=self._run.name,
            versions=versions(),
            lease_s=self._limits.agent_lease_s,
            on_news=self._news,
            on_ticket=self._write_ticket,
            newcomers=self._refuses_newcomers(),
            judge=self._judge,
        )

    def _refuses_newcomers(self) -> str | None:
        """Why no host may join beside the plan's; None when any may."""
        if self._limits.deterministic:
            return "a deterministic run keeps its engines"
        return None

    def _judge(self, host: str, facts: Mapping[str, Any]) -> str | None:
        """Why a host with these facts cannot join; those of the plan are planned with when all are here."""
        try:
            machine = validate(facts).limited(self._context.recipe.resources.gpu_memory_gib)
        except UserError as error:
            return error.message
        planned = host in self._planned or self._context.plan.choice.device == "cpu"
        return None if planned else hosts.refusal_of_newcomer(self._context.plan, machine)

    @property
    def takes_newcomers(self) -> bool:
        return self._refuses_newcomers() is None

    # ---- hosts -------------------------------------------------------------------------------------------------------

    def token_file(self, host: str) -> Path:
        return self._tokens / f"{host}.token"

    def _write_ticket(self, host: str, ticket: str) -> None:
        write_atomic(self.token_file(host), ticket + "\n", mode=0o600)

    def command(self, host: str) -> str:
        """What to give on a host."""
        return f"astra agent {self.url} --token-file {self.token_file(host).resolve()}"

    def gather(self, url: str, interrupted: threading.Event, hub_alive: Callable[[], bool]) -> None:
        """Wait until every host of the plan has its agent; returns early when interrupted. Raises RunFailed."""
        self.url = url
        began, told = time.monotonic(), -WORDS_S
        shown = 0
        for host in self._planned if self.keeper is None else ():
            say(f"host `{host}` is awaited: on it, give `{self.command(host)}`")
        while absent := [host for host in self._planned if self.agents.state(host) != "here"]:
            now = time.monotonic() - began
            for words in self.agents.refusals[shown:]:
                say(f"warning: an agent was refused: {words}")
            shown = len(self.agents.refusals)
            if self.keeper is not None and (failure := self.keeper.failure()) is not None:
                raise failure
            if now > self._limits.ready_timeout_s:
                raise self._late(absent)
            if now - told > WORDS_S:
                told = now
                self._run.update(phase="starting", hosts=self.hosts())
            if not hub_alive():
                raise RunFailed("the hub stopped serving")
            if interrupted.wait(0.1):
                return
        for host in self._planned:
            self._note(host)
        if self.takes_newcomers:
            say(f"more hosts may join: `{self.command(NEWCOMER)}`")

    def _late(self, absent: Sequence[str]) -> RunFailed:
        last = self.agents.refusals[-1:]
        words = f"no agent on {_names(absent)} after {self._limits.ready_timeout_s:g} s"
        words += f"; the last that was refused: {last[0]}" if last else ""
        how = f"on it, give `{self.command(absent[0])}`; "
        if self.keeper is not None:
            awaited, how = self.keeper.awaited(absent[0]), ""
            words += f"; {awaited}" if awaited else ""
        return RunFailed(words, f"{how}launch.ready_timeout_s is the limit")

    def _note(self, host: str) -> None:
        """Say that an agent is there, and keep its host's facts."""
        agent = self.agents.agent(host)
        if agent is None or (host, agent.ident) in self._told:
            return
        self._told.add((host, agent.ident))
        write_atomic(self._tokens / f"{host}.json", json.dumps(agent.facts, indent=1) + "\n", mode=0o600)
        facts = validate(agent.facts)
        gpus = f", {len(facts.visible_gpus)} x {facts.visible_gpus[0].name}" if facts.visible_gpus else ""
        link = f", {speed(facts.link)} from here" if facts.link else ""
        say(f"host `{host}` is here: {agent.address}{gpus}{link}")

    def machines(self) -> dict[str, Machine]:
        """The facts of the plan's hosts that are here."""
        agents = {host: self.agents.agent(host) for host in self._planned}
        return {host: validate(agent.facts) for host, agent in agents.items() if agent is not None}

    def use(self, context: RunContext) -> None:
        """The plan was made again, with the facts of the hosts."""
        self._context = context

    def sites(self) -> dict[str, Site]:
        """Where the engines of each host are, and what they ask of their callers."""
        found = {}
        for host, agent in self.agents.all().items():
            found[host] = Site(agent.address, agent.ports, self.agents.host_token(host))
        return found

    def hosts(self) -> dict[str, str]:
        found = {}
        for host in self.agents.hosts:
            agent, running = self.agents.agent(host), sorted(one.name for one in self._of(host) if not one.exited())
            if agent is None:
                awaited = self.keeper.awaited(host) if self.keeper is not None else ""
                found[host] = awaited or "its agent is awaited"
            elif agent.gone is not None:
                how = f"; on it, give `{self.command(host)}`" if self.keeper is None else ""
                found[host] = f"its agent {agent.gone}{how}"
            else:
                found[host] = f"{agent.address}, runs {', '.join(running) or 'nothing'}"
        return found

    def newcomers(self) -> list[Process]:
        """Engines and a rollout worker for each host that joined beside the plan's. Engines serve nothing before they
        hold a version that was checked."""
        found: list[Process] = []
        for host in self.agents.hosts:
            if host in self._planned or host in self._joined or not self.has(host):
                continue
            self._joined.append(host)
            plan, agent = self._context.plan, self.agents.agent(host)
            machine = validate(agent.facts) if agent is not None and plan.choice.device == "cuda" else None
            made = hosts.joining(plan, host, machine, self._named[Role.ENGINE], self._named[Role.ROLLOUT])
            self._named.update(process.role for process in made)
            context = replace(self._context, plan=replace(plan, processes=tuple(made)))
            with ExitStack() as none:  # its host has its own ports
                found += [process.again() for process in configs.build(context, self.url, none, self.sites())]
        return found

    def has(self, host: str | None) -> bool:
        """Whether processes can be started there."""
        if host is None:
            return True
        here = self.agents.state(host) == "here"
        if here:
            self._note(host)
        return here

    def gone(self, host: str) -> str:
        """Why its agent is no more, in words."""
        agent = self.agents.agent(host)
        return "never came" if agent is None else agent.gone or "is here"

    def _of(self, host: str) -> list[RemoteProcess]:
        with self._lock:
            return [one for one in self._started.values() if one.host == host]

    # ---- the launcher ------------------------------------------------------------------------------------------------

    def ready(self) -> bool:
        return self._local.ready()

    def start(self, process: Process) -> Started:
        host = process.plan.host
        if host is None:
            return self._local.start(process)
        agent = self.agents.agent(host)
        log = self._run.attempt_logs(self._context.attempt) / f"{process.name}.log"
        with self._lock:
            self._starts += 1
            number = self._starts

        def lost() -> bool:
            return agent is None or agent.gone is not None or self.agents.agent(host) is not agent

        def stacks() -> None:
            self.agents.order(host, "stacks", start=number)

        size = log.stat().st_size if log.exists() else 0
        log.touch()
        started = RemoteProcess(process.name, log, host, number, lost, stacks, size)
        with self._lock:
            self._started[number] = started
        document = {
            "plan": asdict(process.plan) | {"env": dict(process.plan.env)},
            "config": process.config.model_dump(mode="json"),
            "role": process.plan.role.value,
            "env": dict(process.env),
            "inputs": self.inputs.document,
        }
        if process.plan.role is Role.TRAINER:
            document["shared"] = shared_dir.offer(self._run.path).document()
        self.agents.order(host, "start", start=number, document=document)
        return started

    def _news(self, host: str, news: ProcessNews, text: bytes) -> None:
        """What an agent tells of a process; in the hub's thread. What was told before is left out."""
        with self._lock:
            one = self._started.get(news.start)
            if one is None or one.host != host:
                return
            fresh = text[max(0, one.written - news.offset) :] if news.offset <= one.written else b""
            if fresh:
                with one.log.open("ab") as log:
                    log.write(fresh)
                one.written += len(fresh)
            one.wrote = news.log_time or one.wrote
            if news.exit_code is not None:
                one.code = news.exit_code

    def stop(self, started: Sequence[Started], grace_s: float) -> None:
        away = [one for one in started if isinstance(one, RemoteProcess)]
        for host in {one.host for one in away}:
            numbers = [one.start for one in away if one.host == host]
            self.agents.order(host, "stop", starts=numbers, grace_s=grace_s)
        here = [one for one in started if not isinstance(one, RemoteProcess)]
        if here:
            self._local.stop(here, grace_s)
        self._await_end(away, grace_s + REPORT_S)
        with self._lock:
            for one in away:
                self._started.pop(one.start, None)

    def _await_end(self, away: Iterable[RemoteProcess], limit_s: float) -> None:
        deadline = time.monotonic() + limit_s
        while time.monotonic() < deadline and not all(one.exited() for one in away):
            time.sleep(0.02)

    def stop_all(self) -> None:
        with self._lock:
            away = list(self._started.values())
        self._order_stop(away)
        self._local.stop_all()
        self._await_end(away, 2.0 + REPORT_S)
        with self._lock:
            self._started.clear()

    def _order_stop(self, away: Sequence[RemoteProcess]) -> None:
        for host in {one.host for one in away}:
            self.agents.order(host, "stop", starts=[one.start for one in away if one.host == host], grace_s=2.0)

    def close(self) -> None:
        """End everything everywhere: agents end when their processes have."""
        for host in self.agents.hosts:
            self.agents.order(host, "end")
        self._local.close()
        deadline = time.monotonic() + END_S
        while time.monotonic() < deadline and any(self.agents.state(host) == "here" for host in self.agents.hosts):
            time.sleep(0.02)
        left = [host for host in self.agents.hosts if self.agents.state(host) == "here"]
        if left:
            say(f"warning: {_names(left)} did not say that all has ended; its agent ends it when it hears nothing more")
        for host in (*self.agents.hosts, NEWCOMER):
            self.token_file(host).unlink(missing_ok=True)

    def usage(self) -> Mapping[str, tuple[int, int]]:
        found = dict(self._local.usage())
        for agent in self.agents.all().values():
            if agent.gone is None:
                found |= agent.usage
        return found

    def memory(self) -> Mapping[str, Any]:
        """Of this host; `hosts` has the others'."""
        others = {host: agent.memory for host, agent in self.agents.all().items() if agent.memory}
        return {**self._local.memory(), "hosts": others}


def _names(hosts: Sequence[str]) -> str:
    return ", ".join(f"`{host}`" for host in hosts)
