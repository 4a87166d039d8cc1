"""Addresses and ports that a run listens on, and the Hub when something has to come from it."""

from __future__ import annotations

from collections.abc import Iterator

from astracli.doctor.gather import offline
from astracli.doctor.subject import Check, Subject
from astracli.machine.facts import Network

GROUP = "network"
FEW_PORTS = 1000


def checks(subject: Subject) -> Iterator[Check]:
    if (network := subject.facts.network) is None:
        yield Check("listening", GROUP, "skip", "not in this document")
    else:
        yield from _listening(subject, network)
        yield from _hub(subject, network)
    yield from _peers(subject)


def _listening(subject: Subject, network: Network) -> Iterator[Check]:
    for host, error in network.hosts.items():
        if error is None:
            yield Check("listening", GROUP, "ok", f"a free port on {host} answers")
        else:
            why = "hub and engines of a run talk over it"
            fix = "set launch.host to an address of this machine, or bring the interface up: `ip link set lo up`"
            yield Check("listening", GROUP, subject.bad(True), f"{host}: {error}", why, fix)
    if network.ports is not None:
        low, high = network.ports
        count = high - low + 1
        if count < FEW_PORTS:
            why = "each connection holds one for a minute after it has ended"
            fix = "`sysctl net.ipv4.ip_local_port_range='32768 60999'`"
            yield Check("ports", GROUP, "warn", f"{count} ({low} to {high})", why, fix)
        else:
            yield Check("ports", GROUP, "ok", f"{count} to give out ({low} to {high})")


def _hub(subject: Subject, network: Network) -> Iterator[Check]:
    """A warning by itself: what cannot be had without the Hub fails where it is needed."""
    if offline(subject.facts.env):
        yield Check("hub", GROUP, "ok", "not asked: HF_HUB_OFFLINE is set")
    elif network.hub_asked and network.hub_error:
        fix = "check the network; HF_ENDPOINT names a mirror, HTTPS_PROXY a proxy"
        value = f"{network.hub}: {network.hub_error}"
        yield Check("hub", GROUP, "warn", value, "models and data that are not here come from it", fix)
    elif network.hub_asked:
        yield Check("hub", GROUP, "ok", f"{network.hub} answers")


def _peers(subject: Subject) -> Iterator[Check]:
    recipe = subject.recipe
    if recipe is None or not subject.cuda or recipe.resources.train_gpus < 2:
        return
    if subject.facts.env.get("NCCL_P2P_DISABLE") == "1":
        why = "trainer ranks exchange gradients through host memory, several times slower"
        fix = "unset it, unless `astra doctor --probe` found that the all-reduce hangs without it"
        yield Check("nccl", GROUP, "warn", "NCCL_P2P_DISABLE=1", why, fix)
    else:
        yield Check("nccl", GROUP, "ok", "peer access is not switched off")
