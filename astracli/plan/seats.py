"""Which GPU of which host each engine and each trainer rank gets, and on CPUs which host. Pure.

The trainer's ranks are on the first hosts, `resources.train_hosts` of them, in equal parts. Engines are on the other
hosts in blocks of one size; what these have no GPU for is on the GPUs that the ranks leave. Engines that share GPUs
with the trainer (`resources.share_gpus`) take the trainer's first.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from astracli.config.recipe_run import ResourcesTable
from astracli.machine.facts import Machine

Host = str | None
"""A host by its name in `launch.hosts`; None: the first, where the supervisor is."""


def host_words(host: Host) -> str:
    return "the first host" if host is None else f"host `{host}`"


class GpuId(NamedTuple):
    """One GPU of a run."""

    index: int  # type: ignore[assignment]  # in the place of the method of tuples
    """As nvidia-smi of its host counts it."""
    host: Host = None

    def __str__(self) -> str:
        return str(self.index) if self.host is None else f"{self.host}:{self.index}"

    @property
    def order(self) -> tuple[str, int]:
        """The first host's GPUs first."""
        return self.host or "", self.index


@dataclass(frozen=True)
class Seats:
    engines: Sequence[GpuId]
    trainer: Sequence[GpuId]
    """By rank."""


def spread(engines: int, hosts: Sequence[Host]) -> list[Host]:
    """The host of each engine on CPUs: the first without others, else blocks whose sizes differ by one at most."""
    if not hosts:
        return [None] * engines
    share, more = divmod(engines, len(hosts))
    return [host for n, host in enumerate(hosts) for _ in range(share + (n < more))]


def cpu_hosts(resources: ResourcesTable, hosts: Sequence[Host], engines: int) -> tuple[list[Host], list[Host]]:
    """(host of each engine, of each rank). Hosts without ranks take the engines, or all beside the first."""
    ranked = hosts[: resources.train_hosts]
    apart = [host for host in hosts if host not in ranked] or list(hosts[1:])
    return spread(engines, apart), spread(resources.train_ranks, ranked)


def seat(resources: ResourcesTable, machines: Mapping[Host, Machine | None], engines: int, ranks: int) -> Seats:
    """The GPU of each engine and rank. `machines`: the hosts in their order, the first's always known; None: not known,
    it is taken to have what is asked of it. Where hosts have fewer GPUs, indexes go on counting: `plan.problems` says
    which are missing."""
    hosts, shared = list(machines), resources.share_gpus
    if len(hosts) == 1:  # engines first
        start = 0 if shared else engines
        indexes = _indexes(machines[hosts[0]], max(engines, start + ranks))
        return Seats([GpuId(i) for i in indexes[:engines]], [GpuId(i) for i in indexes[start : start + ranks]])
    ranked = hosts[: resources.train_hosts] if ranks else []
    held = {host: spread(ranks, ranked).count(host) for host in ranked}
    room = {host: _room(machine, 0 if shared else held.get(host, 0)) for host, machine in machines.items()}
    count = dict.fromkeys(hosts, 0)
    left = engines
    if shared:
        for host in ranked:
            count[host] = min(left, held[host])
            left -= count[host]
    for group in ([host for host in hosts if host not in held], ranked):
        left = _fill(count, left, group, room)
    count[hosts[-1]] += left
    served: list[GpuId] = []
    trained: list[GpuId] = []
    for host, machine in machines.items():
        mine = held.get(host, 0)
        start = 0 if shared else mine
        indexes = _indexes(machine, max(mine, start + count[host]))
        trained += [GpuId(index, host) for index in indexes[:mine]]
        served += [GpuId(index, host) for index in indexes[start : start + count[host]]]
    return Seats(served, trained)


def _indexes(machine: Machine | None, count: int) -> list[int]:
    """Of so many GPUs: those that it shows, then on from the largest."""
    there = [gpu.index for gpu in machine.visible_gpus] if machine is not None else []
    beyond = max(there, default=-1) + 1
    return [*there, *range(beyond, beyond + count)][:count]


def _room(machine: Machine | None, held: int) -> int | None:
    """How many engines have a GPU there; None: not known."""
    return None if machine is None else max(0, len(machine.visible_gpus) - held)


def _fill(count: dict[Host, int], left: int, hosts: Collection[Host], room: Mapping[Host, int | None]) -> int:
    """Give each engine to the host of these that has fewest. -> those for which none has room."""
    for given in range(left):
        free = [host for host in hosts if (most := room[host]) is None or count[host] < most]
        if not free:
            return left - given
        count[min(free, key=lambda host: count[host])] += 1
    return 0
