"""Messages on stderr to whoever started a command, and text from data made harmless for a terminal."""

from __future__ import annotations

import contextlib
import os
import re
import sys
from collections.abc import Mapping
from contextvars import ContextVar
from typing import Any

TYPED: ContextVar[str] = ContextVar("typed", default="")
"""The command line of this process as a shell reads it; "" where Python code called."""
_ODD = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


def plain(text: str) -> str:
    """`text` with every control character but newline and tab as its escape, `\\x1b`.

    Questions, completions, file names and logs come from anywhere; a terminal would follow what they say: clear itself,
    change its title, write to the clipboard, or show text in another order than it is in.
    """
    return _ODD.sub(lambda found: _escape(found[0]), text)


def plain_values(value: Any) -> Any:
    """The same of every string in plain values."""
    if isinstance(value, str):
        return plain(value)
    if isinstance(value, Mapping):
        return {plain_values(key): plain_values(item) for key, item in value.items()}
    return [plain_values(item) for item in value] if isinstance(value, list | tuple) else value


def plain_json(text: str) -> str:
    """A JSON text in which such characters stand as JSON's own escapes."""
    return re.sub("[\x7f-\x9f\u202a-\u202e\u2066-\u2069]", lambda found: f"\\u{ord(found[0]):04x}", text)


def _escape(character: str) -> str:
    code = ord(character)
    return f"\\x{code:02x}" if code < 256 else f"\\u{code:04x}"


def say(message: str) -> None:
    """Print a line to stderr. Once that cannot be written (`2>&1 | head` has read enough), be silent."""
    try:
        print(plain(message), file=sys.stderr, flush=True)
    except OSError:
        with contextlib.suppress(OSError, ValueError):  # a stand-in for stderr has no descriptor
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stderr.fileno())
