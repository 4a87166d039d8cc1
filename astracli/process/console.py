"""Messages on stderr to whoever started a command. A closed stderr does not end the run."""

from __future__ import annotations

import contextlib
import os
import sys


def say(message: str) -> None:
    """Print a line to stderr. Once that cannot be written (`2>&1 | head` has read enough), be silent."""
    try:
        print(message, file=sys.stderr, flush=True)
    except OSError:
        with contextlib.suppress(OSError, ValueError):  # a stand-in for stderr has no descriptor
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stderr.fileno())
