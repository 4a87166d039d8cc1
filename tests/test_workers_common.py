"""Worker frame: config, heartbeat, exit codes; real processes against a real HTTP server."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import configs
import psutil
import pytest

from astracli.errors import UserError
from astracli.process import transient
from astracli.process.config import EngineAddress, ProcessConfig, Role, SampleFile, TrainerConfig, load_config
from astracli.process.layout import Split
from astracli.process.transient import gpu_failed, link_failed
from astracli.process.worker import Reporter

TOKEN = "run-token"


class FakeHub:
    """Takes /status, remembers every body, answers `stop` as told."""

    def __init__(self) -> None:
        self.bodies: list[dict[str, Any]] = []
        self.stop = False
        self.dead = False
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                if hub.dead:
                    self.close_connection = True
                    return
                allowed = self.headers["Authorization"] == f"Bearer {TOKEN}" and self.path == "/status"
                if allowed:
                    hub.bodies.append(body)
                content = json.dumps({"stop": hub.stop}).encode()
                self.send_response(200 if allowed else 401)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, *_: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()


@pytest.fixture
def hub() -> Iterator[FakeHub]:
    fake = FakeHub()
    yield fake
    fake.close()


def make_config(tmp_path: Path, url: str, **changes: Any) -> TrainerConfig:
    return configs.trainer(**(dict(name="w", run_dir=tmp_path, hub_url=url, token=TOKEN) | changes))


def write_config(tmp_path: Path, config: ProcessConfig) -> Path:
    path = tmp_path / "config.json"
    path.write_text(config.model_dump_json())
    return path


def start_worker(tmp_path: Path, url: str, body: str, **changes: Any) -> subprocess.Popen[str]:
    """A worker process whose `run(config, reporter)` has this body."""
    path = write_config(tmp_path, make_config(tmp_path, url, **changes))
    script = tmp_path / "worker.py"
    lines = "\n".join(f"    {line}" for line in body.splitlines())
    script.write_text(
        "import os, sys, time\nfrom astracli.errors import *\nfrom astracli.process.worker import worker_main\n"
        "from astracli.process.config import TrainerConfig\n"
        f"def run(config, reporter):\n{lines}\nworker_main(run, TrainerConfig)\n"
    )
    return subprocess.Popen([sys.executable, script, path], stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def wait_for(condition: Any, timeout_s: float = 10.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "condition never came true"
        time.sleep(0.02)


ADDRESS = EngineAddress(name="engine0", url="http://e", stage_dir=Path("/stage"))


@pytest.mark.parametrize(
    "config",
    [
        configs.engine(staging="gpu", mem_fraction_static=0.5),
        configs.rollout(engines=(ADDRESS,), gpu_leases=("engine0",), samples=SampleFile(path=Path("/o"), groups=2)),
        configs.trainer(engines=(ADDRESS,), split=Split("host", 0.25, "full"), resume_step=0, leaves=True),
        configs.evaluation(benchmarks={"b": Path("/x"), "c": None}, out=Path("/out")),
    ],
    ids=lambda config: config.role,
)
def test_every_config_survives_its_file(tmp_path: Path, config: ProcessConfig) -> None:
    again = load_config(["worker", str(write_config(tmp_path, config))], type(config))
    assert again == config and again.role is config.role
    assert TOKEN not in repr(config)


@pytest.mark.parametrize("content", ["{", '{"name": "x"}', "[]"])
def test_bad_config_is_the_users(tmp_path: Path, content: str) -> None:
    path = tmp_path / "c.json"
    path.write_text(content)
    with pytest.raises(UserError, match=r"c\.json"):
        load_config(["worker", str(path)], TrainerConfig)
    with pytest.raises(UserError, match="no-such"):
        load_config(["worker", str(tmp_path / "no-such.json")], TrainerConfig)


MISSING = object()


@pytest.mark.parametrize("kind", [configs.engine, configs.rollout, configs.trainer, configs.evaluation])
def test_every_key_is_needed_and_no_other_is_taken(tmp_path: Path, kind: Callable[[], ProcessConfig]) -> None:
    config = kind()
    whole = config.model_dump(mode="json")

    def said(document: dict[str, Any]) -> str:
        path = tmp_path / "c.json"
        path.write_text(json.dumps(document))
        with pytest.raises(UserError) as refused:
            load_config(["worker", str(path)], type(config))
        assert "run-token" not in refused.value.message
        return refused.value.message

    for key in whole.keys() - {"role"}:
        assert f"`{key}`: Field required" in said({k: v for k, v in whole.items() if k != key})
        wrong = said(whole | {key: [1.5]})
        assert f"is no {type(config).__name__}: `{key}" in wrong and ": Input " in wrong
    assert "`extra`: Extra inputs are not permitted" in said(whole | {"extra": {}})
    other = Role.EVAL if config.role is not Role.EVAL else Role.ENGINE
    assert "`role`: Input should be" in said(whole | {"role": other})


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("resume_step", "4", "`resume_step`: Input should be a valid integer"),
        ("host_bytes", MISSING, "`host_bytes`: Field required"),
        ("placement", {}, "`placement`: Extra inputs are not permitted"),
        ("split", {"reference": "gpu", "moments": 0.5}, "`split.moments`: Unexpected keyword argument"),
    ],
)
def test_a_trainer_that_is_told_what_it_cannot_read_ends_with_the_key(
    tmp_path: Path, key: str, value: object, words: str
) -> None:
    document = make_config(tmp_path, "http://127.0.0.1:1").model_dump(mode="json") | {key: value}
    path = tmp_path / "trainer.json"
    path.write_text(json.dumps({k: v for k, v in document.items() if v is not MISSING}))
    command = [sys.executable, "-m", "astracli.training.worker", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (2, f"error: `{path}` is no TrainerConfig: {words}\n")


def test_reporter_tells_state_reason_and_progress(tmp_path: Path, hub: FakeHub) -> None:
    with Reporter(make_config(tmp_path, hub.url), interval_s=0.02) as reporter:
        wait_for(lambda: hub.bodies)
        assert hub.bodies[0]["state"] == "starting" and hub.bodies[0]["pid"] == os.getpid()
        reporter.ready()
        reporter.waiting("3 of 16 groups")
        reporter.progress(step=1)
        reporter.progress(loss=0.5)
        wait_for(lambda: hub.bodies[-1]["progress"] == {"step": 1, "loss": 0.5})
        assert (hub.bodies[-1]["state"], hub.bodies[-1]["waiting"]) == ("ready", "3 of 16 groups")
        assert not reporter.stop_requested.is_set()
        hub.stop = True
        assert reporter.stop_requested.wait(5)
    assert hub.bodies[-1]["state"] == "done"


def test_reporter_says_what_failed(tmp_path: Path, hub: FakeHub) -> None:
    with pytest.raises(RuntimeError), Reporter(make_config(tmp_path, hub.url)):
        raise RuntimeError("out of luck")
    assert (hub.bodies[-1]["state"], hub.bodies[-1]["error"]) == ("failed", "out of luck")


@pytest.mark.parametrize(
    ("body", "code", "words"),
    [
        ("reporter.ready()", 0, ""),
        ("raise UserError('bad value 3', 'use 4')", 2, "error: bad value 3\nhint: use 4\n"),
        ("raise RunFailed('weights do not match')", 1, "error: weights do not match\n"),
        ("1 / 0", 1, "ZeroDivisionError"),
        ("print(os.environ['OMP_NUM_THREADS'], 'torch' in sys.modules, file=sys.stderr)", 0, "2 False\n"),
    ],
)
def test_exit_codes_and_words(tmp_path: Path, hub: FakeHub, body: str, code: int, words: str) -> None:
    worker = start_worker(tmp_path, hub.url, body, threads=2)
    _, stderr = worker.communicate(timeout=60)
    assert worker.returncode == code
    assert words in stderr
    if code != 1 or "Zero" not in words:
        assert "Traceback" not in stderr
    assert hub.bodies[-1]["state"] == ("done" if code == 0 else "failed")


@pytest.mark.parametrize(
    ("said", "words", "hint"),
    [
        ("CUDA out of memory. Tried to allocate 7.83 GiB.", "the GPU ran out of memory: CUDA out", "activation_checkp"),
        ("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate`", "the GPU ran out of memory", "dry-run"),
        ("CUDA error: an illegal memory access was encountered\nCompile with", "reported an error: CUDA err", "Xid"),
        ("NCCL error in: ProcessGroupNCCL.cpp:77, unhandled cuda error", "the GPU reported an error: NCCL", "doctor"),
    ],
)
def test_what_a_gpu_did_to_a_worker_is_its_last_word(
    tmp_path: Path, hub: FakeHub, said: str, words: str, hint: str
) -> None:
    """Wrapped, as a library does it; the stack stands before it."""
    body = f"try:\n    raise RuntimeError({said!r})\nexcept RuntimeError as e:\n    raise ValueError('step 3') from e"
    worker = start_worker(tmp_path, hub.url, body)
    _, stderr = worker.communicate(timeout=60)
    assert worker.returncode == (1 if "ran out of memory" in words else transient.EXIT)
    stack, _, last = stderr.partition("\nerror: ")
    assert "Traceback" in stack and "ValueError: step 3" in stack
    assert words in last.splitlines()[0] and hint in last.partition("\nhint: ")[2]
    assert gpu_failed(RuntimeError("shapes do not match")) is None


@pytest.mark.parametrize(
    ("said", "code"),
    [
        ("CUDA error: device-side assert triggered", 1),
        ("CUDA error: no kernel image is available for execution on the device", 1),
        ("NCCL error in: ProcessGroupNCCL.cpp:77, unhandled cuda error\nCuda failure 2 'out of memory'", 1),
        ("CUDA error: uncorrectable ECC error encountered", transient.EXIT),
        ("NCCL error in: NCCLUtils.cpp:94, remote process exited or there was a network error", transient.EXIT),
    ],
)
def test_which_errors_of_a_gpu_may_pass(said: str, code: int) -> None:
    found = gpu_failed(RuntimeError(said))
    assert found is not None and found.exit_code == code


def test_a_rank_that_lost_another_says_so() -> None:
    gloo = RuntimeError("[../third_party/gloo/gloo/transport/tcp/pair.cc:547] Connection closed by peer [::1]:3811")
    found = link_failed(gloo)
    assert found is not None and found.exit_code == transient.EXIT and found.message.startswith(transient.LINK)
    assert link_failed(ConnectionError("Connection closed by peer")) is None, "of anything else, such as the hub"


def test_term_unwinds_and_exits_143(tmp_path: Path, hub: FakeHub) -> None:
    body = (
        "reporter.ready()\n"
        "try:\n    time.sleep(60)\n"
        "finally:\n    print('cleaned', reporter.stop_requested.is_set(), file=sys.stderr)"
    )
    worker = start_worker(tmp_path, hub.url, body)
    wait_for(lambda: hub.bodies and hub.bodies[-1]["state"] == "ready")
    began = time.monotonic()
    worker.terminate()
    _, stderr = worker.communicate(timeout=60)
    assert worker.returncode == 143 and stderr == "cleaned True\n"
    assert time.monotonic() - began < 30
    assert hub.bodies[-1]["state"] == "done"


def test_the_end_does_not_wait_for_the_interpreter(tmp_path: Path, hub: FakeHub) -> None:
    """Python's own way out takes torch's modules apart for seconds; what is registered there stands in for it."""
    body = "import atexit\natexit.register(time.sleep, 120)\nprint('said')\nreporter.ready()\ntime.sleep(60)"
    worker = start_worker(tmp_path, hub.url, body)
    wait_for(lambda: hub.bodies and hub.bodies[-1]["state"] == "ready")
    began = time.monotonic()
    worker.terminate()
    worker.communicate(timeout=60)
    assert worker.returncode == 143 and time.monotonic() - began < 60
    assert hub.bodies[-1]["state"] == "done"


def test_usr1_prints_stacks_and_goes_on(tmp_path: Path, hub: FakeHub) -> None:
    worker = start_worker(tmp_path, hub.url, "reporter.ready()\nfor _ in range(200):\n    time.sleep(0.02)")
    wait_for(lambda: hub.bodies and hub.bodies[-1]["state"] == "ready")
    worker.send_signal(signal.SIGUSR1)
    _, stderr = worker.communicate(timeout=60)
    assert worker.returncode == 0 and "worker.py" in stderr and "in run" in stderr


def test_worker_ends_when_the_hub_is_gone(tmp_path: Path, hub: FakeHub) -> None:
    path = write_config(tmp_path, make_config(tmp_path, hub.url))
    code = (
        "import sys, time\nfrom astracli.process.worker import Reporter\n"
        "from astracli.process.config import TrainerConfig, load_config\n"
        "with Reporter(load_config(sys.argv, TrainerConfig), interval_s=0.05, give_up_s=0.5) as r:\n"
        "    r.ready()\n    time.sleep(60)\n"
    )
    worker = subprocess.Popen([sys.executable, "-c", code, path], stderr=subprocess.PIPE, text=True)
    wait_for(lambda: hub.bodies and hub.bodies[-1]["state"] == "ready")
    hub.dead = True
    _, stderr = worker.communicate(timeout=60)
    assert worker.returncode == 3
    assert f"the hub at {hub.url} did not answer for 0.5 s" in stderr


def running(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


DAEMON = """
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        os.closerange(0, 64)
        with open(config.run_dir / "pid", "w") as file: file.write(str(os.getpid()))
        time.sleep(600)
    os._exit(0)
os.wait()
while not (config.run_dir / "pid").exists() or not (config.run_dir / "pid").read_text(): time.sleep(0.02)
reporter.ready()
"""


@pytest.mark.skipif(sys.platform != "linux", reason="orphans can be adopted on Linux alone")
@pytest.mark.parametrize("ends", ["by itself", "with an error", "when stopped"])
def test_a_daemon_of_the_users_code_ends_with_its_worker(ends: str, tmp_path: Path, hub: FakeHub) -> None:
    """It has forked twice, has a session of its own and no parent that waits for it."""
    then = {"by itself": "", "with an error": "raise ValueError('x')", "when stopped": "time.sleep(60)"}[ends]
    worker = start_worker(tmp_path, hub.url, DAEMON + then)
    wait_for(lambda: any(body["state"] != "starting" for body in hub.bodies))
    daemon = psutil.Process(int((tmp_path / "pid").read_text()))
    if ends == "when stopped":
        worker.terminate()
    worker.wait(20)
    wait_for(lambda: not daemon.is_running() or daemon.status() == psutil.STATUS_ZOMBIE)
