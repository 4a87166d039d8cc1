"""Which environments there are, and the one that a recipe names. Built-ins come in by the same door as strangers.

As a program, `python -m astracli.envs.registry NAME`, it says whether NAME can be used: importing a stranger's module
is left to a process that ends.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import TYPE_CHECKING

from astracli.config import doors
from astracli.config.own_code import imported
from astracli.errors import AstraError, UserError

if TYPE_CHECKING:
    from astracli.envs.contract import Env

GROUP = "astra.envs"
"""Entry points: name -> subclass of `Env`."""
BUILT_IN = "single_turn"
HOW_TO_ADD = (
    f"your own is `pkg.module:Class`, or a package with an entry point in `{GROUP}` that names a subclass of "
    "`astracli.envs.contract.Env`"
)
IMPORT_S = 120.0
"""How long the module of an environment may take to be imported."""


def find(name: str) -> type[Env]:
    """The class that `rollout.env` names. Raises UserError: unknown (with the nearest name), broken, or no Env."""
    from astracli.envs.contract import Env  # needs numpy, which `validate` does without

    found = _imported(name) if ":" in name else _installed(name)
    if not (isinstance(found, type) and issubclass(found, Env)):
        raise UserError(f"rollout.env = `{name}` is no subclass of `astracli.envs.contract.Env`", HOW_TO_ADD)
    return found


def _installed(name: str) -> object:
    try:
        return doors.get(doors.installed(GROUP, object), name, "environment", HOW_TO_ADD)
    except UserError as error:
        raise UserError(f"rollout.env = `{name}`: {error.message}", error.hint) from None


def _imported(spec: str) -> object:
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    return imported(spec, f"rollout.env = `{spec}`", "pkg.module:Class", HOW_TO_ADD)


def validate(name: str) -> None:
    """Raises UserError when a recipe's `rollout.env` cannot be used. A module that is not ours is imported in a
    process."""
    if name == BUILT_IN:
        return
    command = [sys.executable, "-P", "-m", "astracli.envs.registry", name]
    try:
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=IMPORT_S)
        answer = json.loads(done.stdout.splitlines()[-1])
    except subprocess.TimeoutExpired:
        raise UserError(f"rollout.env = `{name}`: its module was not imported in {IMPORT_S:g} s") from None
    except (IndexError, ValueError):
        last = "".join(f": {line}" for line in done.stderr.splitlines()[-1:])
        raise UserError(
            f"rollout.env = `{name}`: its import ended the process (code {done.returncode}){last}"
        ) from None
    if answer is not None:
        raise UserError(*answer)


def main() -> None:
    refusal = None
    try:
        find(sys.argv[1])
    except AstraError as error:
        refusal = [error.message, error.hint]
    print(json.dumps(refusal))


if __name__ == "__main__":
    main()
