"""Several hosts: what tokens open, and agents as real processes that start, lose and end their children."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import family
import httpx
import psutil
import pytest
import warm
from hub_tools import Clock, open_store
from launch_tools import INPUTS, tiny
from starlette.applications import Starlette
from transfer_tools import FULL, TOKEN, Server, chain, publish, same_files, server

from astracli.errors import RunFailed, UserError
from astracli.hub.agent_api import LARGEST_OWN
from astracli.hub.agents import SILENT, Agents
from astracli.hub.api import build_app
from astracli.launch import configs, run, shared_dir
from astracli.launch.agent_hub import Hub, Revoked
from astracli.launch.agent_relay import Beats
from astracli.launch.configs import RunContext
from astracli.launch.fleet import Fleet, RemoteProcess
from astracli.launch.fleet import versions as fleet_versions
from astracli.launch.host_inputs import HostInputs, found
from astracli.launch.launcher import Process
from astracli.launch.local import LocalLauncher
from astracli.launch.shared_dir import Proof
from astracli.machine import documents
from astracli.machine.memory import words
from astracli.plan.hosts import shortage
from astracli.plan.memory import total
from astracli.plan.seats import spread
from astracli.plan.types import LaunchPlan
from astracli.process.config import Role
from astracli.process.ports import bind
from astracli.process.server import ServerThread
from astracli.process.worker import LOST_EXIT
from astracli.runs.run_dir import RunDir
from astracli.weights.receive.host_cache import HostCache

FACTS = documents.load("laptop").document()
RUN = "token-of-the-run"
__all__ = ["server"]  # a fixture
VERSIONS = {"astracli": "1.0", "transformers": "5.0"}
JOIN = {"ident": "i1", "address": "127.0.0.1", "ports": [1, 2], "versions": VERSIONS, "facts": {}}


# ---- tokens


@dataclass
class World:
    agents: Agents
    url: str
    clock: Clock
    tickets: list[tuple[str, str]]

    def post(self, path: str, token: str, body: Any) -> httpx.Response:
        content = body if isinstance(body, bytes) else json.dumps(body)
        return httpx.post(self.url + path, content=content, headers={"Authorization": f"Bearer {token}"})

    def join(self, ticket: str | None = None, **changes: Any) -> httpx.Response:
        return self.post("/agent/join", ticket or self.agents.ticket("b"), JOIN | changes)


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    clock, tickets = Clock(), []  # type: ignore[var-annotated]
    agents = Agents(
        ["b", "c"], run="r", versions=VERSIONS, lease_s=10.0, clock=clock, on_ticket=lambda *pair: tickets.append(pair)
    )
    app = build_app(open_store(tmp_path), RUN, agents=agents, weights_app=Starlette())
    server = ServerThread(app, bind()).start()
    yield World(agents, server.url, clock, tickets)
    server.stop()


def test_each_token_opens_its_own_routes(world: World) -> None:
    ticket = world.agents.ticket("b")
    report = {"processes": [], "usage": {}, "memory": {}, "beats": []}
    assert world.post("/agent/join", "wrong", JOIN).status_code == 401
    assert world.post("/agent/join", RUN, JOIN).status_code == 403, "the run's own processes speak for no host"
    for path in ("/state", "/lease", "/batch", "/agent/report", "/weights"):
        assert world.post(path, ticket, {}).status_code == 403, path
    token = world.join().json()["token"]
    assert world.post("/agent/report", token, report).status_code == 200
    assert world.post("/lease", token, {"worker": "w", "n": 1}).status_code == 200
    for path in ("/batch", "/ack", "/announce", "/eval/done", "/state", "/agent/join"):
        assert world.post(path, token, {}).status_code == 403, path


def test_a_ticket_is_good_for_one_agent(world: World) -> None:
    ticket = world.agents.ticket("b")
    first = world.join(ticket)
    assert first.status_code == 200 and world.join(ticket).json() == first.json(), "an answer that was lost"
    other = world.join(ticket, ident="i2")
    assert other.status_code == 409 and "has been used" in other.json()["error"]
    assert world.agents.state("b") == "here" and world.agents.state("c") == "awaited"


def test_newcomers_share_a_file_whose_token_is_good_once(world: World) -> None:
    _, ticket = next(pair for pair in reversed(world.tickets) if pair[0] == "new")
    for name, said in (("b", "has a host `b` already"), ("../x", "is no name of a host"), ("new", "is no name")):
        refused = world.join(ticket, name=name)
        assert refused.status_code == 409 and said in refused.json()["error"]
    first = world.join(ticket, name="x")
    assert first.status_code == 200 and world.join(ticket, name="x").json() == first.json()
    assert world.join(ticket, name="y", ident="i2").status_code == 409
    host, fresh = world.tickets[-1]
    assert host == "new" and world.join(fresh, name="y", ident="i2").status_code == 200
    assert world.agents.hosts == ["b", "c", "x", "y"]


def test_a_token_ends_with_its_agent(world: World) -> None:
    ticket, report = world.agents.ticket("b"), {"processes": [], "usage": {}, "memory": {}, "beats": []}
    token = world.join().json()["token"]
    assert world.post("/agent/leave", token, {"reason": "done"}).status_code == 200
    assert world.post("/agent/report", token, report).status_code == 401
    assert world.join(ticket, ident="i2").status_code == 409, "the old ticket"
    host, fresh = world.tickets[-1]
    assert host == "b" and fresh not in (ticket, token)
    again = world.join(fresh, ident="i2")
    assert again.status_code == 200 and again.json()["token"] != token


def test_an_agent_that_is_silent_for_its_lease_is_gone(world: World) -> None:
    token = world.join().json()["token"]
    world.clock.now += SILENT * 10 - 0.1
    assert world.post("/agent/orders", token, {"done": 0}).status_code == 200 and world.agents.state("b") == "here"
    world.clock.now += SILENT * 10 + 0.1
    assert world.agents.state("b") == "gone"
    assert world.post("/agent/orders", token, {"done": 0}).status_code == 401
    agent = world.agents.agent("b")
    assert agent is not None and agent.gone == "was not heard for 10 s"


@pytest.mark.parametrize("name", ["astracli", "transformers"])
def test_other_versions_are_refused_with_both(world: World, name: str) -> None:
    refused = world.join(versions=VERSIONS | {name: "0.9"})
    assert refused.status_code == 409
    assert refused.json()["error"] == f"host `b` has {name} 0.9, this run uses {name} {VERSIONS[name]}"
    assert world.agents.refusals == [refused.json()["error"]]
    assert world.join().status_code == 200, "the ticket is not used up by that"


def test_an_agent_s_requests_have_a_largest_size(world: World) -> None:
    token = world.join().json()["token"]
    assert world.post("/agent/report", token, b"x" * (LARGEST_OWN + 1)).status_code == 413
    odd = {"processes": [{"start": "one"}], "usage": {}, "memory": {}, "beats": []}
    assert world.post("/agent/report", token, odd).status_code == 400


def test_orders_are_given_until_they_are_done(world: World) -> None:
    token = world.join().json()["token"]
    world.agents.order("b", "stacks", start=1)
    world.agents.order("b", "stop", starts=[1, 2], grace_s=1.0)

    def numbers(done: int) -> list[int]:
        reply = world.post("/agent/orders", token, {"done": done}).json()
        return [order["number"] for order in reply["orders"]]

    assert numbers(0) == numbers(0) == [1, 2]
    assert numbers(1) == [2] and numbers(2) == []


# ---- plans and configs


@pytest.mark.parametrize(
    ("engines", "hosts", "homes"),
    [(2, (), [None, None]), (1, ("b",), ["b"]), (5, ("b", "c"), ["b", "b", "b", "c", "c"]), (1, ("b", "c"), ["b"])],
)
def test_engines_are_divided_in_blocks(engines: int, hosts: tuple[str, ...], homes: list[str | None]) -> None:
    assert spread(engines, hosts) == homes


def test_memory_is_counted_a_host() -> None:
    one, two = (
        run.planned(tiny(resources__engines=2, **more), "train") for more in ({}, {"launch__hosts": ["a", "b"]})
    )

    def host_memory(plan: LaunchPlan, host: str | None = None) -> int:
        return total(plan.memory, where="host", fixed=True, host=host)

    assert host_memory(two, "b") > 0 and host_memory(one) == host_memory(two) + host_memory(two, "b")
    facts = documents.load("laptop")
    assert shortage(two, "b", facts) is None
    small = facts.model_copy(update={"system": facts.system.model_copy(update={"memory_total": 2**20})})
    assert (shortage(two, "b", small) or "").endswith("of memory, it has 1.0 MiB")
    fleet = {"b": small}
    assert [p.message for p in run.planned(tiny(launch__hosts=["a", "b"]), "train", facts, fleet).problems] == [
        f"host `b` needs at least {words(host_memory(run.planned(tiny(launch__hosts=['a', 'b']), 'train'), 'b'))} "
        "of memory, it has 1.0 MiB"
    ]
    names = [(reason.what, reason.where) for reason in two.placement.reasons]
    assert names == [("host b", "engine0, engine1, rollout")] and not one.placement.reasons


def test_processes_are_told_of_their_own_host(tmp_path: Path) -> None:
    recipe = tiny(launch__hosts=["a", "b", "c"], resources__engines=3)
    plan = run.planned(recipe, "train")
    assert [(p.name, p.host) for p in plan.processes] == [
        ("engine0", "b"), ("engine1", "b"), ("engine2", "c"), ("rollout", "b"), ("rollout1", "c"),
        ("trainer", None), ("eval", None),
    ]  # fmt: skip
    sites = {host: configs.Site(f"127.0.0.{n}", (5001, 5002), f"of-{host}") for n, host in ((2, "b"), (3, "c"))}
    context = RunContext(recipe, plan, RunDir(tmp_path), 1, INPUTS, token="run")
    with contextlib.ExitStack() as held:
        processes = configs.build(context, "http://127.0.0.1:1", held, sites)
    told = {process.name: process.config for process in processes}
    rollout, evaluation = told["rollout"], told["eval"]
    assert [e.url for e in rollout.engines] == ["http://127.0.0.2:5001", "http://127.0.0.2:5002"]  # type: ignore[attr-defined]
    assert [e.token for e in evaluation.engines] == ["of-b", "of-b", "of-c"]  # type: ignore[attr-defined]
    assert (told["engine2"].token, told["engine2"].recipe.launch.host) == ("of-c", "127.0.0.3")
    assert (told["trainer"].token, told["trainer"].recipe.launch.host) == ("run", "127.0.0.1")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"launch__host": "10.0.0.1"}, 'set launch.network = "private"'),
        ({"launch__hosts": ["a", "b", "b"]}, "names a host twice"),
        ({"launch__hosts": ["a", "b"], "launch__agent_lease_s": 55.0}, "heartbeat_timeout_s of at least 66"),
    ],
)
def test_hosts_that_do_not_fit_are_refused(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        tiny(**changes)


def test_a_run_that_lost_a_host_goes_on_and_takes_it_back(tmp_path: Path) -> None:
    class Hosts(LocalLauncher):
        """Host `b` is lost when its process has written a line, and there again when the test says so."""

        there, back = True, False

        def has(self, host: str | None) -> bool:
            return host is None or self.there

        def gone(self, host: str) -> str:
            return "was not heard for 5 s"

        def start(self, process: Process) -> Any:
            child = super().start(process)
            if process.plan.host and self.there and not self.back:
                self.there = False
                child.exit_code = lambda: LOST_EXIT  # type: ignore[method-assign]
            return child

    def host(process: Process) -> Process:
        return replace(process, plan=replace(process.plan, host="b"))

    first, second = tmp_path / "first", tmp_path / "second"
    code = f"""
        import pathlib, time
        first, second = pathlib.Path({str(first)!r}), pathlib.Path({str(second)!r})
        if first.exists():
            second.touch()
            time.sleep(60)
        first.touch()
    """
    engine = host(family.process(tmp_path, "engine0", code, Role.ENGINE))
    wait = f"import pathlib, time\nwhile not pathlib.Path({str(second)!r}).exists(): time.sleep(0.02)"
    trainer = family.process(tmp_path, "trainer", wait)
    hub, launcher = family.FakeHub(), Hosts(sample_s=0.1)

    def tick(supervisor: Any) -> None:
        if supervisor.away:
            launcher.there = launcher.back = True

    watching = family.supervisor([engine, trainer], hub, tick=tick, launcher=launcher)
    assert watching.run() is False and hub.released == ["engine0"]
    words = "the run goes on without it, and uses it again when an agent is there"
    assert watching.notes == [f"the agent of host `b` was not heard for 5 s: {words}"]


def test_at_the_end_evaluations_do_not_wait_for_ever_for_an_engine_of_the_plan(tmp_path: Path) -> None:
    class Hosts(LocalLauncher):
        """Host `b` is lost at once and never comes back; another one joins."""

        joined = [family.process(tmp_path, "engine1", family.SLEEP, Role.ENGINE)]  # noqa: RUF012

        def has(self, host: str | None) -> bool:
            return host is None

        def gone(self, host: str) -> str:
            return "was not heard for 5 s"

        def newcomers(self) -> list[Process]:
            come, self.joined = self.joined, []
            return come

        def start(self, process: Process) -> Any:
            child = super().start(process)
            if process.plan.host:
                child.exit_code = lambda: LOST_EXIT  # type: ignore[method-assign]
            return child

    engine = family.process(tmp_path, "engine0", "pass", Role.ENGINE)
    engine = replace(engine, plan=replace(engine.plan, host="b"))
    processes = [engine, family.process(tmp_path, "trainer", "pass"), family.process(tmp_path, "eval", family.SLEEP)]
    hub = family.FakeHub()
    hub.pending = 1

    def tick(supervisor: Any) -> None:
        for name in ("engine1", "eval"):
            supervisor.on_status(family.report(name))

    watching = family.supervisor(processes, hub, tick=tick, launcher=Hosts(sample_s=0.1), ready_timeout_s=1.0)
    with pytest.raises(RunFailed, match="no engine is left, and no agent came on `b` for 1 s"):
        watching.run()


def test_a_host_without_an_engine_is_a_problem() -> None:
    plan = run.planned(tiny(launch__hosts=["a", "b", "c"]), "train")
    assert [problem.hint for problem in plan.problems] == ["`--set resources.engines=2`, or name fewer hosts"]


# ---- files that a host needs


def test_inputs_are_used_where_they_are_and_fetched_once_elsewhere(tmp_path: Path) -> None:
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text("{}")
    (model / "model.safetensors").write_bytes(b"weights")
    (model / "original.pth").write_bytes(b"not read by anyone")
    offered = HostInputs(replace(INPUTS, model=model))
    files, cache = offered.document[str(model)], tmp_path / "cache"
    assert [one["file"] for one in files] == ["config.json", "model.safetensors"]

    def none(digest: str, size: int, path: Path) -> None:
        raise AssertionError("it is here")

    assert found(str(model), files, cache, none) == model
    fetched: list[str] = []

    def fetch(digest: str, size: int, path: Path) -> None:
        source = offered.file(digest)
        assert source is not None
        fetched.append(source.name)
        path.write_bytes(source.read_bytes())

    for _ in range(2):
        there = found("/elsewhere/model", files, cache, fetch)
    assert fetched == ["config.json", "model.safetensors"] and (there / "model.safetensors").read_bytes() == b"weights"
    (there / "config.json").write_text("[]")
    assert found("/elsewhere/model", files, cache, fetch) == there and (there / "config.json").read_text() == "{}"


# ---- agents as processes


@dataclass
class Fleets:
    """A fleet whose hub serves, and agents of its hosts as processes."""

    path: Path
    fleet: Fleet
    server: ServerThread
    made: list[Any] = field(default_factory=list)

    def agent(self, host: str, *more: str) -> Any:
        token = self.fleet.token_file(host)
        words = ["-m", "astracli", "agent", self.server.url, "--token-file", str(token), *more]
        folder = self.path / f"agent{len(self.made)}"
        child = warm.start([*words, "--dir", str(folder)], self.path / f"{folder.name}.log")
        self.made.append(child)
        return child

    def start(self, name: str, code: str) -> RemoteProcess:
        made = family.process(self.path, name, code, Role.ROLLOUT)
        process = Process(replace(made.plan, host="b"), made.config, made.env)
        started = self.fleet.start(process)
        assert isinstance(started, RemoteProcess)
        return started


@pytest.fixture
def fleets(tmp_path: Path) -> Iterator[Fleets]:
    recipe = tiny(launch__hosts=["a", "b"], launch__agent_lease_s=3.0)
    run_dir = RunDir(tmp_path / "run")
    run_dir.attempt_logs(1).mkdir(parents=True)
    context = RunContext(recipe, run.planned(recipe, "train"), run_dir, 1, replace(INPUTS, model=tmp_path))
    made = Fleet(context, LocalLauncher(sample_s=0.1))
    app = build_app(open_store(tmp_path), RUN, agents=made.agents, inputs=made.inputs.file)
    world = Fleets(tmp_path, made, ServerThread(app, bind()).start())
    yield world
    made.close()
    world.server.stop()
    for child in world.made:
        if child.poll() is None:
            os.kill(child.pid, signal.SIGKILL)
        child.wait()


def here(fleets: Fleets) -> None:
    family.wait_for(lambda: fleets.fleet.has("b"))


def pid_in(started: RemoteProcess) -> int:
    family.wait_for(started.last_lines)
    return int(started.last_lines()[0])


SLEEPS = "import os, sys; print(os.getpid(), flush=True); import time; time.sleep(120)"


def test_an_agent_tells_of_its_processes_and_ends_with_the_run(fleets: Fleets) -> None:
    agent = fleets.agent("b")
    here(fleets)
    fails = fleets.start("rollout", "print('one'); print('two', flush=True); raise SystemExit(7)")
    family.wait_for(fails.exited)
    assert (fails.exit_code(), fails.last_lines()) == (7, ["one", "two"])
    assert fails.log.parts[-3:] == ("logs", "attempt_1", "rollout.log"), "where `astra runs logs` reads"
    sleeps = fleets.start("rollout1", SLEEPS)
    pid = pid_in(sleeps)
    fleets.fleet.stop([sleeps], grace_s=1.0)
    assert sleeps.exit_code() == -signal.SIGTERM and not psutil.pid_exists(pid)
    pid = pid_in(fleets.start("rollout2", SLEEPS))
    family.wait_for(lambda: fleets.fleet.usage().get("rollout2", (0, 0))[0] > 0)
    fleets.fleet.close()
    assert agent.wait(timeout=30) == 0 and not psutil.pid_exists(pid)


def test_children_end_with_a_killed_agent_and_the_next_one_starts_them_again(fleets: Fleets) -> None:
    agent = fleets.agent("b")
    here(fleets)
    watching = "import os, time\nparent = os.getppid(); print(os.getpid(), flush=True)\n" + (
        "while os.getppid() == parent: time.sleep(0.05)"  # as a worker's Reporter does
    )
    lost = fleets.start("rollout", watching)
    pid = pid_in(lost)
    os.kill(agent.pid, signal.SIGKILL)
    family.wait_for(lambda: not psutil.pid_exists(pid))
    family.wait_for(lost.exited)
    assert lost.exit_code() == LOST_EXIT and not fleets.fleet.has("b")
    fleets.agent("b")
    here(fleets)
    again = fleets.start("rollout", "print('again', flush=True)")
    family.wait_for(again.exited)
    assert (again.exit_code(), again.last_lines()) == (0, ["again"])


def test_an_agent_that_hears_no_hub_ends_its_processes(fleets: Fleets) -> None:
    agent = fleets.agent("b")
    here(fleets)
    pid = pid_in(fleets.start("rollout", SLEEPS))
    fleets.server.stop()
    assert agent.wait(timeout=60) == 1 and not psutil.pid_exists(pid)
    assert "was not heard for 3 s" in (fleets.path / "agent0.log").read_text()


def test_a_host_that_joins_brings_an_engine_that_waits_for_checked_weights(fleets: Fleets) -> None:
    assert list(fleets.fleet.newcomers()) == []
    fleets.fleet.agents.join(
        "new", fleets.fleet.agents.ticket("new"), "i", "127.0.0.1", [7001], fleet_versions(), FACTS, "x"
    )
    engine, rollout = fleets.fleet.newcomers()
    assert list(fleets.fleet.newcomers()) == [], "each host once"
    assert (engine.name, rollout.name) == ("engine1", "rollout1") and engine.plan.host == rollout.plan.host == "x"
    assert engine.config.await_weights and engine.config.port == 7001  # type: ignore[attr-defined]
    assert [e.name for e in rollout.config.engines] == ["engine1"]  # type: ignore[attr-defined]


def test_an_engine_that_joined_follows_the_newest_version_through_an_evaluation(tmp_path: Path) -> None:
    store = open_store(tmp_path, eval_every=1)
    store.announce(0, 0)
    store.announce(1, 1)
    assert (store.target("engine0").version, store.target("engine0").pinned) == (0, True)
    assert (store.target("engine1").version, store.target("engine1").pinned) == (1, False)
    store.engine_state("engine1", 1, "ready")
    store.release_worker("engine1")
    assert store.target("engine1").down


def test_sigterm_leaves(fleets: Fleets) -> None:
    agent = fleets.agent("b")
    here(fleets)
    lost = fleets.start("rollout", SLEEPS)
    pid = pid_in(lost)
    agent_pid = psutil.Process(agent.pid)
    agent_pid.send_signal(signal.SIGTERM)
    assert agent.wait(timeout=30) == 130 and not psutil.pid_exists(pid)
    gone = fleets.fleet.agents.agent("b")
    assert gone is not None and gone.gone == "was told to leave"
    assert lost.exited() and lost.exit_code() == LOST_EXIT, "its host is gone: the process did not fail"


# ---- versions


def test_a_host_fetches_each_file_once_and_checks_it(tmp_path: Path, server: Server) -> None:
    published = tmp_path / "weights"
    publish(published, chain(2))
    cache = HostCache(server.url, TOKEN, tmp_path / "cache", link_bytes=None)  # they share no disk
    try:
        listing = cache.listing()
        assert listing["latest"] == 1 and listing["store"]["directory"] == str((tmp_path / "cache").resolve())
        manifest, payload = FULL
        got: list[Path | None] = [cache.file(0, manifest)]
        threads = [threading.Thread(target=lambda: got.append(cache.file(0, payload))) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len({*got[1:]}) == 1 and len(got) == 5
        assert same_files(tmp_path / "cache" / "v000000", published / "v000000") == 2
        size = (published / "v000000" / payload).stat().st_size
        assert size < cache.downloaded < 2 * size, "four engines, one download"
        assert cache.file(0, "other.safetensors") is None and cache.file(9, payload) is None
    finally:
        cache.close()


# ---- heartbeats and links


def test_heartbeats_wait_for_the_report_and_changes_do_not(world: World) -> None:
    beats = Beats()
    beats.beat({"name": "e", "state": "starting", "progress": {"n": 1}})
    assert beats.urgent.is_set() and [one["progress"] for one in beats.take()] == [{"n": 1}]
    beats.beat({"name": "e", "state": "starting", "progress": {"n": 2}})
    assert not beats.urgent.is_set(), "the next report brings it"
    beats.beat({"name": "e", "state": "starting", "warnings": ["one"]})
    lost = beats.take()
    beats.beat({"name": "e", "state": "ready", "warnings": ["two"]})
    beats.put_back(lost)
    (told,) = beats.take()
    assert (told["state"], told["warnings"]) == ("ready", ["one", "two"]), "a warning that was not heard is told again"


def test_a_report_brings_heartbeats_to_the_supervisor(tmp_path: Path) -> None:
    heard: list[dict[str, Any]] = []
    agents, store = Agents(["b"], run="r", versions=VERSIONS, lease_s=10.0), open_store(tmp_path)
    app = build_app(store, RUN, agents=agents, on_status=heard.append)
    server = ServerThread(app, bind()).start()
    try:
        world = World(agents, server.url, Clock(), [])
        token = world.join().json()["token"]
        beat = {"name": "engine0", "pid": 1, "state": "ready", "waiting": None, "progress": {"n": 1}}
        body = {"processes": [], "usage": {}, "memory": {}, "beats": [beat]}
        assert world.post("/agent/report", token, body).json() == {"stop": False} and heard == [beat]
        store.request_stop()
        assert world.post("/agent/report", token, body | {"beats": []}).json() == {"stop": True}
    finally:
        server.stop()


def test_an_agent_measures_its_link_before_it_joins(world: World) -> None:
    hub = Hub(world.url, world.agents.ticket("b"))
    rate = hub.link()
    hub.close()
    assert rate is not None and rate > 1e6
    wrong = Hub(world.url, "wrong")
    with pytest.raises(Revoked):
        wrong.link()
    wrong.close()


def test_ten_agents_with_one_token_are_one_agent(world: World) -> None:
    ticket = world.agents.ticket("new")
    with ThreadPoolExecutor(10) as pool:
        joins = [pool.submit(world.join, ticket, name=f"n{n}", ident=f"i{n}") for n in range(10)]
    assert sorted(join.result().status_code for join in joins) == [200] + [409] * 9
    assert len([host for host in world.agents.hosts if host.startswith("n")]) == 1


# ---- a run directory that hosts share


def test_ranks_of_other_hosts_must_see_the_run_directory(tmp_path: Path) -> None:
    run, other = tmp_path / "run", tmp_path / "other"
    run.mkdir()
    other.mkdir()
    proof = shared_dir.offer(run)
    proof.check("b")
    assert sorted(path.name for path in run.iterdir()) == [shared_dir.NAME], "what the check wrote is gone"
    with pytest.raises(RunFailed, match="host `b` does not see the run directory") as refused:
        Proof(str(other / shared_dir.NAME), proof.nonce).check("b")
    assert "mount a shared file system" in (refused.value.hint or "") and "--run-dir" in (refused.value.hint or "")
    shared_dir.offer(other)
    with pytest.raises(RunFailed, match="host `b` has another directory at"):
        Proof(str(other / shared_dir.NAME), proof.nonce).check("b")
