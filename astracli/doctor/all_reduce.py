"""An all-reduce over as many ranks as the trainer has, with a time limit; without peer access once more if it hangs.

`python -m astracli.doctor.all_reduce` is one rank of it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from astracli.doctor.probe_child import Row
from astracli.process.layout import WITHOUT_PEERS

START_S = 60.0
"""Importing torch in every rank, and NCCL's own start."""
LIMIT_S = 20.0
ELEMENTS = {"cpu": 2**18, "cuda": 2**26}
"""fp32 elements of the buffer."""


def all_reduce(ranks: int, device: str) -> list[Row]:
    """Rows for the peer access of GPUs and for the all-reduce."""
    rows = [peer_access(ranks)] if device == "cuda" else []
    row = {"name": "all-reduce", "status": "fail", "value": f"{ranks} ranks gave no right sum in {LIMIT_S:.0f} s"}
    if (value := attempt(ranks, device, {})) is not None:
        row |= {"status": "ok", "value": value}
    elif device == "cuda" and (value := attempt(ranks, device, WITHOUT_PEERS)) is not None:
        row["value"] += f", but works with NCCL_P2P_DISABLE=1: {value}"
        row["fix"] = "`export NCCL_P2P_DISABLE=1` before the run; on bare metal, switch ACS off in the BIOS"
    elif device == "cuda":
        row["value"] += ", nor with NCCL_P2P_DISABLE=1"
    return [*rows, row]


def attempt(ranks: int, device: str, env: dict[str, str], start_s: float = START_S) -> str | None:
    """What rank 0 measured; None when a rank fails or the time is over. Ranks do not outlive the call."""
    with tempfile.TemporaryDirectory() as folder:
        base = {"ranks": ranks, "device": device, "folder": folder}
        started = [
            subprocess.Popen(
                [sys.executable, "-P", "-m", "astracli.doctor.all_reduce", json.dumps(base | {"rank": rank})],
                env=os.environ | env | (own_gpu(rank, os.environ) if device == "cuda" else {}),
                stdout=subprocess.DEVNULL,
            )
            for rank in range(ranks)
        ]
        try:
            deadline = time.monotonic() + start_s + LIMIT_S
            for process in started:
                if process.wait(timeout=max(0.1, deadline - time.monotonic())) != 0:
                    return None
            return (Path(folder) / "answer").read_text()
        except (subprocess.TimeoutExpired, OSError):
            return None
        finally:
            for process in started:
                process.kill()
                process.wait()


def own_gpu(rank: int, environment: Mapping[str, str]) -> dict[str, str]:
    """A rank sees its own GPU alone, as the trainer's do: NCCL goes other ways between GPUs that one process sees."""
    visible = environment.get("CUDA_VISIBLE_DEVICES")
    return {"CUDA_VISIBLE_DEVICES": visible.split(",")[rank].strip() if visible else str(rank)}


def peer_access(ranks: int) -> Row:
    """Which pairs of GPUs reach each other's memory directly. None is slow, and right."""
    import torch

    pairs = [(a, b) for a in range(ranks) for b in range(ranks) if a != b]
    apart = [f"{a}-{b}" for a, b in pairs if not torch.cuda.can_device_access_peer(a, b)]
    shown = f"not between {', '.join(apart[:6])}: through host memory" if apart else f"all {ranks} GPUs"
    return {"name": "peer access", "status": "ok", "value": shown}


def rank_main(setting: dict[str, Any]) -> None:
    import torch
    import torch.distributed as dist

    device, rank, ranks = setting["device"], setting["rank"], setting["ranks"]
    if device == "cuda":
        torch.cuda.set_device(0)  # the only one that it sees
    store = dist.FileStore(f"{setting['folder']}/store", ranks)
    where: dict[str, Any] = {"device_id": torch.device("cuda", 0)} if device == "cuda" else {}
    dist.init_process_group("nccl" if device == "cuda" else "gloo", store=store, rank=rank, world_size=ranks, **where)
    buffer = torch.full((ELEMENTS[device],), float(rank + 1), device=device)
    dist.all_reduce(buffer)
    assert bool((buffer == ranks * (ranks + 1) / 2).all()), "a wrong sum"
    dist.barrier()
    start = time.perf_counter()
    dist.all_reduce(buffer)
    if device == "cuda":
        torch.cuda.synchronize()
    spent = time.perf_counter() - start
    if rank == 0:
        shown = f"{ranks} ranks, {buffer.nbytes / 2**20:.0f} MiB in {spent * 1e3:.1f} ms"
        Path(setting["folder"], "answer").write_text(shown)
    dist.destroy_process_group()


if __name__ == "__main__":
    rank_main(json.loads(sys.argv[1]))
