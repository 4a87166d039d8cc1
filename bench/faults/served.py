"""Every listener of a run, in this process as a run serves it, for `requests.py`. vLLM is the tests' stand-in."""

from __future__ import annotations

import json
import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
from starlette.types import ASGIApp

from astracli.config.recipe_run import LaunchTable
from astracli.hub.agents import Agents
from astracli.hub.api import build_app
from astracli.hub.store import HubStore
from astracli.hub.types import HubSettings
from astracli.launch.supervise import Supervisor
from astracli.process import ports
from astracli.process.config import Role
from astracli.process.server import ServerThread
from astracli.report.live import RunProgress, details
from astracli.rl.types import Group, Sample, Segment, pack_group
from faults.requests import LEASES, TOKEN, Listener
from faults.world import Row

RECIPE = "qwen3.5-tiny-m2po-delta"
TESTS = Path(__file__).resolve().parents[2] / "tests"
VERSIONS = {"astracli": "1"}


def _good(**routes: dict[str, Any]) -> list[tuple[str, str, bytes]]:
    return [("POST", "/" + path.replace("__", "/"), json.dumps(body).encode()) for path, body in routes.items()]


def a_group(lease: int) -> bytes:
    tokens, logprobs = np.arange(3, dtype=np.int32), np.full(3, -0.5, np.float32)
    parts, notes = {"format": 0.5}, {"why": "x"}
    samples = [
        Sample(i, [Segment(0, tokens, logprobs)], "stop", float(i), "right", "text", parts, notes) for i in range(2)
    ]
    return pack_group(Group(lease, "p0", tokens, samples, problem="1+1", answer="2", meta={"source": "a"}))


HUB = [
    *_good(
        lease={"worker": "rollout", "n": 3, "engine": "engine0", "request": "r", "wait_s": 0.0},
        lease__renew={"lease_ids": [0, 1], "worker": "rollout"},
        lease__return={"lease_ids": [0, 1]},
        lease__release={"worker": "rollout"},
        skip={"lease_id": 5, "reason": "too long"},
        batch={"step": 0, "wait_s": 0.0},
        ack={"step": 0, "version": 1, "checkpoint_step": None},
        announce={"version": 1, "step": 1},
        engine__target={"engine": "engine0", "have": 0, "pinned": False, "wait_s": 0.0},
        engine__slots={"engine": "engine0", "user": "rollout", "wants": 3, "holds": 1},
        engine__state={"engine": "engine0", "version": 0, "state": "ready"},
        gpu_lease__take={"gpu_lease": "gpu0", "who": "trainer", "wait_s": 0.0},
        gpu_lease__give={"gpu_lease": "gpu0", "who": "trainer"},
        eval__next={"finishing": [0], "wait_s": 0.0},
        eval__engines={"version": 0, "have": ["engine0"], "wait_s": 0.0},
        eval__release={"step": 0, "version": 0, "engine": "engine0"},
        eval__done={"step": 0, "version": 0, "results": {"small": {"n": 1, "avg_at_n": 0.5, "stderr": 0.1, "k": 1,
                                                                   "pass_at_k": 0.5}}},
        status={"name": "trainer", "pid": 1, "state": "ready", "waiting": None, "progress": {"step": 1, "done": 0.5},
                "error": None, "warnings": []},
        metrics={"records": [{"step": 1, "process": "trainer", "loss": 0.5, "arrived_groups": 3}]},
        state={},
    ),
    ("PUT", "/group", a_group(0)),
    ("GET", "/weights/", b""),
    ("GET", "/weights/0/STABLE", b""),
]  # fmt: skip
AGENT = [
    *_good(
        agent__orders={"done": 0, "wait_s": 0.0},
        agent__report={
            "processes": [{"start": 1, "exit_code": None, "log_time": 1.0, "offset": 0, "text": "aGVsbG8="}],
            "usage": {"engine0": [1, 2]}, "memory": {"engine0": 3},
        },
        lease={"worker": "rollout", "n": 1, "engine": "engine0", "request": None, "wait_s": 0.0},
        status={"name": "engine0", "pid": 1, "state": "ready", "waiting": None, "progress": {}, "error": None,
                "warnings": []},
    ),
    ("GET", "/agent/input/abc", b""),
    ("GET", "/weights/0/STABLE", b""),
]  # fmt: skip
JOIN = {"ident": "i", "address": "127.0.0.1", "ports": [1, 2], "versions": VERSIONS, "facts": {"a": {"b": 1}},
        "name": None}  # fmt: skip
SAMPLING = {"temperature": 1.0, "top_p": 1.0, "max_new_tokens": 3, "stop_token_ids": [2], "sampling_seed": 1}
ENGINE = [
    *_good(
        generate={"input_ids": [[3, 4, 5]], "sampling_params": [SAMPLING | {"stop": ["7"]}], "rid": ["r"],
                  "return_logprob": True, "draw_offset": [0]},
        abort_request={"abort_all": True},
        pause_generation={"mode": "in_place"},
        continue_generation={},
        update_weights_from_tensor={"load_format": "staged", "weight_version": "1", "flush_cache": True},
    ),
    ("POST", "/generate", json.dumps({"input_ids": [[3, 4]], "sampling_params": [SAMPLING], "stream": True}).encode()),
    ("GET", "/model_info", b""),
    ("GET", "/health_generate", b""),
]  # fmt: skip
INFO = ("GET", "/model_info", b"")


@contextmanager
def _server(app: ASGIApp) -> Iterator[str]:
    server = ServerThread(app, ports.bind()).start()
    try:
        yield server.url
    finally:
        server.stop()


class Hub:
    """With the supervisor that hears its heartbeats, and what a run does with them and with the metrics."""

    def __init__(self, place: Path):
        place.mkdir(parents=True)
        settings = HubSettings(
            batch_groups=LEASES, max_staleness=1, drop_equal_groups=True, lease_timeout_s=60.0, steps=10, eval_every=1,
            engines=("engine0",), gpu_leases=("gpu0",), slots=8,
        )  # fmt: skip
        self.store = HubStore(place / "hub.sqlite", settings)
        self.metrics = place / "metrics.jsonl"
        (place / "weights").mkdir()
        self.store.announce(0, 0)
        self.store.engine_state("engine0", 0, "ready")
        self.store.lease("rollout", LEASES, engine="engine0")
        self.agents = Agents(["b"], run="r", versions=VERSIONS, lease_s=1e9)
        plan: Any = SimpleNamespace(role=Role.TRAINER)
        process: Any = SimpleNamespace(name="trainer", plan=plan)
        self.supervisor = Supervisor([process], SimpleNamespace(), self.store, main_role=Role.TRAINER,  # type: ignore[arg-type]
                                     limits=LaunchTable())  # fmt: skip
        self.app = build_app(
            self.store, TOKEN, metrics_path=self.metrics, on_status=self.supervisor.on_status, agents=self.agents,
            weights_app=self._weights(place / "weights"),
        )  # fmt: skip

    @staticmethod
    def _weights(place: Path) -> ASGIApp:
        from astracli.weights.publish.server import weights_app

        return weights_app(place)

    def understood(self, row: Row) -> Row:
        """As the supervisor looks at it, each half second. Raises where what was taken is not understood."""
        from astracli.report.alerts import Alerts
        from astracli.runs.metrics import Tail, series

        records = Tail(self.metrics).new()
        progress = RunProgress("r", 10)
        progress.feed(records, self.store.state(), self.supervisor.status, "running")
        progress.waits()
        for status in self.supervisor.status.values():
            details(status)
        for evaluation in progress.evals:
            progress.eval_words(evaluation)
        alerts = Alerts()
        for record in records:
            list(alerts.feed(record))
        row.outcome = f"{len(records)} records, {len(series(records, 'loss'))} with a step and a loss"
        return row


@contextmanager
def hub(place: Path) -> Iterator[tuple[Hub, list[Listener]]]:
    """As the processes of a run ask it, as an agent does, and as one that wants to join."""
    from astracli.hub import api

    made = Hub(place)
    with mock.patch.object(api, "MAX_WAIT_S", 0.1), _server(made.app) as url:
        import httpx

        ticket = made.agents.ticket("b")
        joined = httpx.post(f"{url}/agent/join", json=JOIN, headers={"Authorization": f"Bearer {ticket}"})
        token = joined.json()["token"]
        packed = frozenset({"/group"})
        yield made, [
            Listener("hub", url, HUB, binary=packed),
            Listener("hub, an agent's token", url, AGENT, token=token, alive=("POST", "/agent/orders", b'{"done": 0}')),
            Listener("hub, a ticket", url, _good(agent__join=JOIN), token=ticket,
                     alive=("POST", "/agent/join", json.dumps(JOIN).encode())),
        ]  # fmt: skip
    made.store.close()


@contextmanager
def relay(hub_url: str, agent_token: str, place: Path) -> Iterator[Listener]:
    """What the processes of an agent's host ask."""
    from astracli.launch.agent_relay import Beats, relay_app
    from astracli.weights.receive.host_cache import HostCache

    cache = HostCache(hub_url, agent_token, place)
    good = [each for each in AGENT if not each[1].startswith("/agent/")] + [("PUT", "/group", a_group(1))]
    with _server(relay_app(hub_url, agent_token, TOKEN, cache, Beats())) as url:
        beat = next(each for each in good if each[1] == "/status")
        yield Listener("agent's relay", url, good, binary=frozenset({"/group"}), alive=beat)


@contextmanager
def embedded() -> Iterator[Listener]:
    """The bundled model's, at a context of 64 tokens."""
    from astracli.config import recipe_io
    from astracli.data.fetch import BUNDLED_PREFIX, bundled
    from astracli.engines.embedded.engine import EmbeddedEngine
    from astracli.engines.embedded.http import build_app as engine_app
    from astracli.engines.embedded.process import loader
    from astracli.models import registry

    path = bundled(f"{BUNDLED_PREFIX}tiny")
    adapter = registry.resolve(recipe_io.load(RECIPE, []), path)
    engine = EmbeddedEngine(path, loader(adapter, "cpu"), slots=6, context_length=64)
    stop: Any = SimpleNamespace(
        stop_requested=threading.Event(), waiting=lambda reason: None, progress=lambda **fields: None
    )

    def resume() -> None:
        engine.scheduler.call(engine.scheduler.resume)

    loop = threading.Thread(target=engine.loop, args=(stop,), daemon=True)
    loop.start()
    try:
        with _server(engine_app([engine], TOKEN)) as url:
            yield Listener("embedded engine", url, ENGINE, after=resume, alive=INFO)
    finally:
        stop.stop_requested.set()
        loop.join(timeout=5)


@contextmanager
def vllm(stage: Path) -> Iterator[Listener]:
    """The server around vLLM. It serves, as after its first weights; `stage` holds none."""
    stage.mkdir()
    paths = [str(TESTS), str(TESTS / "fake_vllm"), *sys.path]
    try:
        with mock.patch.object(sys, "path", paths), mock.patch.dict(os.environ, ASTRA_STAGE_DIR=str(stage)):
            app, engine = _vllm_app()
            with _server(app) as url:

                def serves() -> None:
                    engine.problem = None
                    _ask(url, "/continue_generation")

                yield Listener("server around vLLM", url, ENGINE, after=serves, alive=INFO)
    finally:
        for name in [name for name in sys.modules if name.partition(".")[0] == "vllm"]:  # it is none
            del sys.modules[name]


def _vllm_app() -> tuple[ASGIApp, Any]:
    """The application and its engine."""
    from astracli.engines.vllm.names import WORKER
    from astracli.engines.vllm.serve import build_app, start

    asked = {"model": "m", "worker_extension_cls": WORKER, "enable_prefix_caching": True, "max_model_len": 64,
             "enable_sleep_mode": True}  # fmt: skip
    engine = start({"engine": asked, "serving": True, "seeded": True, "vocabulary": 32})
    return build_app(engine, TOKEN), engine


def _ask(url: str, path: str) -> None:
    import httpx

    httpx.post(url + path, json={}, headers={"Authorization": f"Bearer {TOKEN}"}, trust_env=False).raise_for_status()


@contextmanager
def all_of(place: Path) -> Iterator[tuple[Hub, list[Listener]]]:
    with hub(place / "hub") as (made, listeners), embedded() as engine, vllm(place / "stage") as other:
        agents = next(one for one in listeners if "agent" in one.name)
        with relay(agents.url, agents.token, place / "cache") as between:
            yield made, [*listeners, between, engine, other]
