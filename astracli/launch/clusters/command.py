"""An agent behind a command of this machine that gets the token on its standard input, such as ssh."""

from __future__ import annotations

import contextlib
import os
import subprocess
from collections.abc import Sequence
from pathlib import Path

from astracli.errors import RunFailed
from astracli.launch.clusters.contract import AgentEnd
from astracli.process.children import last_lines

END_S = 10.0
"""For an agent to leave once its standard input has ended; then the command is ended."""


class CommandAgent:
    """The command runs as long as the agent. The agent leaves when its standard input ends: with `end`, with the
    command, and with this process."""

    def __init__(self, words: Sequence[str], token: str, log: Path):
        """Raises RunFailed when the command cannot be started."""
        self._log = log
        with log.open("ab") as out:
            self._position = out.seek(0, os.SEEK_END)
            try:
                # a session of its own: Ctrl-C at the terminal is for the supervisor, which ends agents in order
                self.child = subprocess.Popen(
                    words, stdin=subprocess.PIPE, stdout=out, stderr=subprocess.STDOUT, start_new_session=True
                )
            except OSError as error:
                raise RunFailed(f"`{words[0]}` cannot be started: {(error.strerror or str(error)).lower()}") from None
        assert self.child.stdin is not None
        with contextlib.suppress(OSError):  # one that has ended already says why in its log
            self.child.stdin.write(f"{token}\n".encode())
            self.child.stdin.flush()

    def ended(self) -> AgentEnd | None:
        code = self.child.poll()
        if code is None:
            return None
        lines = self._lines()
        said = next((line for line in reversed(lines) if line.startswith("error: ")), lines[-1] if lines else "")
        return AgentEnd(code, said.removeprefix("error: ") or f"exit code {code}")

    def _lines(self) -> list[str]:
        with self._log.open("rb") as log:
            log.seek(self._position)
            return [line for line in last_lines(log, 20) if line.strip()]

    def end(self) -> None:
        assert self.child.stdin is not None
        with contextlib.suppress(OSError):
            self.child.stdin.close()
        for stop in (lambda: None, self.child.terminate, self.child.kill):
            stop()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.child.wait(END_S)
                return
