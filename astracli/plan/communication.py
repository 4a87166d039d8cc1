"""What the ranks of a trainer exchange in a step, for each way to divide it among them, and how long it takes. Pure.

In a ring every rank sends and receives (ranks - 1) / ranks of what is gathered or summed. A gathered parameter is bf16,
a summed gradient fp32. Communication counts whole, even where it runs beside a pass: on two H200, whose FSDP2 ran it
beside the passes, the step was longer by all of it, and by `WRAPPED` (docs/benchmarks.md, "Two GPUs").
"""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil
from typing import Literal, NamedTuple

from astracli.config.recipe_train import Sharding
from astracli.machine.facts import Gpu, PeerLink

WEIGHT, GRADIENT = 2, 4
"""Bytes a parameter, when it is gathered and when its gradient is summed."""
NVLINK = {**dict.fromkeys(("H100", "H200", "H20", "H800"), 450e9), "A100": 300e9, "B200": 900e9, "B300": 900e9}
"""Bytes/s of a GPU in one direction (vendor's data sheets), by a part of its name."""
ALONE = ("PCIe", "NVL")
"""Parts of the names of such GPUs that may have no NVLink, or only to one other."""
RING = 0.75
"""The part of NVLink's bandwidth that a collective over it reaches (estimated)."""
OVER_PCIE = 0.5
"""The same of PCIe, which the ranks share with each other and with copies to the host (estimated)."""
NETWORK = 1.25e9
"""Bytes/s between hosts, where nobody has measured them: 10 Gbit/s."""
WRAPPED = 0.10
"""How much longer passes take under FSDP2, which copies and casts what it gathers and sums (measured as above)."""
DIVIDED: dict[Sharding, str] = {
    "optimizer": "the optimizer alone",
    "gradients": "optimizer and gradients",
    "parameters": "optimizer and weights",
    "full": "all: optimizer, gradients, weights",
}
"""What a plan says of the ways."""


class Peers(NamedTuple):
    """How the trainer's GPUs reach each other."""

    link: PeerLink | Literal["network"]
    rate: float
    """Bytes/s that a collective moves from each to the next."""
    known: bool = True
    """Whether the machine says so; otherwise the names of its GPUs do, or `NETWORK` is taken."""

    @property
    def words(self) -> str:
        if self.link == "network":
            return f"the network, {self.rate / 1e9:.2g} GB/s {'measured' if self.known else 'assumed'}"
        return f"{self.link}, {self.rate / 1e9:.0f} GB/s" + ("" if self.known else " by the GPUs' names")


USUAL_PEERS = Peers("PCIe", OVER_PCIE * 25e9, known=False)


def peers(gpus: Sequence[Gpu], link: PeerLink | None) -> Peers:
    """Of the slowest of these GPUs. `link`: as the machine's facts have it; None = not known."""
    each = [_peers(gpu, link) for gpu in gpus]
    return min(each, key=lambda found: found.rate, default=USUAL_PEERS)


def over_network(links: Sequence[float | None]) -> Peers:
    """Of ranks on several hosts. `links`: bytes/s to each of these but the first; None: not measured."""
    known = [link for link in links if link is not None]
    return Peers("network", min(known, default=NETWORK), known=bool(known))


def _peers(gpu: Gpu, link: PeerLink | None) -> Peers:
    rate = next((value for part, value in NVLINK.items() if part in gpu.name), None)
    if link == "NVLink" or (link is None and rate and not any(part in gpu.name for part in ALONE)):
        return Peers("NVLink", RING * (rate or 300e9), link is not None)
    pcie = 50e9 if gpu.capability[0] >= 9 else 25e9  # PCIe 5 x16, PCIe 4 x16
    return Peers("PCIe", OVER_PCIE * pcie, link is not None)


class Exchanged(NamedTuple):
    """Times that all weights are gathered, and all gradients summed, in a step."""

    gathered: float
    summed: float

    def seconds(self, parameters: int, ranks: int, rate: float) -> float:
        return parameters * (WEIGHT * self.gathered + GRADIENT * self.summed) * (ranks - 1) / ranks / rate


def exchanged(sharding: Sharding, tokens: float, budget: int, minibatches: int) -> Exchanged:
    """`tokens`: of a step, on each rank. `budget`: of a micro-batch. A micro-batch has a pass without gradients, a
    forward and a backward pass."""
    micros = max(minibatches, ceil(tokens / budget))
    gathered = minibatches if sharding in ("optimizer", "gradients") else 3 * micros
    return Exchanged(gathered, minibatches if sharding in ("optimizer", "parameters") else micros)
