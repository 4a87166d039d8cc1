"""The process that watches a foreign engine's server: environment, start, output, readiness, health, end.

The server runs in the engine's own environment (`resources.engine`), this process in the run's. What is special about
an engine is in `Foreign`; its `server.py` says what is run.
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
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import psutil

import astracli
from astracli.errors import RunFailed
from astracli.process import ports
from astracli.process.atomic import write_atomic
from astracli.process.children import exit_words
from astracli.process.config import EngineConfig
from astracli.process.health import answers
from astracli.process.worker import Reporter
from astracli.runs.run_dir import RunDir

LOOK_S = 0.2
HEALTH_EVERY_S = 30.0
HEALTH_TIMEOUT_S = 25.0
"""Longer than a server's own patience with its scheduler, which is 20 s in one of them."""
UNHEALTHY = 4
"""Health checks in a row that fail before the engine is given up."""
KEPT_LINES = 400
_BOOT = (
    "import ctypes,os,runpy,signal;"
    "ctypes.CDLL(None).prctl(1,signal.SIGKILL);"  # PR_SET_PDEATHSIG: never outlives the process that watches it
    "os.getppid()==int(os.environ['ASTRA_PARENT']) or os._exit(3);"
    "runpy.run_module(%r,run_name='__main__',alter_sys=True)"
)
_PROBE = """
import importlib.metadata as m, importlib.util as u, json, sys
def version(name):
    try: return m.version(name)
    except m.PackageNotFoundError: return None
needed, recorded, package = json.loads(sys.argv[1])
spec = u.find_spec(package)
print(json.dumps({
    "python": sys.version.split()[0], "executable": sys.executable, "path": [p for p in sys.path if p],
    "missing": [n for n in needed if u.find_spec(n) is None],
    "versions": {n: version(n) for n in recorded},
    "package": list(spec.submodule_search_locations)[0] if spec and spec.submodule_search_locations else None,
}))
"""


@dataclass(frozen=True)
class Foreign:
    """An engine that comes as a package of others, with a server of its own process."""

    title: str
    """As messages say it."""
    package: str
    """Module of the package."""
    module: str
    """What is run as the server, `python -m module`."""
    needed: tuple[str, ...]
    """Modules that the server and our weight loader inside it import."""
    recorded: tuple[str, ...]
    """Distributions whose versions are written down."""
    death: Callable[[str, str, Iterable[str]], RunFailed]
    """(name of the engine, what happened, its last lines) -> the error to raise."""


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
        "PYTHONSAFEPATH": "1",  # a module in the working directory is not imported; Pythons before 3.11 do not know it
        "ASTRA_PARENT": str(os.getpid()),
        "ASTRA_STAGE_DIR": str(config.stage_dir),
        "ASTRA_START_VERSION": "" if config.published else "0",
        "ASTRA_VERIFY_INTERVAL": str(config.recipe.weights.verify_interval),
        "ASTRA_STAGING": config.staging,
        "ASTRA_STAGING_KEPT": "1" if config.recipe.weights.transfer != "delta" else "",
    }


def rank_store(config: EngineConfig) -> str:
    """The URL of a new file by which the ranks of a server meet, without a socket: torch's own store listens on every
    interface, for one rank too."""
    place = RunDir(config.run_dir).stage.resolve() / f"{config.name}-ranks"
    place.mkdir(parents=True, exist_ok=True)
    file = place / "store"
    file.unlink(missing_ok=True)  # of an engine that is started again
    return file.as_uri()


def probe(foreign: Foreign, config: EngineConfig, environment: Mapping[str, str]) -> dict[str, Any]:
    """What the engine's environment holds. It is written to RUN_DIR/environments/NAME.json, and what the run's own
    holds, this process's and the trainer's, to trainer.json beside it. Raises RunFailed."""
    python = config.recipe.resources.engine.python or sys.executable
    place = config.run_dir / "environments"
    place.mkdir(exist_ok=True)
    facts = _ask(foreign, python, environment)
    write_atomic(place / f"{config.name}.json", json.dumps(facts, indent=2) + "\n")
    write_atomic(place / "trainer.json", json.dumps(_ask(foreign, sys.executable, os.environ), indent=2) + "\n")
    if facts["missing"]:
        raise RunFailed(
            f"the engine's environment (`{python}`) lacks {', '.join(facts['missing'])}",
            f"`{python} -m pip install {' '.join(facts['missing'])}`, or name another in resources.engine.python",
        )
    return facts


def _ask(foreign: Foreign, python: str, environment: Mapping[str, str]) -> dict[str, Any]:
    try:
        done = subprocess.run(
            [python, "-c", _PROBE, json.dumps([foreign.needed, foreign.recorded, foreign.package])],
            env=dict(environment), capture_output=True, text=True, timeout=120, check=True,
        )  # fmt: skip
        facts: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    except subprocess.CalledProcessError as error:
        raise RunFailed(f"`{python}` does not run: {error.stderr.strip()[-300:]}", "see resources.engine") from None
    except (OSError, subprocess.TimeoutExpired, ValueError, IndexError) as error:
        raise RunFailed(f"`{python}` does not run: {error}", "see resources.engine.python") from None
    return facts


class Server:
    """The server's process and what it writes."""

    def __init__(
        self, foreign: Foreign, config: EngineConfig, python: str, arguments: list[str], environment: Mapping[str, str]
    ):
        self.foreign = foreign
        self.name = config.name
        self.lines: deque[str] = deque(maxlen=KEPT_LINES)
        self._secret = config.token
        print(f"starting {foreign.module} " + " ".join(arguments), flush=True)
        self._process = subprocess.Popen(
            [python, "-c", _BOOT % foreign.module, *arguments], env=dict(environment), stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace", bufsize=1,
        )  # fmt: skip
        assert self._process.stdout is not None
        self._reader = threading.Thread(target=self._read, args=(self._process.stdout,), name="output", daemon=True)
        self._reader.start()

    def _read(self, stream: IO[str]) -> None:
        """A server may print all its settings, its key among them."""
        for line in stream:
            shown = line.rstrip("\n").replace(self._secret, "***")
            self.lines.append(shown)
            print(shown, flush=True)

    def check(self) -> None:
        """Raise RunFailed with the reason when the server has ended."""
        code = self._process.poll()
        if code is not None:
            self._reader.join(timeout=2.0)
            raise self.died(f"ended with {exit_words(code)}")

    def died(self, what: str) -> RunFailed:
        return self.foreign.death(self.name, what, self.lines)

    def listens_beyond(self, host: str) -> list[str]:
        """Where it, or what it started, listens besides `host` and loopback."""
        try:
            top = psutil.Process(self._process.pid)
            return ports.listens_beyond(host, [top, *top.children(recursive=True)])
        except psutil.Error:
            return []

    def stop(self) -> None:
        """End it and what it started. KILL at once: it holds nothing that is worth keeping."""
        if self._process.poll() is None:
            with contextlib.suppress(psutil.Error):
                for child in psutil.Process(self._process.pid).children(recursive=True):
                    with contextlib.suppress(psutil.Error):
                        child.kill()
            self._process.kill()
            self._process.wait()


def wait_ready(config: EngineConfig, server: Server, reporter: Reporter) -> None:
    """Until the server answers its own health check. Raises RunFailed."""
    began = time.monotonic()
    address = url(config)
    while not reporter.stop_requested.is_set():
        server.check()
        waited = time.monotonic() - began
        if answers(address, config.token, timeout_s=HEALTH_TIMEOUT_S):
            reporter.progress(start_s=round(time.monotonic() - began, 1))
            if found := server.listens_beyond(config.recipe.launch.host):
                reporter.warn(
                    f"{config.name}: {server.foreign.title} listens at {', '.join(found)}, without the run's token, "
                    "where other machines may reach it: keep them out by a firewall"
                )
            return
        if waited > config.recipe.launch.ready_timeout_s:
            limit = config.recipe.launch.ready_timeout_s
            raise server.died(f"was not ready within {limit:g} s")
        reporter.waiting(f"{server.foreign.title} to start ({waited:.0f} s)")
        time.sleep(LOOK_S)


def watch(config: EngineConfig, server: Server, reporter: Reporter) -> None:
    """Until told to stop. Raises RunFailed when the server ends or answers no more."""
    failures, asked = 0, time.monotonic()
    # while the trainer has the GPU nothing is generated; a waiting request would keep memory from being given back
    address = url(config, "model_info" if config.time_sharing else "health_generate")
    while not reporter.stop_requested.wait(LOOK_S):
        server.check()
        if time.monotonic() - asked < HEALTH_EVERY_S:
            continue
        failures = 0 if answers(address, config.token, timeout_s=HEALTH_TIMEOUT_S) else failures + 1
        asked = time.monotonic()
        if failures >= UNHEALTHY:
            raise server.died(f"failed {failures} health checks in a row")


def url(config: EngineConfig, path: str = "health_generate") -> str:
    return f"{ports.url(config.recipe.launch.host, config.port)}/{path}"
