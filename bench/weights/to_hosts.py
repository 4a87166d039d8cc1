"""Versions to many hosts: what the hub's server and the hosts' caches spend on them, and how long a link takes.

    python bench/weights/to_hosts.py [--hosts 1 4 16] [--mb 256] [--deltas 64] [--delta-mb 90] [--gbit 10]

Measured over loopback, made-up bytes: `--hosts` caches (as of agents) download a payload of `--mb` at once, then
`--deltas` caches one of `--delta-mb` divided by 8. The server is a process of its own, the caches share another; what
they spend is processor seconds, which other load on the machine does not change. Computed from it: 8.4 GB to 16 hosts
and 90 MB to 64 over a link of `--gbit`, which is the larger of the link's time and the server's processor seconds.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import sys
import threading
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import psutil
import xxhash

from astracli.process.open_files import raise_open_files
from astracli.process.ports import bind
from astracli.process.server import ServerThread
from astracli.weights.format.manifest import STABLE, seal, version_name
from astracli.weights.publish.server import weights_app
from astracli.weights.receive.host_cache import HostCache

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from shared import folder, options, show

FULL, HOSTS, DELTA, MANY = 8.4e9, 16, 90e6, 64


def publish(place: Path, version: int, size: int) -> None:
    """A version of one payload of so many bytes, as far as a cache looks at it."""
    directory = place / version_name(version)
    directory.mkdir(parents=True)
    piece = os.urandom(1 << 20)
    payload, digest = directory / "full-00000.safetensors", xxhash.xxh3_128()
    with payload.open("wb") as file:
        for _ in range(size >> 20):
            file.write(piece)
            digest.update(piece)
    manifest = json.dumps(
        {"files": {payload.name: {"bytes": payload.stat().st_size, "xxh3": digest.hexdigest()}}}
    ).encode()
    (directory / "manifest.full.json").write_bytes(manifest)
    kind = {"file": "manifest.full.json", "base_version": None, "bytes": payload.stat().st_size}
    kind["xxh3"] = xxhash.xxh3_128_hexdigest(manifest)
    files = {"manifest.full.json": len(manifest), payload.name: payload.stat().st_size}
    (directory / STABLE).write_bytes(seal({"version": version, "files": files, "manifests": {"full": kind}}))


def served(pipe: Connection, place: Path) -> None:
    from starlette.applications import Starlette
    from starlette.routing import Mount

    raise_open_files()
    server = ServerThread(Starlette(routes=[Mount("/weights", weights_app(place))]), bind()).start()
    pipe.send(server.url)
    while pipe.recv() == "cpu":
        pipe.send(cpu())
    server.stop()


def cpu() -> float:
    spent = psutil.Process().cpu_times()
    return float(spent.user + spent.system)


def downloaded(url: str, place: Path, version: int, hosts: int, pipe: Connection) -> dict[str, Any]:
    """All at once -> what it took."""
    caches = [HostCache(url, "t", place / f"cache{version}-{n}", link_bytes=None) for n in range(hosts)]

    def fetch(cache: HostCache) -> None:
        for name in ("manifest.full.json", "full-00000.safetensors"):
            assert cache.file(version, name) is not None

    pipe.send("cpu")
    before, mine, began = pipe.recv(), cpu(), time.monotonic()
    threads = [threading.Thread(target=fetch, args=(cache,)) for cache in caches]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    seconds = time.monotonic() - began
    pipe.send("cpu")
    server, receivers = pipe.recv() - before, cpu() - mine
    moved = sum(cache.downloaded for cache in caches) / 1e9
    for cache in caches:
        cache.close()
    return {
        "hosts": hosts, "gb": moved, "wall_s": seconds, "server_cpu_s_per_gb": server / moved,
        "a_host_cpu_s_per_gb": receivers / moved, "load": os.getloadavg()[0],
    }  # fmt: skip


def computed(rows: list[dict[str, Any]], gbit: float) -> list[dict[str, Any]]:
    """At the rate of the link, and what the server spends meanwhile, from the row of most hosts."""
    link, found = gbit / 8 * 1e9, []
    for what, size, hosts, row in (("full", FULL, HOSTS, rows[-2]), ("delta", DELTA, MANY, rows[-1])):
        wire, server = size * hosts / link, size * hosts / 1e9 * row["server_cpu_s_per_gb"]
        found.append({
            "version": what, "gb_each": size / 1e9, "hosts": hosts, "link_s": wire, "server_cpu_s": server,
            "seconds": max(wire, server),
        })  # fmt: skip
    return found


def main() -> None:
    parser = options(__doc__, hosts=[1, 4, 16], mb=256, deltas=64, delta_mb=90, gbit=10.0)
    args = parser.parse_args()
    raise_open_files()
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    with folder() as name:
        publish(name / "weights", 0, args.mb << 20)
        publish(name / "weights", 1, (args.delta_mb << 20) // 8)
        process = context.Process(target=served, args=(theirs, name / "weights"), daemon=True)
        process.start()
        url = ours.recv()
        rows = [downloaded(url, name / f"to{hosts}", 0, hosts, ours) for hosts in args.hosts]
        rows.append(downloaded(url, name / "deltas", 1, args.deltas, ours))
        ours.send("end")
        process.join(20)
    show(args, {"measured": rows, f"computed at {args.gbit:g} Gbit/s": computed(rows, args.gbit)})


if __name__ == "__main__":
    main()
