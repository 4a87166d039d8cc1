"""How long a version takes to the hosts beside the first, and how many of them its link serves in a step. Pure.

Each host downloads a version once, all at the same time, through the first host's link. That is as fast as the quickest
host has measured it, or 10 Gbit/s where none has. A host whose own link is slower takes longer, alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import ceil

from astracli.config.recipe import Recipe
from astracli.machine.memory import speed, words
from astracli.models.adapter import MemoryShape
from astracli.plan.communication import NETWORK
from astracli.plan.memory import DELTA_SHARE
from astracli.plan.offload import Reason


@dataclass(frozen=True)
class Transfers:
    hosts: int
    """That download versions."""
    version: int
    """Bytes of one, at most."""
    full: int
    """Of a full one."""
    rate: float
    """Bytes/s of the first host's link."""
    measured: bool
    step_s: float | None
    """A step takes at least so long; None: not known."""
    staleness: int
    links: Mapping[str, float]
    """Bytes/s of each host's own, as far as it is known."""

    @property
    def seconds(self) -> float:
        """Until a version is on all hosts."""
        return self.hosts * self.version / self.rate

    @property
    def served(self) -> int | None:
        """Hosts that the link serves within a step."""
        return None if self.step_s is None else int(self.step_s * self.rate / self.version)

    def reason(self) -> Reason:
        over = f"{speed(self.rate)} {'measured' if self.measured else 'assumed'}"
        why = f"at most {words(self.version)} each, in {self.seconds:.2g} s over {over}; a full one "
        why += f"({words(self.full)}) in {self.hosts * self.full / self.rate:.2g} s"
        if self.step_s is not None:
            why += f"; a step takes {self.step_s:.2g} s or more (estimated): in that time the link serves {self.served}"
        return Reason("versions", f"to {self.hosts} host{'s' if self.hosts > 1 else ''}", why)

    def warnings(self) -> list[str]:
        """What the network limits."""
        if self.step_s is None:
            return []
        found = []
        if self.served is not None and self.served < self.hosts:
            found.append(
                f"the first host's link ({speed(self.rate)}) brings a version of {words(self.version)} to "
                f"{self.served} hosts in a step of {self.step_s:.2g} s, and this run has {self.hosts}: engines are "
                f"up to {self.seconds:.2g} s behind; smaller versions (weights.transfer) or larger batches help"
            )
        for host, link in self.links.items():
            late = ceil(self.version / link / self.step_s)
            if late > max(1, self.staleness):
                found.append(
                    f"host `{host}` gets {speed(link)}: a version of {words(self.version)} takes it "
                    f"{self.version / link:.3g} s, {late} steps, where train.max_staleness is {self.staleness}: its "
                    "engines will often be refused leases until they have a newer version"
                )
        return found


def transfers(
    recipe: Recipe, shape: MemoryShape, hosts: int, links: Mapping[str, float], step_s: float | None
) -> Transfers | None:
    """None when no other host has engines. `links`: bytes/s of those whose agents have measured them."""
    if not hosts:
        return None
    full = 2 * shape.parameters
    version = {"full": full, "delta": int(DELTA_SHARE * full), "adapter": 4 * shape.adapters}[recipe.weights.transfer]
    rate = max(links.values(), default=NETWORK)
    return Transfers(hosts, version, full, rate, bool(links), step_s, recipe.effective_staleness, links)
