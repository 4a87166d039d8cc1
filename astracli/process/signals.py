"""Signals that end a run, as an event."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator


@contextlib.contextmanager
def signals(save: threading.Event | None = None) -> Iterator[threading.Event]:
    """Ctrl-C, TERM and a closed terminal set the event: this process has children to end before itself. USR1 sets
    `save`.

    Entered before anything heavy is imported: a library's bare `except:` would swallow a KeyboardInterrupt.
    """
    interrupted = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield interrupted
        return
    before = {signal.SIGTSTP: signal.signal(signal.SIGTSTP, signal.SIG_IGN)}  # stopped, the hub would lose its workers
    for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(signum) is not signal.SIG_IGN:
            before[signum] = signal.signal(signum, lambda _signum, _frame: interrupted.set())
    if save is not None:
        before[signal.SIGUSR1] = signal.signal(signal.SIGUSR1, lambda _signum, _frame: save.set())
    try:
        yield interrupted
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)
