"""An SGLang engine's process, `python -m astracli.engines.sglang.server CONFIG.json`: starts, watches, ends a server.

The server runs in the engine's own environment (`resources.engine`), this process in the run's: it writes the model
directory, reports readiness, passes the server's output on without the run's token, and explains its end. Under
`astra train` the server starts from made-up weights and gets version 0 like every other version, verified by digest; it
serves nothing before. One server per GPU (SGLang takes weights over HTTP with data parallelism 1 only).
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO, Any

import psutil

import astracli
from astracli.engines.sglang import checkpoint, command, failure_hints, first_requests
from astracli.errors import RunFailed
from astracli.process import ports
from astracli.process.atomic import write_atomic
from astracli.process.children import exit_words
from astracli.process.config import EngineConfig
from astracli.process.health import answers
from astracli.process.worker import Reporter, worker_main
from astracli.runs.run_dir import RunDir

NEEDED = ("sglang", "torch", "numpy", "xxhash", "zstandard")
"""Modules that the server and our weight loader inside it import."""
RECORDED = (
    *("sglang", "torch", "transformers", "triton", "flashinfer-python", "sglang-kernel", "sgl-kernel"),
    *("flash-linear-attention", "numpy", "xxhash", "zstandard"),
)
"""Distributions whose versions are written down."""
LOOK_S = 0.2
HEALTH_EVERY_S = 30.0
HEALTH_TIMEOUT_S = 25.0
"""SGLang's own patience with its scheduler is 20 s."""
UNHEALTHY = 4
"""Health checks in a row that fail before the engine is given up."""
KEPT_LINES = 400
_BOOT = (
    "import ctypes,os,runpy,signal;"
    "ctypes.CDLL(None).prctl(1,signal.SIGKILL);"  # PR_SET_PDEATHSIG: never outlives the process that watches it
    "os.getppid()==int(os.environ['ASTRA_PARENT']) or os._exit(3);"
    "runpy.run_module('sglang.launch_server',run_name='__main__',alter_sys=True)"
)
_PROBE = """
import importlib.metadata as m, importlib.util as u, json, sys
def version(name):
    try: return m.version(name)
    except m.PackageNotFoundError: return None
needed, recorded = json.loads(sys.argv[1])
spec = u.find_spec("sglang")
print(json.dumps({
    "python": sys.version.split()[0], "executable": sys.executable, "path": [p for p in sys.path if p],
    "missing": [n for n in needed if u.find_spec(n) is None],
    "versions": {n: version(n) for n in recorded},
    "sglang": list(spec.submodule_search_locations)[0] if spec and spec.submodule_search_locations else None,
}))
"""


def run(config: EngineConfig, reporter: Reporter) -> None:
    """Serve until told to stop. Raises RunFailed when the server dies, hangs or never becomes ready."""
    from astracli.models import registry

    adapter = registry.resolve(config.recipe, config.model_path)
    environment = engine_environment(config)
    facts = probe(config, environment)
    folder = RunDir(config.run_dir).stage / f"{config.name}-model"
    model = checkpoint.prepare(folder, config.model_path, adapter, weights=not config.published)
    flags = adapter.engine_flags(json.loads((model / "config.json").read_text()))
    arguments = command.arguments(config, model, command.Options(Path(facts["sglang"])), flags)
    server = Server(config, facts["executable"], arguments, environment)
    try:
        _wait_ready(config, server, reporter)
        _first_requests(config, server, reporter)
        reporter.ready()
        _watch(config, server, reporter)
    finally:
        server.stop()


def engine_environment(config: EngineConfig) -> dict[str, str]:
    """The server's environment: this process's, the recipe's `resources.engine.env`, and what our loader reads."""
    asked = dict(config.recipe.resources.engine.env)
    path = RunDir(config.run_dir).stage / f"{config.name}-path"
    path.mkdir(parents=True, exist_ok=True)
    link = path / "astracli"
    if not link.is_symlink():
        # the package alone: the folder it lies in holds the trainer's packages, which the engine must not see
        link.symlink_to(Path(astracli.__file__).resolve().parent)
    before = asked.get("PYTHONPATH") or os.environ.get("PYTHONPATH", "")
    return {
        **os.environ,
        **asked,
        "PYTHONPATH": os.pathsep.join(filter(None, [before, str(path)])),
        **command.rendezvous(config),
        "PYTHONSAFEPATH": "1",  # a module in the working directory is not imported; Pythons before 3.11 do not know it
        "ASTRA_PARENT": str(os.getpid()),
        "ASTRA_STAGE_DIR": str(config.stage_dir),
        "ASTRA_START_VERSION": "" if config.published else "0",
        "ASTRA_VERIFY_INTERVAL": str(config.recipe.weights.verify_interval),
        "ASTRA_STAGING": config.staging,
        "ASTRA_STAGING_KEPT": "1" if config.recipe.weights.transfer != "delta" else "",
    }


def probe(config: EngineConfig, environment: Mapping[str, str]) -> dict[str, Any]:
    """What the engine's environment holds. It is written to RUN_DIR/environments/NAME.json, and what the run's own
    holds, this process's and the trainer's, to trainer.json beside it. Raises RunFailed."""
    python = config.recipe.resources.engine.python or sys.executable
    place = config.run_dir / "environments"
    place.mkdir(exist_ok=True)
    facts = _ask(python, environment)
    write_atomic(place / f"{config.name}.json", json.dumps(facts, indent=2) + "\n")
    write_atomic(place / "trainer.json", json.dumps(_ask(sys.executable, os.environ), indent=2) + "\n")
    if facts["missing"]:
        raise RunFailed(
            f"the engine's environment (`{python}`) lacks {', '.join(facts['missing'])}",
            f"`{python} -m pip install {' '.join(facts['missing'])}`, or name another in resources.engine.python",
        )
    return facts


def _ask(python: str, environment: Mapping[str, str]) -> dict[str, Any]:
    try:
        done = subprocess.run(
            [python, "-c", _PROBE, json.dumps([NEEDED, RECORDED])],
            env=dict(environment), capture_output=True, text=True, timeout=120, check=True,
        )  # fmt: skip
        facts: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    except subprocess.CalledProcessError as error:
        raise RunFailed(f"`{python}` does not run: {error.stderr.strip()[-300:]}", "see resources.engine") from None
    except (OSError, subprocess.TimeoutExpired, ValueError, IndexError) as error:
        raise RunFailed(f"`{python}` does not run: {error}", "see resources.engine.python") from None
    return facts


class Server:
    """The SGLang process and what it writes."""

    def __init__(self, config: EngineConfig, python: str, arguments: list[str], environment: Mapping[str, str]):
        self.name = config.name
        self.lines: deque[str] = deque(maxlen=KEPT_LINES)
        self._secret = config.token
        print("starting sglang.launch_server " + " ".join(arguments), flush=True)
        self._process = subprocess.Popen(
            [python, "-c", _BOOT, *arguments], env=dict(environment), stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace", bufsize=1,
        )  # fmt: skip
        assert self._process.stdout is not None
        self._reader = threading.Thread(target=self._read, args=(self._process.stdout,), name="output", daemon=True)
        self._reader.start()

    def _read(self, stream: IO[str]) -> None:
        """SGLang prints all its settings, its key among them."""
        for line in stream:
            shown = line.rstrip("\n").replace(self._secret, "***")
            self.lines.append(shown)
            print(shown, flush=True)

    def check(self) -> None:
        """Raise RunFailed with the reason when the server has ended."""
        code = self._process.poll()
        if code is not None:
            self._reader.join(timeout=2.0)
            raise failure_hints.death(self.name, f"ended with {exit_words(code)}", self.lines)

    def stop(self) -> None:
        """End it and what it started. KILL at once: asked to end, SGLang first sleeps five seconds for a diagnosis."""
        if self._process.poll() is None:
            with contextlib.suppress(psutil.Error):
                for child in psutil.Process(self._process.pid).children(recursive=True):
                    with contextlib.suppress(psutil.Error):
                        child.kill()
            self._process.kill()
            self._process.wait()


def _wait_ready(config: EngineConfig, server: Server, reporter: Reporter) -> None:
    """Until SGLang answers its own health check, a generated token. Raises RunFailed."""
    began = time.monotonic()
    url = _url(config)
    while not reporter.stop_requested.is_set():
        server.check()
        waited = time.monotonic() - began
        if answers(url, config.token, timeout_s=HEALTH_TIMEOUT_S):
            reporter.progress(start_s=round(time.monotonic() - began, 1))
            return
        if waited > config.recipe.launch.ready_timeout_s:
            limit = config.recipe.launch.ready_timeout_s
            raise failure_hints.death(config.name, f"was not ready within {limit:g} s", server.lines)
        reporter.waiting(f"SGLang to start ({waited:.0f} s)")
        time.sleep(LOOK_S)


def _first_requests(config: EngineConfig, server: Server, reporter: Reporter) -> None:
    """Have the server compile what the run's ways of sampling need. Raises RunFailed."""
    found = first_requests.samplings(config.recipe)
    if not first_requests.need_kernels(found):
        return
    began, limit = time.monotonic(), config.recipe.launch.ready_timeout_s
    url = ports.url(config.recipe.launch.host, config.port)
    with ThreadPoolExecutor(1) as aside:
        asked = aside.submit(first_requests.ask, url, config.token, found, limit)
        while not asked.done() and not reporter.stop_requested.wait(LOOK_S):
            server.check()
            reporter.waiting(f"SGLang to compile its sampling kernels ({time.monotonic() - began:.0f} s)")
        if asked.done() and (wrong := asked.result()):
            server.check()
            raise failure_hints.death(config.name, f"did not answer its first requests: {wrong}", server.lines)
        reporter.progress(sampling_s=round(time.monotonic() - began, 1))


def _watch(config: EngineConfig, server: Server, reporter: Reporter) -> None:
    """Until told to stop. Raises RunFailed when the server ends or answers no more."""
    failures, asked = 0, time.monotonic()
    # while the trainer has the GPU nothing is generated; a waiting request would keep memory from being given back
    url = _url(config, "model_info" if config.time_sharing else "health_generate")
    while not reporter.stop_requested.wait(LOOK_S):
        server.check()
        if time.monotonic() - asked < HEALTH_EVERY_S:
            continue
        failures = 0 if answers(url, config.token, timeout_s=HEALTH_TIMEOUT_S) else failures + 1
        asked = time.monotonic()
        if failures >= UNHEALTHY:
            raise failure_hints.death(config.name, f"failed {failures} health checks in a row", server.lines)


def _url(config: EngineConfig, path: str = "health_generate") -> str:
    return f"{ports.url(config.recipe.launch.host, config.port)}/{path}"


if __name__ == "__main__":
    worker_main(run, EngineConfig)
