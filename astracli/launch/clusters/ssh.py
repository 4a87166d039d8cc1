"""Hosts that `launch.hosts` names one by one: agents are started by the user's own ssh.

`ssh HOST astra agent ...` runs as long as the agent. The token goes to its standard input, never on a command line.
Names, users, keys and jumps are what the user's ssh configuration says.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import re
import shlex
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from pydantic import Field

from astracli.config.recipe import Recipe
from astracli.config.recipe_run import Table, is_loopback
from astracli.errors import UserError
from astracli.launch.clusters.command import CommandAgent
from astracli.launch.clusters.contract import CHECKS, AgentCall, Cluster, Hosts
from astracli.machine.findings import Check
from astracli.plan.types import LaunchPlan
from astracli.process.console import say

ANSWER_S = 30.0
UNREACHED, NOT_FOUND = 255, (126, 127)
"""Exit codes: of ssh itself, and of a shell that does not find a command."""


class SshTable(Table):
    """How agents are started on the hosts of a list in `launch.hosts`."""

    astra: str | None = Field(default=None, min_length=1)
    """The command `astra` on the other hosts, for example `~/venv/bin/astra`. None: at the same path as here, otherwise
    the one that a login without a terminal finds in its PATH."""
    options: list[str] = Field(default=[])
    """Options for ssh, such as `["-p", "2222"]`. Better places are Host entries in ~/.ssh/config."""
    by_hand: bool = False
    """Do not use ssh: you start `astra agent` on each host, with the command that the run prints."""


class Ssh(Cluster):
    name = "ssh"
    settings = SshTable

    def check(self, recipe: Recipe) -> None:
        table = self._own(recipe)
        if table.by_hand:
            return
        for _, error in _ask_all(table, recipe.agents):
            if error is not None:
                raise error

    def checks(self, recipe: Recipe | None) -> Iterator[Check]:
        if recipe is None or not recipe.agents:
            return
        table = self._own(recipe)
        if table.by_hand:
            yield Check("ssh", CHECKS, "skip", "ssh.by_hand: agents are started by hand")
            return
        for host, error in _ask_all(table, recipe.agents):
            if error is None:
                yield Check(f"ssh {host}", CHECKS, "ok", f"answers, with astra {version()}")
            else:
                why = "an agent is started there by ssh"
                yield Check(f"ssh {host}", CHECKS, "fail", error.message, why, error.hint or "")

    def address(self, recipe: Recipe) -> str:
        table = self._own(recipe)
        if table.by_hand or not is_loopback(recipe.launch.host):
            return recipe.launch.host
        ways = [own_address(_hostname(table, host), host) for host in recipe.agents]
        return next((way for way in ways if not is_loopback(way)), recipe.launch.host)

    def open(self, recipe: Recipe, plan: LaunchPlan) -> Hosts | None:
        table = self._own(recipe)
        return None if table.by_hand else SshHosts(table)

    def _own(self, recipe: Recipe) -> SshTable:
        table = self.table(recipe)
        assert isinstance(table, SshTable)
        return table


class SshHosts:
    """Of one run."""

    def __init__(self, table: SshTable):
        self._table = table
        self._told: set[str] = set()

    def start(self, host: str, call: AgentCall, log: Path) -> CommandAgent:
        words = command(self._table, host, call.words)
        if host not in self._told:  # the token is no part of it
            self._told.add(host)
            say(f"host `{host}`: {shlex.join(words)}")
        return CommandAgent(words, call.token, log)

    def awaited(self, host: str) -> str:
        return ""

    def lost(self, host: str) -> bool:
        return False

    def arrivals(self) -> Sequence[str]:
        return ()

    def close(self) -> None:
        return


def command(table: SshTable, host: str, words: Sequence[str]) -> list[str]:
    """`ssh HOST astra WORDS`. It never asks for a password: nobody would see the question."""
    text = f"exec sh -c {shlex.quote(remote(table, words))}"  # whatever the user's shell there is
    return ["ssh", "-T", "-o", "BatchMode=yes", *table.options, host, "--", text]


def remote(table: SshTable, words: Sequence[str]) -> str:
    """What the shell of the other host runs."""
    rest = shlex.join(words)
    if table.astra is None:
        here = Path(sys.executable).with_name("astra")
        return f'a={shlex.quote(str(here))}; [ -x "$a" ] || a=astra; exec "$a" {rest}'
    home, slash, path = table.astra.partition("~/")
    named = f"~/{shlex.quote(path)}" if slash and not home else shlex.quote(table.astra)
    return f"exec {named} {rest}"


def _ask_all(table: SshTable, hosts: Sequence[str]) -> list[tuple[str, UserError | None]]:
    """Each host, and why no agent can be started there; all are asked at once."""
    if not hosts:
        return []
    with ThreadPoolExecutor(min(len(hosts), 32)) as pool:
        return list(zip(hosts, pool.map(lambda host: _ask(table, host), hosts), strict=True))


def _ask(table: SshTable, host: str) -> UserError | None:
    """Whether a host answers, and has this version of astra."""
    words = command(table, host, ["--version"])
    by_hand = "or start agents by hand with `--set ssh.by_hand=true`"
    try:
        done = subprocess.run(words, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=ANSWER_S)
    except FileNotFoundError:
        return UserError("there is no `ssh` on this machine", f"install it, {by_hand}")
    except subprocess.TimeoutExpired:
        hint = f"`ssh {host} true` must work, {by_hand}"
        return UserError(f"host `{host}` did not answer ssh within {ANSWER_S:.0f} s", hint)
    lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
    said = lines[-1] if lines else f"exit code {done.returncode}"
    if done.returncode == UNREACHED:
        hint = f"`ssh {host} true` must work without a question; ~/.ssh/config has names, users and keys; {by_hand}"
        return UserError(f"host `{host}` is not reached by ssh: {said}", hint)
    place = f"`{table.astra}`" if table.astra else "`astra`"
    if done.returncode in NOT_FOUND:
        hint = "install the same version there, or name its place with `--set ssh.astra=/path/to/bin/astra`"
        return UserError(f"host `{host}` has no {place}: {said}", hint)
    versions = [line.split()[1] for line in done.stdout.splitlines() if re.fullmatch(r"astra \S+", line.strip())]
    there = versions[-1] if versions else None  # a profile may print too
    if done.returncode or there is None:
        return UserError(f"{place} does not start on host `{host}`: {said}", f"look at `{shlex.join(words)}`")
    if there != version():
        return UserError(
            f"host `{host}` has astra {there}, this machine has {version()}",
            f"install the same version on every host: `pip install 'astracli=={version()}'`",
        )
    return None


def version() -> str:
    return importlib.metadata.version("astracli")


def _hostname(table: SshTable, host: str) -> str:
    """What the user's configuration calls a host."""
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        done = subprocess.run(["ssh", "-G", *table.options, host], capture_output=True, text=True, timeout=ANSWER_S)
        for line in done.stdout.splitlines():
            if line.startswith("hostname "):
                return line.split()[1]
    return host


def own_address(name: str, host: str) -> str:
    """The address of this machine from which packets to another one come. Raises UserError."""
    try:
        family, kind, _, _, where = socket.getaddrinfo(name, 9, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind) as probe:
            probe.connect(where)
            return str(probe.getsockname()[0])
    except OSError as error:
        raise UserError(
            f"the address of host `{host}` (`{name}`) is not known here: {(error.strerror or str(error)).lower()}",
            f"set launch.host to the address of this machine that `{host}` reaches",
        ) from None


CLUSTER = Ssh()
