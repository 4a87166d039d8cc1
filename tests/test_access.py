"""Who can reach a run: strangers without its token, pages in a browser, and other machines. Real sockets."""

from __future__ import annotations

import contextlib
import json
import os
import re
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import configs
import httpx
import pytest
from launch_tools import INPUTS
from listeners import beyond_loopback, listening
from machines import facts
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse
from starlette.routing import Route
from test_launch import build, context_of, tiny
from training_tools import spawn

from astracli.config import recipe_io
from astracli.engines.sglang import command
from astracli.errors import RunFailed
from astracli.launch import run
from astracli.launch.configs import RunContext
from astracli.launch.configs import build as build_processes
from astracli.machine.facts import validate
from astracli.plan.types import Command
from astracli.process import connections, open_files, ports
from astracli.process.config import EngineConfig, Role
from astracli.process.server import ServerThread, TokenGuard
from astracli.runs.run_dir import RunDir

TOKEN = "secret"
AUTH = {"Authorization": f"Bearer {TOKEN}"}


async def echo(request: Request) -> PlainTextResponse:
    return PlainTextResponse(await request.body())


def guard() -> TokenGuard:
    app = Starlette(routes=[Route("/", echo, methods=["GET", "POST"])])
    return TokenGuard(app, TOKEN, JSONResponse({"error": "missing or wrong token"}, 401))


@contextmanager
def serving(host: str = "127.0.0.1", name: str | None = None) -> Iterator[ServerThread]:
    running = ServerThread(guard(), ports.bind(host), name).start()
    try:
        yield running
    finally:
        running.stop()


def connect(url: httpx.URL) -> socket.socket:
    return socket.create_connection((url.host, url.port or 0), timeout=10)


def is_closed(sock: socket.socket, wait_s: float = 10.0) -> bool:
    sock.settimeout(wait_s)
    try:
        return sock.recv(1) == b""
    except ConnectionError:
        return True
    except TimeoutError:
        return False


def test_strangers_do_not_use_up_the_connections(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever holds the token gets in however many hold a connection without it, and keeps its own."""
    monkeypatch.setattr(connections, "MOST", 20)
    with serving() as running, ExitStack() as held, httpx.Client(base_url=running.url, headers=AUTH) as worker:
        assert worker.post("/", content=b"first").text == "first"
        url = httpx.URL(running.url)
        strangers = []
        for number in range(120):
            stranger = held.enter_context(connect(url))
            stranger.send(b"POST / HTTP/1.1\r\nHost: x\r\nX-a: ")
            strangers.append(stranger)
            if number % 40 == 0:
                assert httpx.post(running.url, content=b"new", headers=AUTH).text == "new"
        assert all(is_closed(stranger) for stranger in strangers[:100]), "the oldest strangers went"
        assert not is_closed(strangers[-1], 0.1)
        assert worker.post("/", content=b"again").text == "again"


def test_a_request_without_the_token_has_a_time_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections.Guarded, "head_s", 0.3)
    with serving() as running, httpx.Client(base_url=running.url, headers=AUTH) as worker:
        worker.get("/")
        idle, slow = connect(httpx.URL(running.url)), connect(httpx.URL(running.url))
        slow.send(b"POST / HTTP/1.1\r\nHost: ")
        assert is_closed(idle) and is_closed(slow)
        own = connect(httpx.URL(running.url))
        own.send(f"POST / HTTP/1.1\r\nHost: 127.0.0.1\r\nAuthorization: Bearer {TOKEN}\r\n".encode())
        own.send(b"Content-Length: 4\r\n\r\nab")
        time.sleep(0.6)  # a slow body of a request that showed the token is no stranger's
        own.send(b"cd")
        answer = b""
        while not answer.endswith(b"abcd"):
            part = own.recv(4096)
            assert part, answer
            answer += part
        assert worker.get("/").status_code == 200


def test_refused_requests_end_their_connection() -> None:
    with serving() as running:
        for headers in ({}, {"Authorization": "Bearer wrong"}, AUTH | {"Origin": "http://evil.test"}):
            refused = httpx.post(running.url, content=b"x" * 100, headers=headers)
            assert refused.status_code in (401, 403) and refused.headers["connection"] == "close"


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("127.0.0.1:80", 200), ("[::1]:80", 200), ("localhost", 200), ("LOCALHOST:1", 200), ("node-7:80", 200),
        ("evil.test", 421), ("127.0.0.1.evil.test", 421), ("", 421), ("localhost.evil.test:80", 421),
    ],
)  # fmt: skip
def test_a_page_whose_name_points_here_reaches_nothing(host: str, status: int) -> None:
    """DNS rebinding: the browser sends the page's own name as `Host`. The token alone does not let it in."""
    with serving(name="node-7") as running:
        assert httpx.get(running.url, headers=AUTH | {"Host": host}).status_code == status


def test_garbage_on_a_port_is_silent(capfd: pytest.CaptureFixture[str]) -> None:
    with serving() as running:
        for blob in (b"\x16\x03\x01" * 50, b"GET /\xff HTTP/1.1\r\nHost: x\r\n\r\n", b"\x00" * 70_000, b"GET\r\n\r\n"):
            sock = connect(httpx.URL(running.url))
            with contextlib.suppress(ConnectionResetError):  # the server closes what it has not read
                sock.sendall(blob)
                sock.shutdown(socket.SHUT_WR)
                while sock.recv(65536):
                    pass
        upgrade = {"Connection": "upgrade", "Upgrade": "websocket", "Sec-WebSocket-Key": "x" * 22 + "=="}
        assert httpx.get(running.url, headers=upgrade).status_code == 401
        assert httpx.get(running.url, headers=AUTH).status_code == 200
    assert capfd.readouterr() == ("", "")


def test_connections_leave_descriptors_to_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    used = len(os.listdir("/proc/self/fd"))
    for soft, most in ((used + 700, 700 - open_files.RESERVED), (used + 40, 20), (used + 4, connections.FEWEST)):
        monkeypatch.setattr(open_files.resource, "getrlimit", lambda _, soft=soft: (soft, soft))
        assert abs(connections.most_connections() - most) <= 2
    asked: list[Any] = []
    monkeypatch.setattr(open_files.resource, "getrlimit", lambda _: (256, 2048))
    monkeypatch.setattr(open_files.resource, "setrlimit", lambda _, limits: asked.append(limits))
    assert open_files.raise_open_files() == 2048 and asked == [(2048, 2048)]


def test_a_server_on_ipv6_loopback() -> None:
    with serving("::1") as running:
        assert running.url.startswith("http://[::1]:")
        assert httpx.get(running.url, headers=AUTH).status_code == 200


def test_interfaces_by_address() -> None:
    loopback = ports.interface("127.0.0.1")
    assert loopback is not None and loopback.startswith("lo")
    assert ports.interface("localhost") == ports.interface("::1") == loopback
    assert ports.interface("203.0.113.7") is None


def test_two_ranks_listen_on_loopback_alone(tmp_path: Path) -> None:
    """torch's store and gloo's connections, in the environment that a run gives its ranks."""
    processes = {process.name: process for process in build(context_of(tiny(resources__train_ranks=2), tmp_path))}
    own = {name: value for name, value in processes["trainer"].env.items() if "SOCKET" in name}
    assert own == {"GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "=lo", "NCCL_SOCKET_FAMILY": "AF_INET"}
    script = """
        import json, os, sys
        os.environ.update(json.loads(sys.argv[1]))
        sys.path.insert(0, sys.argv[2])
        from listeners import listening
        from astracli.training import fsdp
        ranks = fsdp.join("cpu")
        ranks.barrier()
        print(json.dumps(listening([os.getpid()])))
        ranks.barrier()
        ranks.close()
    """
    found = [json.loads(text) for text in spawn(script, [json.dumps(own), str(Path(__file__).parent)], 2)]
    assert found[0] and found[1], "gloo listens on both"
    assert {address for rank in found for address, _ in rank} == {"127.0.0.1"}


def test_what_listens_is_seen() -> None:
    """The reading of /proc that the test above stands on."""
    with ports.bind("0.0.0.0") as everywhere, ports.bind("127.0.0.1") as here, ports.bind("::1") as six:
        for sock in (everywhere, here, six):
            sock.listen()
        found = {address for address, _ in listening([os.getpid()])}
        assert {"0.0.0.0", "127.0.0.1", "::1"} <= found
        assert ("0.0.0.0", everywhere.getsockname()[1]) in beyond_loopback([os.getpid()])


def test_sglang_listens_where_the_run_does(tmp_path: Path) -> None:
    """Its server at launch.host; its one rank meets itself by a file, not by a store that listens everywhere; NCCL and
    gloo on the interface of that address."""
    config = configs.engine(run_dir=tmp_path, stage_dir=tmp_path / "stage" / "engine0", recipe=tiny(), port=7)
    (package := tmp_path / "sglang" / "srt").mkdir(parents=True)
    (package / "server_args.py").write_text("custom_weight_loader = None")
    with pytest.raises(RunFailed, match="every interface"):
        command.Options(tmp_path / "sglang")
    (package / "environ.py").write_text(f"{command.RENDEZVOUS} = EnvStr(None)")
    options = command.Options(tmp_path / "sglang")
    said = command.arguments(config, tmp_path, options, {})
    assert {"--host=127.0.0.1", "--port=7"} <= set(said) and not [word for word in said if "dist-init" in word]
    store = command.rendezvous(config)[command.RENDEZVOUS]
    assert store.startswith("file:///") and str(tmp_path) in store
    Path(store.removeprefix("file://")).write_text("of an earlier start")
    command.rendezvous(config)
    assert not Path(store.removeprefix("file://")).exists(), "torch would wait for the ranks of that start"
    engine = next(process for process in build(context_of(tiny(), tmp_path)) if process.name == "engine0")
    assert engine.env["NCCL_SOCKET_IFNAME"] == "=lo" and engine.env["GLOO_SOCKET_IFNAME"] == "lo"


SHARED = ("resources.rollout_gpus=1", "resources.train_gpus=1", "resources.share_gpus=true")
LAYOUTS: dict[str, tuple[Command, int, int, tuple[str, ...]]] = {
    "apart": ("train", 2, 141, ("resources.rollout_gpus=1", "resources.train_gpus=1")),
    "several of each": ("train", 4, 141, ("resources.rollout_gpus=2", "resources.train_gpus=2")),
    "side by side": ("train", 1, 141, (*SHARED, "resources.share_mode=side_by_side")),
    "time sharing": ("train", 1, 46, (*SHARED, "resources.share_mode=time_sharing")),
    "supervised": ("sft", 2, 141, ("resources.rollout_gpus=1", "resources.train_gpus=1")),
    "samples": ("rollout", 2, 141, ("resources.rollout_gpus=2",)),
    "evaluation": ("eval", 2, 141, ("resources.rollout_gpus=2",)),
}
SGLANG_LISTENS = re.compile(
    r"--(dist-init-addr|nccl-port|nnodes|grpc|smg-grpc|smg-http|enable-metrics|enable-dp-attention|data-parallel|dp-size"
    r"|tp-size|disaggregation|encoder|engine-info-bootstrap|remote-instance|otlp|api-key|admin-api-key)"
)
"""Options of 0.5.17 by which its processes meet over TCP, serve gRPC, or answer more on the same port; and keys, which
`ps` would show."""


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_is_told_to_listen_at_launch_host(layout: str, host: str, tmp_path: Path) -> None:
    """URLs, ports and environments of all processes, and SGLang's command line; a turn on a GPU is taken at the hub."""
    asked, gpus, memory, sets = LAYOUTS[layout]
    recipe = recipe_io.load("qwen3.5-4b-m2po-delta", (*sets, "rollout.engine=sglang", f"launch.host={host}"))
    plan = run.planned(recipe, asked, validate(facts("9.0", gpus, memory_gib=memory, host_gib=512)))
    assert bool(plan.gpu_leases) == (layout == "time sharing")
    context = RunContext(recipe, plan, RunDir(tmp_path), 1, INPUTS, token="secret")
    with ExitStack() as held:
        processes = build_processes(context, f"http://{'[::1]' if ':' in host else host}:1", held)
    (package := tmp_path / "sglang" / "srt").mkdir(parents=True)
    (package / "server_args.py").write_text("custom_weight_loader = None")
    (package / "environ.py").write_text(f"{command.RENDEZVOUS} = EnvStr(None)")
    for process in processes:
        told = process.config.model_dump_json()
        named = set(re.findall(r"(?:https?|tcp)://(\[[^]]*\]|[^:/\"]+)", told)) - {"huggingface.co"}
        assert named <= {f"[{host}]" if ":" in host else host} and "0.0.0.0" not in told, process.name
        assert process.env.get("MASTER_ADDR", host) == host
        if isinstance(process.config, EngineConfig):
            said = command.arguments(process.config, tmp_path, command.Options(tmp_path / "sglang"), {})
            assert f"--host={host}" in said and f"--port={process.config.port}" in said
            assert [word for word in said if SGLANG_LISTENS.match(word)] == []
        if process.plan.role in (Role.ENGINE, Role.TRAINER):
            assert process.env["NCCL_SOCKET_IFNAME"] == "=lo" and process.env["GLOO_SOCKET_IFNAME"] == "lo"


@pytest.mark.parametrize("host", ["127.0.0.1", "::1", "localhost"])
def test_addresses_of_every_process_are_urls(host: str, tmp_path: Path) -> None:
    recipe = tiny(launch__host=host)
    told: Any = {process.name: process.config for process in build(context_of(recipe, tmp_path))}
    url = httpx.URL(told["rollout"].engines[0].url)
    assert (url.host, url.port) == (host, told["engine0"].port)
