"""Which environments there are, and the one that a recipe names. Built-ins come in by the same door as strangers.

As a program, `python -m astracli.envs.registry NAME`, it says whether NAME can be used, and with a document on stdin
whether it can be used with a recipe and a checkpoint: importing a stranger's module is left to a process that ends.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from astracli.config import doors
from astracli.config.own_code import imported
from astracli.errors import AstraError, UserError

if TYPE_CHECKING:
    from astracli.config.recipe import Recipe
    from astracli.envs.contract import Env

GROUP = "astra.envs"
"""Entry points: name -> subclass of `Env`."""
BUILT_IN = "single_turn"
SHIPPED = (BUILT_IN, "tools", "verifiers")
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
    """Raises UserError when there is no such environment. A module that is not ours is imported in a process."""
    if name not in SHIPPED:
        ask(name, "")


def check(
    name: str, recipe: Recipe, folder: Path, messages: Sequence[Mapping[str, Any]], row: Mapping[str, Any] | None = None
) -> list[int] | None:
    """Raises UserError when an environment cannot work with a recipe, the checkpoint in `folder` and a problem that
    asks with these turns, and comes from `row`: its own reasons, and those of its tools and of the chat template.
    Returns the tokens of the problem's prompt; None when the environment did not ask for them, and of the single
    turn."""
    if name == BUILT_IN:
        return None
    document = {"recipe": recipe.model_dump(mode="json"), "folder": str(folder), "messages": [*map(dict, messages)]}
    return ask(name, json.dumps(document | {"row": dict(row or {})}, default=str))


def ask(name: str, document: str) -> list[int] | None:
    """What this module, as a program of its own, says of an environment. Raises UserError for a refusal."""
    command = [sys.executable, "-P", "-m", "astracli.envs.registry", name]
    try:
        done = subprocess.run(command, input=document, capture_output=True, text=True, timeout=IMPORT_S)
        answer = json.loads(done.stdout.splitlines()[-1])
    except subprocess.TimeoutExpired:
        raise UserError(f"rollout.env = `{name}`: its module was not imported in {IMPORT_S:g} s") from None
    except (IndexError, ValueError):
        last = "".join(f": {line}" for line in done.stderr.splitlines()[-1:])
        raise UserError(
            f"rollout.env = `{name}`: its import ended the process (code {done.returncode}){last}"
        ) from None
    if answer["refusal"] is not None:
        raise UserError(*answer["refusal"])
    prompt: list[int] | None = answer["prompt"]
    return prompt


def main() -> None:
    refusal, prompt = None, None
    try:
        kind, document = find(sys.argv[1]), sys.stdin.read()
        if document:
            prompt = _try(kind, **json.loads(document))
    except AstraError as error:
        refusal = [error.message, error.hint]
    print(json.dumps({"refusal": refusal, "prompt": prompt}))


def _try(kind: type[Env], recipe: Any, folder: str, messages: Any, row: Any) -> list[int] | None:
    """Make an Env as a run does, and let it look at a problem; the tokens of the prompt that it asked for."""
    from astracli.config.recipe import Recipe
    from astracli.data.prompts import Problem
    from astracli.envs.contract import EnvSetup
    from astracli.envs.prompt_tokens import PromptTokens
    from astracli.models.adapter import load_tokenizer
    from astracli.models.chat import ChatFormat

    def no_grader(problem: Problem) -> Any:
        raise UserError(f"rollout.env = `{sys.argv[1]}` grades before a run has begun")

    chosen, tokenizer = Recipe.model_validate(recipe), load_tokenizer(Path(folder))
    prompts = PromptTokens(tokenizer, ChatFormat.of(chosen))
    try:
        env = kind(EnvSetup(chosen, tokenizer, no_grader, prompts))
        env.check(Problem("0", str(messages[-1]["content"]), "", messages=tuple(messages), row=row))
        env.close()
    except AstraError:
        raise
    except Exception as error:
        place = traceback.extract_tb(error.__traceback__)[-1]
        raise UserError(
            f"rollout.env = `{sys.argv[1]}` cannot be made: {type(error).__name__}: {error} "
            f"({place.filename}, line {place.lineno})"
        ) from None
    return prompts.latest


if __name__ == "__main__":
    main()
