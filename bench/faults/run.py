"""The fault matrix: what becomes of a run, or of a command, when something goes wrong on purpose.

    python bench/faults/run.py kills [--signals KILL TERM STOP] [--victims ...] [--phases ...] [--stop-s 60]
    python bench/faults/run.py disks [--moments 6] [--kinds full-disk no-inodes ...]     mounts disks: as root
    python bench/faults/run.py damage [--times 2] [--parts checkpoint weights hub ...]
    python bench/faults/run.py states [--only "hub of another run" ...]
    python bench/faults/run.py network | clock
    python bench/faults/run.py wire [--attempts 12]
    python bench/faults/run.py limits [--only shm descriptors bomb oom-trainer ...]      some as root, with cgroups
    python bench/faults/run.py strangers [--only two-ranks ipv6 flood page ...]         `private` as root
    python bench/faults/run.py inputs [--count 200]
    python bench/faults/run.py requests [--count 500]

Each row ends in one of three ways: the run finished, it was interrupted, or it ended with its cause in one line, the
right exit code and a hint. Then no process, shared memory or temporary file may be left, `status.json` must say the
same, and a resume must come to the end with whole books: no group lost or trained twice, one evaluation for every step
at which one was due, an export whose digests are those of the last version. `wire` changes bytes between the processes
of a deterministic run, whose files must then be those of a run that nobody disturbed. Exits 1 when a row has a problem.

`--warm` forks the processes of a run from one that has imported torch already: 10 s a row, else 20 s.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import shared
from shared import folder, more_options, show

from faults import damage, disks, kills, limits, malformed, network, requests, served, strangers
from faults.world import Row, World, attempted

Group = Callable[[World, argparse.Namespace], list[Row]]


WARM = "fork the processes of a run from one that has imported torch: quicker, not quite what a user starts"


def fork_runs() -> None:
    """As the tests start processes."""
    sys.path.append(str(Path(__file__).resolve().parents[2] / "tests"))
    import warm

    shared.start = warm.bench_start  # type: ignore[assignment]


def _kills(world: World, args: argparse.Namespace) -> list[Row]:
    chosen = kills.faults(args.victims, args.phases, args.signals)
    world.draw.shuffle(chosen)
    return kills.strike(world, "kills", chosen, args.stop_s)


def _disks(world: World, args: argparse.Namespace) -> list[Row]:
    return disks.rows(world, args.moments, args.kinds)


def _inputs(world: World, args: argparse.Namespace) -> list[Row]:
    return malformed.summed(malformed.tried(world.folder / "inputs", args.seed, args.count))


def _requests(world: World, args: argparse.Namespace) -> list[Row]:
    with served.all_of(world.folder / "served") as (hub, listeners):
        rows = requests.tried(listeners, args.seed, args.count)
        return [*rows, attempted(Row("malformed requests", "what the hub took"), lambda row: hub.understood(row))]


GROUPS: dict[str, tuple[Group, dict[str, object]]] = {
    "kills": (
        _kills,
        {"signals": list(kills.SIGNALS), "victims": list(kills.VICTIMS), "phases": list(kills.PHASES), "stop_s": 60.0},
    ),
    "damage": (
        lambda world, args: damage.rows(world, args.times, args.parts),
        {"times": 2, "parts": list(damage.PARTS)},
    ),
    "states": (lambda world, args: damage.states(world, args.only), {"only": list(damage.STATES)}),
    "network": (lambda world, _: network.rows(world), {}),
    "wire": (lambda world, args: network.damaged(world, args.attempts), {"attempts": 12}),
    "clock": (lambda world, _: network.clocks(world), {}),
    "inputs": (_inputs, {"count": 200}),
    "requests": (_requests, {"count": 500}),
    "limits": (lambda world, args: limits.rows(world, args.only), {"only": list(limits.ROWS)}),
    "strangers": (lambda world, args: strangers.rows(world, args.only), {"only": list(strangers.ROWS)}),
    "disks": (_disks, {"moments": 6, "kinds": list(disks.KINDS)}),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    groups = parser.add_subparsers(dest="group", required=True)
    for name, (_, wanted) in GROUPS.items():
        more_options(groups.add_parser(name), json=False, seed=0, warm={False: WARM}, **wanted)
    args = parser.parse_args()
    if args.warm:
        fork_runs()
    began = time.monotonic()
    with folder() as place:
        rows = GROUPS[args.group][0](World(place, args.seed), args)
    show(args, {"seed": args.seed, "seconds": time.monotonic() - began, "rows": [row.table() for row in rows]})
    sys.exit(any(row.problems for row in rows))


if __name__ == "__main__":
    main()
