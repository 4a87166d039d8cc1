"""A run on a real Slurm of two nodes on this machine: submitted, stopped by its time limit, queued again, ended.

    python bench/faults/slurm_cluster.py [--steps 60] [--run-dir DIR] [--json]

It needs slurmctld, slurmd, munged and Slurm's commands (Debian: slurmctld, slurmd, slurm-client, munge), and starts all
of them in a folder, with keys and ports of its own; both nodes are slurmd processes of this machine. `astra train` with
`launch.hosts = "slurm"` submits a job of two nodes and four minutes. Before the limit Slurm sends SIGUSR1: the run must
make a checkpoint of the step where it is, and the job must be queued again under its number. Slurm starts it again two
minutes later; here `scontrol` has it start at once, and lifts the limit. It must go on from that checkpoint and end,
with the books of a run that nothing interrupted. Prints what was seen and a line per rule; exits 1 when one is broken.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from loop.books import check_files, check_hub
from loop.kill_resume import ITEMS, SMALL
from shared import ASTRA, RECIPE, folder, options, records, show, trained

from astracli.process.ports import free_ports

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "squeue", "sinfo")
NODES = ("n1", "n2")
LIMIT, SIGNAL_S = "00:04:00", 60
"""Slurm may send the signal up to a minute early."""
WAIT_S = 600.0
CONF = """\
ClusterName=bench
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
AuthType=auth/munge
AuthInfo=socket={place}/munge.sock
CredType=cred/munge
SlurmUser={user}
SlurmdUser={user}
StateSaveLocation={place}/state
SlurmdSpoolDir={place}/spool-%n
SlurmctldPidFile={place}/slurmctld.pid
SlurmdPidFile={place}/slurmd-%n.pid
SlurmctldLogFile={place}/slurmctld.log
SlurmdLogFile={place}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
ReturnToService=2
KillWait=20
{nodes}
PartitionName=cpu Nodes={names} Default=YES MaxTime=INFINITE State=UP
"""


@contextlib.contextmanager
def slurm(place: Path) -> Iterator[None]:
    """A Slurm of its own. Its commands find it by SLURM_CONF in this process's environment."""
    os.environ["PATH"] += os.pathsep + "/usr/sbin"
    if absent := [name for name in PROGRAMS if shutil.which(name) is None]:
        sys.exit(f"not on this machine: {', '.join(absent)} (Debian: slurmctld, slurmd, slurm-client, munge)")
    ports = free_ports(1 + len(NODES), "127.0.0.1")
    rows = [
        f"NodeName={name} NodeHostname={socket.gethostname()} NodeAddr=127.0.0.1 Port={port} CPUs=2 RealMemory=2000"
        for name, port in zip(NODES, ports[1:], strict=True)
    ]
    user = psutil.Process().username()
    values = {"host": socket.gethostname(), "place": place, "user": user, "names": ",".join(NODES)}
    (place / "slurm.conf").write_text(CONF.format(**values, ports=ports, nodes="\n".join(rows)))
    for name in ("state", *(f"spool-{node}" for node in NODES)):
        (place / name).mkdir()
    key = place / "munge.key"
    key.write_bytes(secrets.token_bytes(128))
    key.chmod(0o600)
    os.environ["SLURM_CONF"] = str(place / "slurm.conf")
    munge = ["munged", "--foreground", "--force", f"--key-file={key}", f"--socket={place}/munge.sock"]
    munge += [f"--pid-file={place}/munge.pid", f"--seed-file={place}/munge.seed", f"--log-file={place}/munge.log"]
    daemons = [munge, ["slurmctld", "-D"], *(["slurmd", "-D", "-N", node] for node in NODES)]
    started = []
    try:
        for words in daemons:
            log = (place / f"{words[0]}-{words[-1]}.out".replace("/", "-")).open("wb")
            started.append(subprocess.Popen(words, stdout=log, stderr=log, stdin=subprocess.DEVNULL))
            time.sleep(1.0)
        until(lambda: ask("sinfo", "--noheader", "--format=%t %D").split() == ["idle", str(len(NODES))])
        yield
    finally:
        for daemon in reversed(started):
            daemon.send_signal(signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                daemon.wait(20)


def ask(*words: str) -> str:
    return subprocess.run(words, capture_output=True, text=True, timeout=60).stdout


def until(condition: Callable[[], Any], limit_s: float = WAIT_S) -> float:
    """Seconds until it is so."""
    began = time.monotonic()
    while not condition():
        assert time.monotonic() - began < limit_s, "it never came true"
        time.sleep(0.2)
    return time.monotonic() - began


def astra(*words: str) -> str:
    done = subprocess.run([*ASTRA, *words], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


def agents(run: Path) -> list[int]:
    """Processes of the run's agents that are left."""
    found = []
    for process in psutil.process_iter(["cmdline"]):
        words = process.info["cmdline"] or []
        if "--attached" in words or (str(run) in " ".join(words) and process.pid != os.getpid()):
            found.append(process.pid)
    return found


def main() -> None:
    args = options(__doc__, steps=60, run_dir=Path).parse_args()
    began, seen, rules = time.monotonic(), {}, {}
    with folder() as name:
        run = (args.run_dir or name / "run").resolve()
        run.parent.mkdir(parents=True, exist_ok=True)
        (name / "slurm").mkdir()
        with slurm(name / "slurm"):
            sets = [one for one in SMALL if not one.startswith(("train.steps", "checkpoint.every"))]
            sets += [f"train.steps={args.steps}", "checkpoint.every=1000", "launch.hosts=slurm", "slurm.nodes=2"]
            sets += ["launch.network=private", "resources.engines=1", f"slurm.time={LIMIT}"]
            sets += [f"slurm.signal_s={SIGNAL_S}", f'slurm.setup=["export SLURM_CONF={os.environ["SLURM_CONF"]}"]']
            words = [word for one in sets for word in ("--set", one)]
            astra("train", RECIPE, "--run-dir", str(run), *words)
            ident = json.loads((run / "job.json").read_text())["ident"]
            log = run / "logs" / "job.log"

            def said(words: str) -> bool:
                return log.is_file() and words in log.read_text()

            until(lambda: trained(records(run)))
            seen["s_from_submission_to_first_step"] = time.monotonic() - began
            status = astra("runs", "status", str(run))
            rules["status knows the job"] = [] if f"slurm {ident}: running, on n[1-2]" in status else [status]
            until(lambda: said("a checkpoint is made"))
            asked = time.monotonic()
            until(lambda: said(f"job {ident} is queued once more"))
            seen["s_from_signal_to_queued"] = time.monotonic() - asked
            saved = max((int(place.name[5:]) for place in (run / "checkpoints").glob("step_*")), default=0)
            seen["saved_at_step"], last = saved, max(record["step"] for record in trained(records(run)))
            rules["the checkpoint is of the newest step"] = [] if saved == last + 1 else [(saved, last)]
            until(lambda: ask("squeue", "--noheader", "--format=%i %T") == f"{ident} PENDING\n")
            ask("scontrol", "update", f"JobId={ident}", "StartTime=now", "TimeLimit=2:00:00")
            until(lambda: said("attempt 2"))
            found = re.findall(r"from step (\d+), attempt 2", log.read_text())
            rules["it goes on from there"] = [] if found == [str(saved)] else [found]
            until(lambda: not ask("squeue", "--noheader").strip(), 1200)
            state = json.loads((run / "status.json").read_text())
            rules["the run ends well"] = [] if state["state"] == "done" else [state["cause"], log.read_text()[-2000:]]
        rules |= check_hub(run, args.steps) | check_files(run, args.steps, ITEMS) if state["state"] == "done" else {}
        rules["nothing is left"] = agents(run)
    kept = [{"rule": rule, "kept": not broken, "broken by": broken[:8]} for rule, broken in rules.items()]
    show(args, {"steps": args.steps, "seconds": time.monotonic() - began, **seen, "rules": kept})
    sys.exit(1 if any(rules.values()) else 0)


if __name__ == "__main__":
    main()
