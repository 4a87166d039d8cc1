"""What runs in a Ray worker on each node: the agent, as a process of its own that ends with the worker."""

from __future__ import annotations

import subprocess
import sys
from collections import deque
from collections.abc import Sequence

LINES = 200
"""Last lines that are kept of what an agent wrote."""


class AgentActor:
    """`run` returns when the agent has ended. Its other methods are called beside it."""

    def __init__(self) -> None:
        self.child: subprocess.Popen[str] | None = None
        self._stopped = False

    def node(self) -> str:
        """Id of the node where this is."""
        import ray

        return str(ray.get_runtime_context().get_node_id())

    def run(self, words: Sequence[str], token: str) -> tuple[int, list[str]]:
        """`astra WORDS`, with the token on its standard input. -> exit code, last lines. The pipe is open for as long
        as this process lives: an agent leaves when its standard input ends."""
        command = [sys.executable, "-m", "astracli", *words]
        child = self.child = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        assert child.stdin is not None and child.stdout is not None
        child.stdin.write(f"{token}\n")
        child.stdin.flush()
        if self._stopped:
            child.stdin.close()
        lines = deque((line.rstrip() for line in child.stdout), maxlen=LINES)
        return child.wait(), list(lines)

    def stop(self) -> None:
        self._stopped = True
        if self.child is not None and self.child.stdin is not None:
            self.child.stdin.close()
