"""A process that has imported what others need, and forks them: `python -m astracli.process.fork_server FD MODULE...`.

It answers over the socket FD: first that it is ready, then with the process id of each child that `forking.ForkServer`
asks for. It only imports: it computes nothing, starts no thread and touches no GPU, because a fork keeps none of these
alive. A child leads a session of its own, belongs to the process that asked for it, and runs its module as
`python -m MODULE ARGUMENTS` would.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import importlib
import os
import runpy
import signal
import socket
import sys
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

from astracli.process import channel

PR_SET_PDEATHSIG = 1
TITLE_BYTES = 1024
"""Room for the command line that `ps` shows of a child."""


@dataclass(frozen=True)
class Request:
    """What a child is: `python -m module arguments`, with this environment and these open files."""

    module: str
    arguments: Sequence[str]
    env: Mapping[str, str]
    folder: str
    """Its working directory."""
    handles: Sequence[int]
    """A pipe from which it reads a byte when it may begin, its stdout and stderr, and others that stay open in it."""


def main() -> None:
    parent = os.getppid()
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        return
    link = socket.socket(fileno=int(sys.argv[1]))
    for name in sys.argv[2].split(","):
        importlib.import_module(name)
    title("astracli.process.fork_server", sys.argv[1])
    gc.collect()
    gc.freeze()  # what nobody collects is never written to, and stays shared
    problem = why_not()
    channel.send(link, {"problem": problem})
    request = None if problem else serve(link)
    if request is not None:
        link.close()
        become(request)


def why_not() -> str | None:
    """Why nothing can be forked here; None when it can."""
    threads = len(os.listdir("/proc/self/task"))
    if threads > 1:
        return f"an imported module has started {threads - 1} threads"
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        return "an imported module has initialised CUDA"
    return None


def serve(link: socket.socket) -> Request | None:
    """Answer requests until the other side is gone. In a child it returns what the child is."""
    while True:
        try:
            doc, handles = channel.receive_many(link)
        except ConnectionError:
            return None
        request = Request(**doc, handles=handles)
        try:
            pid = fork()
        except OSError as error:
            channel.send(link, {"problem": f"fork: {error.strerror}"})
        else:
            if pid == 0:
                return request
            channel.send(link, {"pid": pid})
        for handle in handles:
            os.close(handle)


def fork() -> int:
    """0 in the child; its process id here. The process between the two ends at once, so that the child's next parent is
    the nearest process above that adopts orphans (`forking.adopting`)."""
    read, write = os.pipe()
    between = os.fork()
    if between == 0:
        with contextlib.suppress(OSError):
            if os.fork() == 0:
                os.setsid()
                os.write(write, os.getpid().to_bytes(8, "little"))
                os.close(read)
                os.close(write)
                return 0
        os._exit(0)
    os.close(write)
    with open(read, "rb", buffering=0) as pipe:
        said = pipe.read(8)
    os.waitpid(between, 0)
    if not said:
        raise OSError(0, "no process could be forked")
    return int.from_bytes(said, "little")


def become(request: Request) -> NoReturn:
    """Run the module as the only thing that this process is for."""
    go, out, *others = request.handles
    if not os.read(go, 1):  # who asked has not adopted it, or is gone
        os._exit(1)
    os.close(go)
    for target in (1, 2):
        os.dup2(out, target)
    os.close(out)
    for handle in others:
        os.set_inheritable(handle, True)
    os.environ.clear()
    os.environ.update(request.env)
    os.chdir(request.folder)
    if not sys.flags.safe_path:
        sys.path[0] = request.folder
    sys.argv = [request.module, *request.arguments]
    title(request.module, *request.arguments)
    code: Any = 0
    try:
        runpy.run_module(request.module, run_name="__main__", alter_sys=True)
    except SystemExit as stop:
        code = stop.code
        if code is not None and not isinstance(code, int):
            print(code, file=sys.stderr)
    except BaseException:
        code = 1
        with contextlib.suppress(OSError):
            traceback.print_exc()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(code if isinstance(code, int) else int(code is not None))


def title(module: str, *arguments: str) -> None:
    """Let `ps` show `python -m MODULE ARGUMENTS`, where the command line of this process has room for it."""
    with open("/proc/self/stat", "rb") as file:
        fields = file.read().rpartition(b")")[2].split()
    start, end = int(fields[45]), int(fields[46])  # 48th and 49th of all: where the command line lies
    words = b"".join(os.fsencode(word) + b"\0" for word in (sys.executable, "-m", module, *arguments))
    if start > 0 and len(words) <= end - start:
        ctypes.memmove(start, words.ljust(end - start, b"\0"), end - start)


if __name__ == "__main__":
    main()
