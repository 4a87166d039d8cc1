"""`astra agent`: this host takes part in a run that another host leads."""

from __future__ import annotations

import contextlib
import sys
import threading
from pathlib import Path
from typing import Annotated

import typer

from astracli.config import reading
from astracli.errors import UserError


def agent(
    url: Annotated[str, typer.Argument(metavar="URL", help="Address of the run's hub, as `astra train` prints it.")],
    token_file: Annotated[
        str, typer.Option("--token-file", metavar="FILE", help="File with this host's token; `-` reads it from stdin.")
    ],
    address: Annotated[
        str | None,
        typer.Option("--address", metavar="ADDRESS", help="Address of this host; default: that which reaches the hub."),
    ] = None,
    name: Annotated[
        str | None,
        typer.Option(
            "--name", metavar="NAME", help="Name of a host that is not in launch.hosts; default: its host name."
        ),
    ] = None,
    folder: Annotated[
        Path | None,
        typer.Option("--dir", metavar="DIR", help="Where logs and staged weights go; default: astra-agent-PID here."),
    ] = None,
    attached: Annotated[
        bool,
        typer.Option(
            "--attached",
            help="For a program that starts agents: leave when stdin ends, keep files in a temporary folder.",
        ),
    ] = False,
    wait: Annotated[
        float,
        typer.Option("--wait", metavar="SECONDS", min=0, help="Time limit for a hub that is not there yet."),
    ] = 600.0,
) -> None:
    """Run the engines and rollout workers of a run on this host.

    `astra train` with launch.hosts prints this command for each host. The processes end with this command, and when
    the hub cannot be reached for launch.agent_lease_s. Ctrl-C or SIGTERM leave the run: what is not finished is given
    back first.
    """
    from astracli.process.signals import signals

    with signals() as interrupted, contextlib.ExitStack() as stack:
        import os
        import socket
        import tempfile

        from astracli.launch.agent import Agent, AgentSetup, default_cache
        from astracli.process.console import say

        address_of_hub, token = _url(url), _token(token_file)
        place = folder if folder is not None else Path(f"astra-agent-{os.getpid()}")
        if attached:
            if folder is None:
                place = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="astra-agent-")))
            threading.Thread(target=_wait_for_end, args=(interrupted,), daemon=True).start()
        setup = AgentSetup(address_of_hub, token, place, default_cache(), name or socket.gethostname(), address, wait)
        if token_file != "-":
            setup.read_again = lambda: _token(token_file)
        reason = Agent(setup, interrupted).run()
        say(f"left: {reason}")
    raise typer.Exit(130 if interrupted.is_set() else 0)


def _wait_for_end(interrupted: threading.Event) -> None:
    """Set the event when standard input ends: whoever started this agent is gone."""
    with contextlib.suppress(OSError, ValueError):
        while sys.stdin.readline():
            continue
    interrupted.set()


def _url(text: str) -> str:
    if not text.startswith("http://") or not text.removeprefix("http://").strip("/"):
        raise UserError(f"`{text}` is no address of a hub", "it has the form http://10.0.0.1:8123")
    return text.rstrip("/")


def _token(file: str) -> str:
    try:
        token = (sys.stdin.readline() if file == "-" else reading.text(Path(file))).strip()
    except (OSError, UnicodeDecodeError) as error:
        said = getattr(error, "strerror", None) or error
        raise UserError(f"cannot read token file `{file}`: {said}", "`astra train` says which file it is") from None
    if not token or not token.isascii() or " " in token:
        raise UserError(f"`{file}` holds no token", "`astra train` says which file it is")
    return token
