"""What every worker process shares: its resolved config, its heartbeat and wait reasons, its exit codes.

A worker is `python -m astracli.ROLE.worker CONFIG.json`; its module ends in

    if __name__ == "__main__":
        worker_main(run, TrainerConfig)            # run(config: TrainerConfig, reporter: Reporter) -> None

Nothing here imports torch.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import FrameType, TracebackType
from typing import Any, Literal, NoReturn

import httpx

from astracli.errors import AstraError, machine_failed
from astracli.process import intact, sandbox_guard
from astracli.process.config import C, ProcessConfig, load_config
from astracli.process.open_files import raise_open_files
from astracli.process.patience import GONE_S, Patience
from astracli.process.transient import gpu_failed, link_failed

State = Literal["starting", "ready", "done", "failed"]

ORPHAN_EXIT = 3
"""Exit code of a worker whose supervisor is gone."""
LOST_EXIT = 76
"""Stands for the exit code of a process whose host's agent is gone; the process has ended with it."""
TERM_EXIT = 143
"""Exit code of a worker that was told to stop (128 + SIGTERM)."""
THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMEXPR_NUM_THREADS")


@dataclass
class Status:
    """What a supervisor knows of one process: the last word of its `Reporter`, and its starts."""

    state: str = "starting"
    waiting: str | None = None
    progress: Mapping[str, Any] = field(default_factory=dict)
    heard: float | None = None
    """Monotonic time of the last heartbeat; None before the first."""
    error: str | None = None
    """Why it ends: its log may lie on the disk that is full."""
    restarts: int = 0
    started: float = field(default_factory=time.monotonic)

    def words(self) -> str:
        """What it waits for, or its state."""
        if self.waiting:
            return self.waiting if self.waiting.startswith("waiting") else f"waiting for {self.waiting}"
        return self.state if self.heard is not None else "has not reported yet"


class Reporter:
    """Tells the hub each second that this process lives, and what it waits for. A context manager.

    The heartbeat runs in a daemon thread. It ends the process with `ORPHAN_EXIT`, so that no orphan lives on, when the
    process that started this one is gone, when nobody listens at the hub's address for `give_up_s` seconds, or when the
    hub takes connections and answers none for `patience.SILENT_S`: its process is there and stands still.
    """

    def __init__(self, config: ProcessConfig, *, interval_s: float = 1.0, give_up_s: float = GONE_S):
        self.stop_requested = threading.Event()
        """Set when the hub asks for a stop, or on SIGTERM: finish what you do and return."""
        self.save_requested = threading.Event()
        """Set when the hub asks for a checkpoint and then a stop: of the trainer."""
        self._config = config
        self._interval_s = interval_s
        self._give_up_s = give_up_s
        headers = {"Authorization": f"Bearer {config.token}", "Content-Type": "application/json"}
        self._http = httpx.Client(
            base_url=config.hub_url, headers=headers, timeout=5.0, trust_env=False, event_hooks=intact.hooks()
        )
        self._parent = os.getppid()
        self._state: State = "starting"
        self._waiting: str | None = None
        self._progress: dict[str, Any] = {}
        self._error: str | None = None
        self._warnings: list[str] = []
        self._lock = threading.Lock()
        self._wake = threading.Event()
        self._closed = threading.Event()
        self._thread: threading.Thread | None = None

    def ready(self) -> None:
        """This process can do its work now."""
        with self._lock:
            self._state = "ready"
            self._waiting = None
        self._wake.set()

    def waiting(self, reason: str | None) -> None:
        """What this process waits for, in words (`3 of 16 groups`); None when it works."""
        with self._lock:
            self._waiting = reason

    def progress(self, **fields: Any) -> None:
        """Merge figures into what the terminal shows for this process (step=12, tokens_per_s=210.0)."""
        with self._lock:
            self._progress |= fields

    def warn(self, message: str) -> None:
        """A message for the terminal and the summary, once; it may have several lines. It also goes to the log."""
        print(f"warning: {message}", file=sys.stderr, flush=True)
        with self._lock:
            self._warnings.append(message)
        self._wake.set()

    def __enter__(self) -> Reporter:
        self._thread = threading.Thread(target=self._beat, name="reporter", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        clean = kind is None or (isinstance(error, SystemExit) and error.code in (0, None, TERM_EXIT))
        with self._lock:
            self._state = "done" if clean else "failed"
            self._waiting = None
            if not clean and error is not None:
                known = error if isinstance(error, AstraError) else machine_failed(error) or error
                self._error = str(known) or type(error).__name__
        self._closed.set()
        self._wake.set()
        if self._thread is not None:
            self._thread.join(timeout=3.0)

    def _beat(self) -> None:
        patience = Patience(self._give_up_s)
        while True:
            closing = self._closed.is_set()
            if os.getppid() != self._parent:
                _leave("the supervisor is gone")
            try:
                self._post()
                patience = Patience(self._give_up_s)
            except (httpx.TransportError, ValueError) as error:
                if (waited := patience.exhausted(error)) is not None:
                    _leave(f"the hub at {self._config.hub_url} did not answer for {waited:g} s")
            if closing:
                return
            self._wake.wait(self._interval_s)
            self._wake.clear()

    def _post(self) -> None:
        """One heartbeat. Raises httpx.TransportError or ValueError when the hub could not be reached."""
        with self._lock:
            body: dict[str, Any] = {
                "name": self._config.name,
                "pid": os.getpid(),
                "state": self._state,
                "waiting": self._waiting,
                "progress": dict(self._progress),
            }
            if self._error:
                body["error"] = self._error
            if told := list(self._warnings):
                body["warnings"] = told
        reply = self._http.post("/status", content=json.dumps(body, default=str))
        if reply.status_code >= 400:
            raise ValueError(f"the hub refused a heartbeat: {reply.status_code}")
        said = reply.json()
        if said.get("stop"):
            self.stop_requested.set()
        if said.get("save"):
            self.save_requested.set()
        with self._lock:
            del self._warnings[: len(told)]


def _leave(reason: str) -> None:
    print(f"error: {reason}, this process ends", file=sys.stderr, flush=True)
    sandbox_guard.kill_below(os.getpid())
    os._exit(ORPHAN_EXIT)


def set_threads(threads: int) -> None:
    """Bound this process's CPU threads, for libraries that are still to be imported and for a torch that is there."""
    for variable in THREAD_VARIABLES:
        os.environ[variable] = str(threads)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(threads)


def worker_main(fn: Callable[[C, Reporter], None], kind: type[C]) -> None:
    """Body of a worker's `__main__`: load its config of that kind, report, run `fn`, end with the right exit code.

    0 done, 1 failed, 75 failed in a way that may pass (`transient`), 2 bad input, 143 told to stop. SIGTERM sets
    `reporter.stop_requested` and unwinds the main thread with SystemExit, so that `finally` blocks run. SIGUSR1 prints
    every thread's stack to stderr and goes on. Processes that code of the user's has left behind (an environment's
    daemon) stay below this one, and end with it.
    """
    sandbox_guard.prctl(sandbox_guard.PR_SET_CHILD_SUBREAPER, 1)
    try:
        config = load_config(sys.argv, kind)
    except AstraError as error:
        sys.exit(_explain(error))
    set_threads(config.threads)
    raise_open_files()
    with contextlib.suppress(AttributeError, ValueError):
        faulthandler.register(signal.SIGUSR1, all_threads=True)
    reporter = Reporter(config)

    def on_term(_signum: int, _frame: FrameType | None) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        reporter.stop_requested.set()
        raise SystemExit(TERM_EXIT)

    signal.signal(signal.SIGTERM, on_term)
    _end(_run(fn, config, reporter))


def _end(code: int) -> NoReturn:
    """Leave at once. Everything of ours is closed by now; what Python would still do, taking torch's modules apart one
    by one, costs seconds on a busy machine and would make a Ctrl-C late."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    sandbox_guard.kill_below(os.getpid())
    os._exit(code)


def _run(fn: Callable[[C, Reporter], None], config: C, reporter: Reporter) -> int:
    try:
        with reporter:
            fn(config, reporter)
        return 0
    except AstraError as error:
        return _explain(error)
    except KeyboardInterrupt:
        return 130
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except BaseException as error:
        if full := machine_failed(error):
            return _explain(full)
        with contextlib.suppress(OSError):
            traceback.print_exc()
        failed = gpu_failed(error) or link_failed(error)
        return _explain(failed) if failed else 1


def _explain(error: AstraError) -> int:
    """The worker's only mapping from an error to words and an exit code."""
    with contextlib.suppress(OSError):  # its log is on a full disk: the reporter has told the supervisor
        print(f"error: {error.message}", file=sys.stderr)
        if error.hint:
            print(f"hint: {error.hint}", file=sys.stderr)
        sys.stderr.flush()
    return error.exit_code
