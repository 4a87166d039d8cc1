"""The `verifiers` package: finding it, loading one of its environments, its messages as chat turns, its rows as a file.

As a program it writes the rows that a recipe's `data.source` names:

    python -m astracli.envs.verifiers_package ID ROWS.jsonl [--args JSON] [--split train|eval]

Each row has the chat turns of its prompt, its answer, and its place (`verifiers_row`, `verifiers_split`), by which
`rollout.env = "verifiers"` finds it again with all that the environment itself keeps of it.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from astracli.config.own_code import imported
from astracli.data.turns import RowError, Turn, turns_of
from astracli.errors import AstraError, UserError

RELEASES = "verifiers>=0.1.11,<0.4"
"""Those in which an environment asks a client object (`verifiers.Client`) for each turn."""
ROW, SPLIT = "verifiers_row", "verifiers_split"
SPLITS = ("train", "eval")
INSTALL = f"`pip install 'astracli[verifiers]'`, which is {RELEASES}"


def package() -> Any:
    """The module `verifiers`. Raises UserError when it is missing, or a release without the interface."""
    try:
        found = import_module("verifiers")
        release = str(getattr(found, "__version__", "?"))
        for name in ("Environment", "MultiTurnEnv", "Rubric", "Client", "OverlongPromptError"):
            getattr(found, name)
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "verifiers":
            raise UserError(f"the package verifiers cannot be imported: {error}", INSTALL) from None
        raise UserError('rollout.env = "verifiers" needs the package verifiers', INSTALL) from None
    except (ImportError, AttributeError) as error:
        if "release" in locals():
            raise UserError(
                f"release {release} of verifiers has not the interface of {RELEASES}: {error}", INSTALL
            ) from None
        raise UserError(f"the package verifiers cannot be imported: {error}", INSTALL) from None
    return found


def load(name: str, args: Mapping[str, Any]) -> Any:
    """An environment: `load_environment` of the package of that name, or what `pkg.mod:callable` returns.

    Raises UserError.
    """
    vf = package()
    if os.getcwd() not in sys.path:  # as for an Env that a recipe names
        sys.path.append(os.getcwd())
    with _signals_kept():
        try:
            made = imported(name, f"env.args.id = `{name}`", "pkg.mod:callable") if ":" in name else None
            env = made(**args) if callable(made) else vf.load_environment(name, **args)
        except AstraError:
            raise
        except Exception as error:  # whatever its code raises
            cause = error.__cause__ or error
            raise UserError(
                f"the environment `{name}` of verifiers cannot be loaded: {type(cause).__name__}: {cause}",
                "install its package here, and give what it needs as `env.args.args`",
            ) from None
    if not isinstance(env, vf.MultiTurnEnv) and not hasattr(env, "rollout"):
        raise UserError(f"`{name}` gives a {type(env).__name__}, which is no environment of verifiers")
    return env


@contextlib.contextmanager
def _signals_kept() -> Iterator[None]:
    """The package sets handlers of SIGINT and SIGTERM whenever an environment is made: this process has its own."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def plain(messages: Any) -> list[Turn]:
    """Messages of the package as chat turns that a template takes. Raises RowError for what is no text."""
    if isinstance(messages, str):
        return [{"role": "user", "content": messages}]
    turns = []
    for message in messages:
        if not isinstance(message, Mapping):
            message = message.model_dump(exclude_none=True)
        calls = [_call(call) for call in message.get("tool_calls") or ()]
        kept = {key: message[key] for key in ("role", "content", "tool_call_id") if message.get(key) is not None}
        turns.append({"content": "", **kept, **({"tool_calls": calls} if calls else {})})
    return turns_of(turns) or []


def _call(call: Any) -> dict[str, Any]:
    """A call in OpenAI's form, its arguments as an object, which templates want."""
    call = json.loads(call) if isinstance(call, str) else call
    function = call.get("function") or call
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        with contextlib.suppress(ValueError):
            arguments = json.loads(arguments)
    return {
        "type": "function", "id": call.get("id"), "function": {"name": function.get("name"), "arguments": arguments}
    }  # fmt: skip


def schemas(tools: Any) -> list[dict[str, Any]]:
    """JSON schemas of the package's tools, as chat templates take them."""
    return [
        {
            "type": "function",
            "function": {"name": tool.name, "description": tool.description, "parameters": dict(tool.parameters)},
        }
        for tool in tools or ()
    ]


def dataset(env: Any, split: str) -> Any:
    """The rows of one split. Raises UserError when there are none."""
    try:
        return env.get_dataset() if split == "train" else env.get_eval_dataset()
    except ValueError as error:
        raise UserError(f"the environment has no rows to {split}: {error}", f"`--split {_other(split)}`") from None


def _other(split: str) -> str:
    return SPLITS[SPLITS.index(split) - 1]


def rows(env: Any, split: str) -> Iterator[dict[str, Any]]:
    """What a recipe's data needs of each row. Raises UserError for a prompt that is no text."""
    for place, row in enumerate(dataset(env, split)):
        try:
            turns = plain(row["prompt"])
        except RowError as error:
            raise UserError(f"row {place} of the environment: {error}", "only text can be asked") from None
        yield {"messages": turns, "answer": str(row.get("answer") or ""), ROW: place, SPLIT: split}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m astracli.envs.verifiers_package", description="Write the rows of an environment of verifiers."
    )
    parser.add_argument("id", help="of the environment, or pkg.mod:callable")
    parser.add_argument("rows", type=Path, help="the file to write, .jsonl")
    parser.add_argument("--args", type=json.loads, default={}, help="what it is loaded with, as JSON")
    parser.add_argument("--split", choices=SPLITS, default="train")
    asked = parser.parse_args(arguments)
    try:
        lines = [json.dumps(row, ensure_ascii=False) for row in rows(load(asked.id, asked.args), asked.split)]
    except UserError as error:
        parser.exit(2, f"error: {error.message}\n" + (f"\nhint: {error.hint}\n" if error.hint else ""))
    asked.rows.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    print(f"{len(lines)} rows in {asked.rows}")


if __name__ == "__main__":
    main()
