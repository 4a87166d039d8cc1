"""A worker of `pytest -n` that is forked, as its own fork server is, from the one process of the suite that imports
torch and transformers: `fork_workers` in the process that divides the tests, `main` in the worker."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any

import warm


def fork_workers() -> None:
    """From now on execnet's processes are forks, where the system can do that."""
    from execnet import gateway_io

    class Forked(gateway_io.Popen2IO):  # type: ignore[misc]
        """In the place of `Popen2IOMaster`: a Python that executes the line it is sent."""

        def __init__(self, args: list[str], execmodel: Any):
            theirs_in, ours_out = os.pipe()
            ours_in, theirs_out = os.pipe()
            there = warm.server()
            assert there is not None
            self.popen = there.fork("warm_worker", [], os.environ, 2, (theirs_in, theirs_out))
            os.close(theirs_in)
            os.close(theirs_out)
            assert self.popen is not None, there.problem
            super().__init__(os.fdopen(ours_out, "wb"), os.fdopen(ours_in, "rb"), execmodel=execmodel)

        def wait(self) -> int | None:
            assert self.popen is not None
            return self.popen.wait()

        def kill(self) -> None:
            assert self.popen is not None
            os.kill(self.popen.pid, signal.SIGKILL)

    if warm.server() is not None:
        gateway_io.Popen2IOMaster = Forked


def main(read: int, write: int) -> None:
    warm.serve_here(read, write)
    for handle, place in ((read, 0), (write, 1)):
        os.dup2(handle, place)
        os.close(handle)
    exec(eval(sys.stdin.readline()), {"__name__": "__main__"})


if __name__ == "__main__":
    pipes = (int(handle.name) for handle in Path("/proc/self/fd").iterdir() if handle.is_fifo())
    main(*sorted(handle for handle in pipes if handle > 2))
