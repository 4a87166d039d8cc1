"""Clusters: what starts agents on other hosts, and queues that take whole runs. Programs of a cluster are stand-ins in
the PATH here; `bench/faults/` has runs on a real sshd, a real Slurm and a real Ray."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import types
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import family
import psutil
import pytest
from launch_tools import tiny
from test_agents import Fleets, fleets
from typer.testing import CliRunner

from astracli.cli.main import app
from astracli.errors import UserError
from astracli.launch import queued, run
from astracli.launch.clusters import keeper as keeping
from astracli.launch.clusters import ray as ray_cluster
from astracli.launch.clusters import registry, slurm, ssh
from astracli.launch.clusters.contract import AgentCall, AgentEnd
from astracli.launch.clusters.keeper import Keeper
from astracli.process import ports
from astracli.runs.run_dir import RunDir

__all__ = ["fleets"]  # a fixture
ASTRA = str(Path(sys.executable).with_name("astra"))


@dataclass
class Programs:
    """Programs that stand in for a cluster's own. Each call is a line of `calls`."""

    folder: Path

    def add(self, name: str, script: str) -> None:
        file = self.folder / name
        file.write_text(f'#!/bin/sh\necho "{name} $*" >> {self.folder}/calls\n{script}\n')
        file.chmod(0o755)

    @property
    def calls(self) -> list[str]:
        file = self.folder / "calls"
        return file.read_text().splitlines() if file.exists() else []


@pytest.fixture
def programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Programs:
    folder = tmp_path / "programs"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    for name in [name for name in os.environ if name.startswith("SLURM")]:
        monkeypatch.delenv(name)
    return Programs(folder)


# ---- recipes


def test_a_cluster_says_how_many_hosts_a_recipe_has() -> None:
    assert tiny().agents == () and tiny(launch__hosts=["a", "b", "c"]).agents == ("b", "c")
    assert tiny(launch__hosts="slurm", slurm__nodes=3).agents == ("node1", "node2")
    assert tiny(launch__hosts="ray").agents == ()
    for name, known in (("slrm", "did you mean `slurm`?"), ("ssh", "known: local")):
        with pytest.raises(UserError) as refused:
            tiny(launch__hosts=name)
        assert "there is no such cluster" in refused.value.message and known in (refused.value.hint or "")


def test_supervised_training_has_one_host() -> None:
    with pytest.raises(UserError, match=r"`astra sft` runs on one host, and launch.hosts asks for 2"):
        registry.check(tiny(launch__hosts=["a", "b"]), "sft")


def test_an_address_beyond_this_machine_needs_the_word(programs: Programs, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ssh, "own_address", lambda name, host: "10.0.0.1")
    recipe = tiny(launch__hosts=["a", "b"])
    with pytest.raises(UserError, match=r"reach this one at 10\.0\.0\.1") as refused:
        registry.addressed(recipe)
    assert "launch.network=private" in (refused.value.hint or "")
    assert registry.addressed(tiny(launch__hosts=["a", "b"], launch__network="private")).launch.host == "10.0.0.1"


# ---- agents are kept


@dataclass
class FakeAgent:
    end_: AgentEnd | None = None
    stopped: bool = False

    def ended(self) -> AgentEnd | None:
        return self.end_

    def end(self) -> None:
        self.stopped = True


@dataclass
class FakeHosts:
    """Hosts whose agents do what a test says."""

    started: list[tuple[str, str]] = field(default_factory=list)
    agents: list[FakeAgent] = field(default_factory=list)
    coming: list[str] = field(default_factory=list)
    away: set[str] = field(default_factory=set)

    def start(self, host: str, call: AgentCall, log: Path) -> FakeAgent:
        self.started.append((host, call.token))
        self.agents.append(FakeAgent())
        return self.agents[-1]

    def awaited(self, host: str) -> str:
        return ""

    def lost(self, host: str) -> bool:
        return host in self.away

    def arrivals(self) -> Sequence[str]:
        coming, self.coming = self.coming, []
        return coming

    def close(self) -> None:
        return


@dataclass
class Members:
    states: dict[str, str] = field(default_factory=dict)

    def state(self, host: str) -> str:
        return self.states.get(host, "awaited")

    def ticket(self, host: str) -> str:
        return f"ticket of {host}"


@pytest.fixture
def kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[FakeHosts, Members, Keeper]]:
    monkeypatch.setattr(keeping, "LOOK_S", 0.01)
    hosts, members = FakeHosts(), Members()
    made = Keeper(hosts, ["b"], members, "http://127.0.0.1:1", tmp_path, newcomers=True, delay_s=0.05).begin()
    family.wait_for(lambda: hosts.started)
    yield hosts, members, made
    made.close()


def test_a_lost_agent_is_started_again_with_the_new_token(kept: tuple[FakeHosts, Members, Keeper]) -> None:
    hosts, members, keeper = kept
    assert hosts.started == [("b", "ticket of b")]
    members.states["b"] = "here"
    family.wait_for(lambda: keeper.places["b"].joined)
    hosts.agents[0].end_ = AgentEnd(255, "the connection was closed")
    members.states["b"] = "gone"
    family.wait_for(lambda: len(hosts.started) == 2)
    assert keeper.failure() is None
    keeper.close()
    assert hosts.agents[1].stopped and not hosts.agents[0].stopped


def test_a_host_that_was_taken_back_gets_no_agent_again(
    kept: tuple[FakeHosts, Members, Keeper], capfd: pytest.CaptureFixture[str]
) -> None:
    hosts, members, keeper = kept
    members.states["b"] = "here"
    family.wait_for(lambda: keeper.places["b"].joined)
    hosts.agents[0].end_, members.states["b"] = AgentEnd(130, "left"), "gone"
    family.wait_for(lambda: keeper.places["b"].left)
    members.states["c"] = "awaited"
    hosts.coming = ["c"]  # one look later
    family.wait_for(lambda: len(hosts.started) == 2)
    assert hosts.started[1] == ("c", "ticket of new") and "host `b` was taken back" in capfd.readouterr().err


def test_an_agent_that_never_joined_ends_the_start_with_its_words(kept: tuple[FakeHosts, Members, Keeper]) -> None:
    hosts, _, keeper = kept
    hosts.agents[0].end_ = AgentEnd(1, "host `b` has astracli 0.9, this run uses 1.0")
    family.wait_for(keeper.failure)
    failure = keeper.failure()
    assert failure is not None and failure.message.endswith(": host `b` has astracli 0.9, this run uses 1.0")


def test_hosts_that_arrive_come_in_one_after_the_other(kept: tuple[FakeHosts, Members, Keeper]) -> None:
    hosts, members, _ = kept
    hosts.coming = ["c", "d"]
    family.wait_for(lambda: len(hosts.started) == 2)
    assert hosts.started[1] == ("c", "ticket of new"), "their ticket is good once"
    members.states["c"] = "here"
    family.wait_for(lambda: len(hosts.started) == 3)
    assert hosts.started[2] == ("d", "ticket of new")


# ---- ssh


def stand_in(programs: Programs) -> None:
    """Runs the command here, as ssh has the other host's shell do."""
    programs.add(
        "ssh",
        'for word in "$@"; do [ "$word" = -G ] && echo "hostname 127.0.0.1" && exit 0; done\n'
        'while [ "$1" != -- ]; do shift; done\nshift\nexec sh -c "$*"',
    )


@pytest.mark.parametrize(
    ("script", "said", "hint"),
    [
        (
            "echo 'ssh: Could not resolve hostname b' >&2; exit 255",
            "is not reached by ssh: ssh: Could not",
            "ssh b true",
        ),
        ("echo 'sh: 1: exec: astra: not found' >&2; exit 127", "has no `astra`: sh: 1", "ssh.astra=/path"),
        ("echo motd; echo 'astra 0.0.9'", "has astra 0.0.9, this machine has", "pip install 'astracli=="),
        ("echo 'Traceback' >&2; exit 1", "`astra` does not start on host `b`: Traceback", "look at `ssh"),
    ],
)
def test_a_host_that_cannot_take_part_is_refused_before_anything_starts(
    programs: Programs, tmp_path: Path, script: str, said: str, hint: str
) -> None:
    programs.add("ssh", script)
    recipe = tiny(launch__hosts=["a", "b"])
    with pytest.raises(UserError) as refused:
        run.train(recipe, run_dir=tmp_path / "run")
    assert refused.value.message.startswith("host `b`") or said.startswith("`astra`")
    assert said in refused.value.message and hint in (refused.value.hint or "")
    assert not (tmp_path / "run").exists()
    (check,) = registry.findings(recipe)
    assert (check.name, check.status, check.value) == ("ssh b", "fail", refused.value.message)


def test_a_host_that_answers_is_fine(programs: Programs) -> None:
    programs.add("ssh", f"echo 'Welcome'; echo 'astra {ssh.version()}'; echo 'hostname 127.0.0.1'")
    recipe = tiny(launch__hosts=["a", "b", "c"], ssh__options=["-p", "2222"])
    registry.check(recipe, "train")
    assert [check.status for check in registry.findings(recipe)] == ["ok", "ok"]
    assert all("BatchMode=yes -p 2222" in call for call in programs.calls if " -G " not in call)
    by_hand = tiny(launch__hosts=["a", "b"], ssh__by_hand=True)
    before = len(programs.calls)
    registry.check(by_hand, "train")
    cluster = registry.of(by_hand)
    assert cluster is not None and cluster.open(by_hand, run.planned(by_hand, "train")) is None
    assert len(programs.calls) == before, "by hand: ssh is not asked"


def test_the_command_of_another_host_may_lie_in_its_home() -> None:
    assert ssh.remote(ssh.SshTable(astra="~/v 1/bin/astra"), ["agent", "-"]) == "exec ~/'v 1/bin/astra' agent -"


def server_program() -> str | None:
    there = shutil.which("ssh") and shutil.which("ssh-keygen")
    return shutil.which("sshd", path=f"{os.environ['PATH']}:/usr/sbin") if there else None


@pytest.fixture
def sshd(tmp_path: Path) -> Iterator[list[str]]:
    """Options of ssh for a real server on loopback; host `b` is there."""
    server = server_program()
    if server is None:
        pytest.skip("no sshd on this machine: a stand-in for ssh is tested instead (apt install openssh-server)")
    for name in ("host", "user"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(tmp_path / name)], check=True)
    (port,) = ports.free_ports(1, "127.0.0.1")
    Path("/run/sshd").mkdir(exist_ok=True)
    config = tmp_path / "sshd_config"
    config.write_text(
        f"Port {port}\nListenAddress 127.0.0.1\nHostKey {tmp_path}/host\nAuthorizedKeysFile {tmp_path}/user.pub\n"
        "StrictModes no\nUsePAM no\nPasswordAuthentication no\nPidFile none\n"
    )
    client = tmp_path / "ssh_config"
    client.write_text(
        f"Host b\n  HostName 127.0.0.1\n  Port {port}\n  IdentityFile {tmp_path}/user\n  IdentitiesOnly yes\n"
        f"  UserKnownHostsFile {tmp_path}/known\n  StrictHostKeyChecking accept-new\n"
    )
    with (tmp_path / "sshd.log").open("wb") as log:
        process = subprocess.Popen([server, "-D", "-e", "-f", str(config)], stderr=log)
    family.wait_for(lambda: "listening" in (tmp_path / "sshd.log").read_text())
    yield ["-F", str(client)]
    process.terminate()
    process.wait()


def agents_of(folder: Path) -> list[psutil.Process]:
    """Processes that `fleets` of a folder started as agents, by their temporary directory."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get("TMPDIR") == str(folder) and "--attached" in process.cmdline():
                found.append(process)
        except psutil.Error:
            continue
    return found


@pytest.mark.parametrize("kind", ["stand-in", "sshd"])
def test_an_agent_behind_ssh_ends_with_it_and_is_started_again(
    fleets: Fleets, programs: Programs, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    options = request.getfixturevalue("sshd") if kind == "sshd" else []
    if kind == "stand-in":
        if server_program() is not None:
            pytest.skip("there is a real sshd")
        stand_in(programs)
    temporary = fleets.path / "tmp"
    temporary.mkdir()
    wrapper = fleets.path / "astra"
    wrapper.write_text(f'#!/bin/sh\nTMPDIR={temporary} exec {sys.executable} -m astracli "$@"\n')
    wrapper.chmod(0o755)
    recipe = tiny(launch__hosts=["a", "b"], ssh__options=options, ssh__astra=str(wrapper))
    registry.check(recipe, "train")
    cluster = registry.of(recipe)
    assert cluster is not None
    hosts = cluster.open(recipe, run.planned(recipe, "train"))
    assert isinstance(hosts, ssh.SshHosts)
    members, tickets = fleets.fleet.agents, [fleets.fleet.agents.ticket("b")]
    keeper = Keeper(hosts, ["b"], members, fleets.server.url, fleets.path, newcomers=False, delay_s=0.1).begin()
    try:
        family.wait_for(lambda: fleets.fleet.has("b") or keeper.failure())
        assert keeper.failure() is None
        first = members.agent("b")
        seen = [word for process in psutil.process_iter(["cmdline"]) for word in process.info["cmdline"] or ()]
        assert not any(tickets[0] in word for word in (*seen, *programs.calls)), "a command line anybody can read"
        started = fleets.start("rollout", "import os, time; print(os.getpid(), flush=True); time.sleep(120)")
        family.wait_for(started.last_lines)
        pid = int(started.last_lines()[0])
        process = keeper.places["b"].process
        os.kill(process.child.pid, signal.SIGKILL)  # type: ignore[union-attr]
        family.wait_for(lambda: fleets.fleet.has("b") and members.agent("b") is not first)
        family.wait_for(lambda: not psutil.pid_exists(pid) or kind != "sshd")
    finally:
        keeper.hold()
        fleets.fleet.close()
        keeper.close()
    family.wait_for(lambda: not agents_of(temporary))
    left = list(temporary.iterdir())
    assert len(left) == (0 if kind == "sshd" else 1), "an agent that was killed itself could not tidy up"
    assert "left: the run has ended" in (fleets.path / "agent-b.log").read_text()


# ---- slurm

TWO = {
    "launch__hosts": "slurm", "slurm__nodes": 2, "launch__network": "private", "resources__engines": 1,
    "slurm__partition": "cpu", "slurm__time": "08:00:00", "slurm__account": "lab", "slurm__signal_s": 120,
    "slurm__lines": ["--qos=high", "--comment=two words"], "slurm__setup": ["module load python"],
}  # fmt: skip
FILE = """\
#!/bin/bash
# Written by `astra train`, for `sbatch`. Starts the run, and goes on with it when it is queued again.
#SBATCH --job-name=astra-r
#SBATCH --chdir={here}
#SBATCH --output={run}/logs/job.log
#SBATCH --open-mode=append
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=2
#SBATCH --partition=cpu
#SBATCH --time=08:00:00
#SBATCH --account=lab
#SBATCH --no-kill
#SBATCH --requeue
#SBATCH --signal=B:USR1@120
#SBATCH --qos=high
#SBATCH --comment="two words"

module load python
exec {astra} train --resume {run}
"""


def test_a_run_is_submitted_looked_at_and_taken_back(
    programs: Programs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    state = programs.folder / "state"
    programs.add("sbatch", f"echo 'PENDING Resources ' > {state}; echo '17;main'")
    programs.add(
        "squeue", f"cat {state} 2>/dev/null || (echo 'slurm_load_jobs error: Invalid job id specified' >&2; exit 1)"
    )
    programs.add("scancel", f"rm {state}")
    recipe, place = tiny(**TWO), tmp_path / "r"
    plan = run.planned(recipe, "train")
    assert slurm.CLUSTER.queue.text(recipe, plan, place) == FILE.format(here=tmp_path, run=place, astra=ASTRA)
    assert run.train(recipe, run_dir=place) == 0
    assert (
        programs.calls == [f"sbatch --parsable {place}/job.sbatch"]
        and "--nodes=2" in (place / "job.sbatch").read_text()
    )
    found = RunDir(place)
    assert found.shown_state() == "submitted" and not found.status_json.exists() and found.lock_fd is None
    shown = CliRunner().invoke(app, ["runs", "status", str(place)])
    assert "slurm 17: pending, Resources" in shown.output and "submitted" in shown.output
    with pytest.raises(UserError, match=r"job 17 of run .* is queued or runs already: pending"):
        run.train(recipe, resume=place)
    stopped = CliRunner().invoke(app, ["runs", "stop", str(place)])
    assert stopped.exit_code == 0 and "scancel 17" in programs.calls
    assert queued.words(queued.of(found)) == "slurm 17: over"  # type: ignore[arg-type]
    assert run.train(recipe, resume=place) == 0, "it is submitted anew"
    log = place / "logs" / "job.log"
    log.write_text("from the job\n")
    assert "from the job" in CliRunner().invoke(app, ["runs", "logs", str(place)]).output


def test_a_job_that_runs_is_ended_like_by_ctrl_c(programs: Programs) -> None:
    programs.add("squeue", "echo 'RUNNING None n[1-2]'")
    programs.add("scancel", "")
    assert slurm.CLUSTER.queue.state("17") == "running, on n[1-2]"
    slurm.CLUSTER.queue.stop("17")
    assert programs.calls[-1] == "scancel --signal=TERM --batch 17"


def test_dry_run_shows_the_job_also_where_there_is_no_slurm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slurm.shutil, "which", lambda name: None)
    sets = [f"--set={key.replace('__', '.')}={json.dumps(value)}" for key, value in TWO.items()]
    done = CliRunner().invoke(app, ["train", "qwen3.5-tiny-m2po-delta", "--dry-run", *sets])
    assert "#SBATCH --signal=B:USR1@120" in done.output and "exec " in done.output
    assert done.exit_code == 2 and "there is no `sbatch` on this machine" in done.output


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"launch__network": "loopback"}, "slurm.nodes = 2, and launch.network"),
        ({"checkpoint__every": 0}, "slurm.requeue with checkpoint.every = 0"),
        ({"resources__engines": 1, "slurm__nodes": 4}, "launch.hosts names 3 hosts beside the first"),
    ],
)
def test_a_job_that_could_not_work_is_not_submitted(
    programs: Programs, tmp_path: Path, changes: dict[str, Any], said: str
) -> None:
    programs.add("sbatch", "echo 17")
    with pytest.raises(UserError) as refused:
        run.train(tiny(**TWO | changes), run_dir=tmp_path / "r")
    assert said in refused.value.message and not programs.calls and not (tmp_path / "r").exists()


def test_what_sbatch_refuses_leaves_a_run_to_submit_again(programs: Programs, tmp_path: Path) -> None:
    programs.add("sbatch", "echo 'sbatch: error: invalid partition specified: cpu' >&2; exit 1")
    with pytest.raises(UserError, match=r"`sbatch` failed: .*invalid partition") as refused:
        run.train(tiny(**TWO), run_dir=tmp_path / "r")
    assert "job.sbatch" in (refused.value.hint or "") and not RunDir(tmp_path / "r").job_json.exists()


@pytest.fixture
def job(programs: Programs, monkeypatch: pytest.MonkeyPatch) -> Programs:
    """This process runs in a job of two nodes."""
    programs.add("scontrol", 'case "$2" in hostnames) echo n1; echo n2;; node) echo "NodeAddr=127.0.0.1 X=1";; esac')
    for name, value in {"JOB_ID": "17", "JOB_NODELIST": "n[1-2]"}.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    monkeypatch.setenv("SLURMD_NODENAME", "n2")
    return programs


def test_in_a_job_the_other_node_gets_the_agent(job: Programs, tmp_path: Path) -> None:
    job.add("srun", 'read token; echo "token $token"; exit 3')
    recipe = tiny(**TWO)
    registry.check(recipe, "train")
    assert registry.queue(recipe) is None and registry.addressed(recipe).launch.host == "127.0.0.1"
    hosts = slurm.CLUSTER.open(recipe, run.planned(recipe, "train"))
    assert hosts is not None
    agent = hosts.start("node1", AgentCall("http://127.0.0.1:1", "node1", "secret"), tmp_path / "log")
    family.wait_for(agent.ended)
    assert agent.ended() == AgentEnd(3, "token secret")
    (call,) = [call for call in job.calls if call.startswith("srun")]
    assert (
        "--nodelist=n1 --overlap" in call and "--token-file - --attached --name node1" in call and "secret" not in call
    )
    with pytest.raises(UserError, match=r"slurm.nodes = 3, and job 17 has 2"):
        registry.check(tiny(**TWO | {"slurm__nodes": 3, "resources__engines": 2}), "train")


def test_after_its_checkpoint_a_job_is_queued_again(
    job: Programs, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert slurm.CLUSTER.queue.save_s(tiny(**TWO)) == 100.0
    queued.again(tiny(**TWO), RunDir(tmp_path))
    assert job.calls[-1] == "scontrol requeue 17" and "job 17 is queued once more" in capfd.readouterr().err
    queued.again(tiny(**TWO | {"slurm__requeue": False}), RunDir(tmp_path))
    queued.again(tiny(), RunDir(tmp_path))
    assert len(job.calls) == 1
    job.add("scontrol", "echo 'Requested operation is presently disabled' >&2; exit 1")
    queued.again(tiny(**TWO), RunDir(tmp_path))
    assert "could not be queued again" in (said := capfd.readouterr().err) and f"--resume {tmp_path}" in said


def test_doctor_says_which_partitions_there_are(programs: Programs) -> None:
    programs.add("sbatch", "")
    programs.add("sinfo", "echo 'cpu* up 2 infinite'; echo 'gpu up 4 1-00:00:00'")
    found = {check.name: check for check in registry.findings(tiny(**TWO | {"slurm__partition": "big"}))}
    assert found["slurm"].value == "partitions: cpu* up, 2 nodes, limit infinite; gpu up, 4 nodes, limit 1-00:00:00"
    assert found["partition"].status == "fail" and "there is: cpu, gpu" in found["partition"].value
    assert all(check.status == "ok" for check in registry.findings(tiny(**TWO)))


# ---- ray


class Ray(types.ModuleType):
    """As much of ray as is used. An actor's calls run in threads here."""

    class exceptions:
        class RayError(Exception):
            pass

    def __init__(self) -> None:
        super().__init__("ray")
        self.__version__ = "0"
        self.alive = {"head": 1, "n1": 2}
        self.dead: set[str] = set()
        self.bundles: dict[int, str] = {}
        self.asked: list[Any] = []
        self.removed = False

    def is_initialized(self) -> bool:
        return True

    def get_runtime_context(self) -> Any:
        return types.SimpleNamespace(get_node_id=lambda: "head")

    def nodes(self) -> list[dict[str, Any]]:
        return [
            {
                "NodeID": name,
                "Alive": name not in self.dead,
                "Resources": {"CPU": cpus},
                "NodeManagerAddress": "127.0.0.1",
            }
            for name, cpus in self.alive.items()
        ]

    def remote(self, kind: type) -> Any:
        return types.SimpleNamespace(options=lambda **options: self._options(kind, options))

    def _options(self, kind: type, options: dict[str, Any]) -> Any:
        where = options["scheduling_strategy"]
        self.asked.append(where)

        class Actor:
            def __init__(self, ray: Ray):
                self.ray, self.it = ray, kind()

            def __getattr__(self, name: str) -> Any:
                return types.SimpleNamespace(remote=lambda *words: self.call(name, words))

            def call(self, name: str, words: Sequence[Any]) -> dict[str, Any]:
                result: dict[str, Any] = {}
                if name == "node":
                    place = where[1] if where[0] == "node" else self.ray.bundles.get(where[1])
                    return {"value": place} if place else result

                def work() -> None:
                    result["value"] = getattr(self.it, name)(*words)

                threading.Thread(target=work, daemon=True).start()
                return result

        return types.SimpleNamespace(remote=lambda: Actor(self))

    def wait(self, results: list[dict[str, Any]], timeout: float) -> tuple[list[Any], list[Any]]:
        if timeout:
            family.wait_for(lambda: results[0], timeout)
        return ([results[0]], []) if results[0] else ([], results)

    def get(self, result: dict[str, Any]) -> Any:
        return result["value"]

    def kill(self, actor: Any) -> None:
        return


@pytest.fixture
def fake_ray(monkeypatch: pytest.MonkeyPatch) -> Ray:
    made = Ray()

    def group(bundles: list[Any], strategy: str, bundle_label_selector: list[Any]) -> Any:
        made.asked.append((bundles, strategy, bundle_label_selector))
        return made

    groups = types.SimpleNamespace(
        placement_group=group,
        placement_group_table=lambda _: {"bundles_to_node_id": made.bundles},
        remove_placement_group=lambda _: setattr(made, "removed", True),
    )
    strategies = types.SimpleNamespace(
        PlacementGroupSchedulingStrategy=lambda group, index: ("bundle", index),
        NodeAffinitySchedulingStrategy=lambda node, soft: ("node", node),
    )
    modules = {"ray": made, "ray.util.placement_group": groups, "ray.util.scheduling_strategies": strategies}
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(ray_cluster, "LOOK_S", 0.0)
    return made


RAY = {"launch__hosts": "ray", "ray__nodes": 2, "launch__network": "private", "resources__engines": 1}


def on_ray(recipe: Any) -> ray_cluster.RayHosts:
    hosts = ray_cluster.CLUSTER.open(recipe, run.planned(recipe, "train"))
    assert isinstance(hosts, ray_cluster.RayHosts)
    return hosts


def test_ray_reserves_nodes_other_than_this_one(fake_ray: Ray, tmp_path: Path) -> None:
    hosts = on_ray(tiny(**RAY))
    assert fake_ray.asked == [([{"CPU": 2.0}], "STRICT_SPREAD", [{"ray.io/node-id": "!head"}])]
    call = AgentCall("http://127.0.0.1:9", "node1", "secret")
    call = types.SimpleNamespace(words=["--version"], token="secret")  # type: ignore[assignment]
    agent = hosts.start("node1", call, tmp_path / "log")
    assert fake_ray.asked[1] == ("bundle", 0)
    assert hosts.awaited("node1") == "Ray has no further node with 2 free CPUs for it yet"
    family.wait_for(agent.ended)
    end = agent.ended()
    assert end is not None and end.code == 0 and (tmp_path / "log").read_text().startswith("astra ")
    hosts.close()
    assert fake_ray.removed


def test_a_node_that_ray_adds_brings_an_agent_and_a_lost_one_is_replaced(fake_ray: Ray, tmp_path: Path) -> None:
    hosts = on_ray(tiny(**RAY, ray__max_nodes=3))
    call: Any = types.SimpleNamespace(words=["--version"], token="secret")
    fake_ray.bundles[0] = "n1"
    hosts.start("node1", call, tmp_path / "log")
    assert hosts.awaited("node1") == "" and list(hosts.arrivals()) == [] and not hosts.lost("node1")
    fake_ray.alive |= {"small": 1, "n2": 2, "n3": 2}
    assert list(hosts.arrivals()) == ["node2"], "one is too small, and one more than ray.max_nodes"
    hosts.start("node2", call, tmp_path / "log")
    assert fake_ray.asked[-1] == ("node", "n2")
    fake_ray.dead.add("n1")
    fake_ray.alive["n4"] = 2
    fake_ray.bundles[0] = "n4"
    assert hosts.lost("node1") and list(hosts.arrivals()) == ["node3"]
    hosts.start("node3", call, tmp_path / "log")
    assert fake_ray.asked[-1] == ("bundle", 0) and list(hosts.arrivals()) == []


def test_an_agent_of_ray_ends_with_its_actor(tmp_path: Path) -> None:
    from astracli.launch.clusters.ray_actor import AgentActor

    actor, ended = AgentActor(), []
    words = ["agent", "http://127.0.0.1:9", "--token-file", "-", "--attached", "--wait", "60"]
    thread = threading.Thread(target=lambda: ended.append(actor.run(words, "secret")), daemon=True)
    thread.start()
    family.wait_for(lambda: actor.child is not None)
    actor.stop()
    thread.join(60)
    ((code, lines),) = ended
    assert code != 0 and any("no hub at http://127.0.0.1:9" in line for line in lines), lines


def test_without_ray_the_message_says_how_to_have_it() -> None:
    if "ray" in sys.modules or shutil.which("ray"):
        pytest.skip("ray is installed here")
    with pytest.raises(UserError, match="ray is not installed") as refused:
        registry.check(tiny(**RAY), "train")
    assert refused.value.hint == "`pip install 'astracli[ray]'`"
    (check,) = registry.findings(tiny(**RAY))
    assert check.status == "fail"
    assert list(ray_cluster.CLUSTER.checks(None)) == []
