"""A run on a real Ray of several raylets on this machine: a node is added, a node is lost, and the run ends well.

    python bench/faults/ray_cluster.py [--steps 100] [--autoscaler] [--run-dir DIR] [--json]

It needs ray (`pip install 'astracli[ray]'`). The head has the supervisor and the trainer, a second node the agent that
the placement group asks for. Once the run trains, a third node is added: it must bring an engine that works. Then the
raylet of the third node is killed: its agent and all of its children must end, and the run go on with the second. With
`--autoscaler` Ray's own autoscaler starts both nodes, the second for the placement group alone. At the end the books of
the run are checked. Prints what was seen and a line per rule; exits 1 when a rule is broken.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from loop.books import check_files, check_hub
from loop.kill_resume import ITEMS, SMALL, Attempt
from shared import folder, options, show

CPUS = 2
LEASE_S = 5.0
START_S = 300.0
HEAD = "127.0.0.1"


def alone() -> None:
    """Go on in a network namespace that has loopback alone: anywhere else Ray takes another address of the machine. The
    process ids are a namespace of their own too, so that everything of Ray ends with this process."""
    if os.environ.get("ASTRA_BENCH_ALONE") != "1":
        command = ['ip link set lo up && exec "$@"', "sh", sys.executable, *sys.argv]
        os.execvpe(
            "unshare",
            ["unshare", "-npf", "--mount-proc", "sh", "-c", *command],
            {**os.environ, "ASTRA_BENCH_ALONE": "1"},
        )


def agents() -> list[psutil.Process]:
    """Of every agent that runs here."""
    found = []
    for process in psutil.process_iter(["cmdline"]):
        words = process.info["cmdline"] or []
        if "astracli" in words and "agent" in words and "--attached" in words:
            found.append(process)
    return found


def named(name: str) -> psutil.Process | None:
    """The agent of a host."""
    return next((one for one in agents() if name in one.cmdline()), None)


class Plain:
    """Raylets that this process starts, all of them on loopback addresses."""

    def __init__(self) -> None:
        from ray.cluster_utils import Cluster

        head = {"num_cpus": 1, "node_ip_address": HEAD, "include_dashboard": False}
        self._cluster, self._count = Cluster(initialize_head=True, head_node_args=head), 1
        self.address = self._cluster.address

    def add(self) -> Any:
        self._count += 1
        return self._cluster.add_node(num_cpus=CPUS, node_ip_address=f"127.0.0.{self._count}")

    def kill(self, node: Any) -> None:
        self._cluster.remove_node(node, allow_graceful=False)

    def close(self) -> None:
        self._cluster.shutdown()


class Autoscaled:
    """A head whose autoscaler starts raylets on this machine when CPUs are asked for."""

    address = "auto"

    def __init__(self, place: Path):
        provider = {"type": "fake_multinode", "use_internal_ips": True, "disable_node_updaters": True}
        nodes = {
            "ray.head.default": {"resources": {"CPU": 1}, "node_config": {}, "max_workers": 0},
            "more": {"resources": {"CPU": CPUS}, "node_config": {}, "min_workers": 0, "max_workers": 2},
        }
        config = {
            "cluster_name": "bench", "max_workers": 2, "upscaling_speed": 10.0, "idle_timeout_minutes": 60,
            "provider": provider | {"disable_launch_config_check": True}, "available_node_types": nodes,
            "head_node_type": "ray.head.default", "auth": {}, "docker": {}, "file_mounts": {},
            "cluster_synced_files": [], "file_mounts_sync_continuously": False, "rsync_exclude": [], "rsync_filter": [],
        }  # fmt: skip
        for when in ("initialization", "setup", "head_setup", "worker_setup", "head_start_ray", "worker_start_ray"):
            config[f"{when}_commands"] = []
        file = place / "autoscaler.json"
        file.write_text(json.dumps(config))
        ray = str(Path(sys.executable).with_name("ray"))
        words = [ray, "start", "--head", "--num-cpus=1", "--include-dashboard=false", f"--autoscaling-config={file}"]
        env = {**os.environ, "AUTOSCALER_UPDATE_INTERVAL_S": "1", "RAY_FAKE_CLUSTER": "1"}
        subprocess.run(words, check=True, env=env, stdout=subprocess.DEVNULL)

    def add(self) -> Any:
        """Ask for one node more than there is now."""
        import ray
        from ray.autoscaler.sdk import request_resources

        if not ray.is_initialized():
            ray.init("auto", log_to_driver=False)
        before = {node["NodeID"] for node in ray.nodes()}
        request_resources(bundles=[{"CPU": CPUS}] * len(before))
        while not (new := {node["NodeID"] for node in ray.nodes() if node["Alive"]} - before):
            time.sleep(0.2)
        return new.pop()

    def kill(self, node: Any) -> None:
        """The raylet and its workers: nobody reaps this raylet, and while it is a zombie its workers take it for alive.
        The agent is a child of a worker."""
        for process in psutil.process_iter(["cmdline"]):
            words = process.info["cmdline"] or []
            if words and words[0].endswith("/raylet") and f"--node_id={node}" in words:
                for each in [process, *process.children()]:
                    each.kill()

    def close(self) -> None:
        return


def log_says(attempt: Attempt, words: str) -> Callable[[], bool]:
    return lambda: words in attempt.log.read_text()


def main() -> None:
    args = options(__doc__, steps=100, autoscaler=False, run_dir=Path).parse_args()
    alone()
    began, seen, rules = time.monotonic(), {}, {}
    with folder() as name:
        run = (args.run_dir or name / "run").resolve()
        run.parent.mkdir(parents=True, exist_ok=True)
        cluster = Autoscaled(run.parent) if args.autoscaler else Plain()
        if not args.autoscaler:
            cluster.add()
        sets = [one for one in SMALL if not one.startswith("train.steps")]
        sets += [f"train.steps={args.steps}", f"launch.agent_lease_s={LEASE_S}", "launch.hosts=ray", "ray.nodes=2"]
        sets += [f"ray.address={cluster.address}", "launch.network=private", "resources.engines=1"]
        attempt = Attempt(run, sets, resume=False)
        try:
            assert attempt.wait(lambda: bool(attempt.steps()), START_S), attempt.end()[1]
            seen["s_until_first_step"] = attempt.seconds
            added = time.monotonic()
            third = cluster.add()
            assert attempt.wait(log_says(attempt, "host `node2` is here"), START_S), attempt.end()[1]
            seen["s_from_new_node_to_its_agent"] = time.monotonic() - added
            engine = lambda: any(record.get("process") == "rollout1" for record in attempt.new_records())  # noqa: E731
            rules["a new node brings an engine"] = [] if attempt.wait(engine, 2 * START_S) else ["it never worked"]
            agent = named("node2")
            assert agent is not None
            below = [agent, *agent.children(recursive=True)]
            at_step, killed = max(attempt.steps()), time.monotonic()
            cluster.kill(third)
            _, left = psutil.wait_procs(below, timeout=60)
            seen |= {"node_lost_at_step": at_step, "s_until_its_processes_ended": time.monotonic() - killed}
            rules["a lost node ends its agent"] = [one.pid for one in left]
            lost = attempt.wait(log_says(attempt, "the agent of host `node2` was"), 2 * START_S)
            rules["the run goes on without it"] = [] if lost else ["it was never said"]
            code, console = attempt.end(900)
        finally:
            if attempt.supervisor.poll() is None:
                os.kill(attempt.supervisor.pid, 15)
            cluster.close()
        rules |= {"the run ends well": [code] if code else []}
        rules |= check_hub(run, args.steps) | check_files(run, args.steps, ITEMS) if code == 0 else {}
        rules |= {"no agent is left": [one.pid for one in agents()]}
    kept = [{"rule": rule, "kept": not broken, "broken by": broken[:8]} for rule, broken in rules.items()]
    show(args, {"exit": code, "steps": args.steps, "seconds": time.monotonic() - began, **seen, "rules": kept})
    if code:
        print(console[-3000:], file=sys.stderr)
    sys.exit(1 if any(rules.values()) else 0)


if __name__ == "__main__":
    main()
