"""What `warm` forks: `python -m warm_child FOLDER STDERR_FILE WORDS...` becomes `python WORDS` in that folder.

When it is an `astra` that starts a run, the run's fork server is a fork of it: everything is imported already.
"""

from __future__ import annotations

import contextlib
import os
import runpy
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any

from astracli.envs import registry
from astracli.process import fork_server, forking


def fork_server_here(
    modules: Sequence[str], env: Mapping[str, str], link: int, said: int, close: Sequence[int] = ()
) -> forking.Forked:
    """`forking.start`, without a new interpreter."""
    pid = os.fork()
    if pid:
        return forking.Forked(pid)
    os.setsid()
    for handle in close:
        os.close(handle)
    for target in (1, 2):
        os.dup2(said, target)
    os.environ.clear()
    os.environ.update(env)
    sys.argv = ["fork_server", str(link), ",".join(modules)]
    try:
        fork_server.main()
    finally:
        os._exit(0)


def run_here(command: Sequence[str], *, input: str, **options: Any) -> subprocess.CompletedProcess[str]:
    """`subprocess.run` of `python -P -m MODULE WORDS` with text, by a fork of this process: torch is imported."""
    with contextlib.ExitStack() as held:
        files = [held.enter_context(tempfile.TemporaryFile("w+")) for _ in range(3)]
        files[0].write(input)
        files[0].seek(0)
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                for target, file in enumerate(files):
                    os.dup2(file.fileno(), target)
                sys.stdin, sys.stdout, sys.stderr = files  # type: ignore[assignment]
                sys.argv = [*command[3:]]
                runpy.run_module(command[3], run_name="__main__", alter_sys=True)
                code = 0
            except BaseException:
                traceback.print_exc()
            finally:
                for file in files[1:]:
                    file.flush()
                os._exit(code)
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        for file in files:
            file.seek(0)
        return subprocess.CompletedProcess(command, code, files[1].read(), files[2].read())


ENVIRONMENTS_HERE = SimpleNamespace(run=run_here, TimeoutExpired=subprocess.TimeoutExpired)
"""In the place of `subprocess` in `astracli.envs.registry`: an environment is tried in a fork of who asks."""


def become(folder: str, err: str, *command: str) -> None:
    forking.start = fork_server_here
    registry.subprocess = ENVIRONMENTS_HERE
    safe = command[0] == "-P"
    first, *words = command[safe:]
    os.chdir(folder)
    if err:
        os.dup2(os.open(err, os.O_WRONLY | os.O_APPEND | os.O_CREAT), 2)
    search = [place for place in os.environ.get("PYTHONPATH", "").split(os.pathsep) if place]
    own = {"-c": "", "-m": folder}.get(first, os.path.dirname(os.path.abspath(first)))
    there = sys.path if sys.flags.safe_path else sys.path[1:]
    sys.path[:] = [*([] if safe else [own]), *search, *(place for place in there if place not in search)]
    threads = os.environ.get("OMP_NUM_THREADS", "1")
    if threads.isdigit():
        sys.modules["torch"].set_num_threads(int(threads))
    if first == "-c":
        sys.argv = ["-c", *words[1:]]
        exec(compile(words[0], "<string>", "exec"), {"__name__": "__main__"})
    elif first == "-m":
        sys.argv = list(words)
        runpy.run_module(words[0], run_name="__main__", alter_sys=True)
    else:
        sys.argv = [first, *words]
        runpy.run_path(first, run_name="__main__")


if __name__ == "__main__":
    become(*sys.argv[1:])
