"""`astra`: the commands, and the one boundary that turns errors into messages and exit codes."""

from __future__ import annotations

import io
import os
import shlex
import sys
from typing import Annotated

import typer

from astracli.cli import adapters, agent, doctor, evaluate, recipes, rollout, runs, sft, train
from astracli.cli.output import Output
from astracli.errors import AstraError, disk_full, machine_failed, refused_by_system
from astracli.process.console import TYPED

app = typer.Typer(
    name="astra",
    help="Post-train language models with reinforcement learning on verifiable rewards.",
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    no_args_is_help=True,
)
app.command("train")(train.train)
app.command("sft")(sft.sft)
app.command("rollout")(rollout.rollout)
app.command("eval", context_settings={"allow_extra_args": True})(evaluate.evaluate)
app.command("doctor")(doctor.doctor)
app.command("agent")(agent.agent)
GROUPS = {"recipes": recipes.app, "adapters": adapters.app, "runs": runs.app}
for name, group in GROUPS.items():
    app.add_typer(group, name=name)

COMMANDS = ("train", "sft", "rollout", "eval", "doctor", "agent", *GROUPS)


def _version(asked: bool) -> None:
    if asked:
        from importlib.metadata import version

        print(f"astra {version('astracli')}")
        raise typer.Exit()


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_version, is_eager=True)
    ] = False,
) -> None:
    pass


def main(args: list[str] | None = None) -> None:
    """Run `astra` and leave the process with its exit code: 0 done, 1 failed, 2 bad input, 130 interrupted."""
    sys.exit(run(sys.argv[1:] if args is None else args))


def run(args: list[str]) -> int:
    """One command line -> exit code. Errors end here as a message; `ASTRA_DEBUG=1` adds the traceback."""
    typed = TYPED.set(shlex.join(["astra", *args]))
    try:
        return _run(args)
    finally:
        TYPED.reset(typed)


def _run(args: list[str]) -> int:
    console = Output()
    _encode_anything()
    try:
        code = app(args=args, prog_name="astra", standalone_mode=False)
        return code if isinstance(code, int) else 0
    except typer.TyperException as error:
        said = error.format_message()
        if said.startswith("Usage:"):  # a group without a command: its help is the answer
            print(said, file=sys.stderr)
        else:
            console.error(_lower(said), _usage_hint(args, said))
        return error.exit_code
    except AstraError as error:
        _debug()
        console.error(error.message, error.hint)
        return error.exit_code
    except (KeyboardInterrupt, typer.Abort):
        console.error("interrupted")
        return 130
    except Exception as error:
        _debug()
        if full := disk_full(error):
            console.error(full.message, full.hint)
            return full.exit_code
        if isinstance(error, FileNotFoundError) and not _stands_somewhere():
            console.error("the current directory has been removed", "change to one that is there")
            return 2
        if named := refused_by_system(error) or machine_failed(error):
            console.error(named.message, named.hint)
            return named.exit_code
        message = str(error).strip().partition("\n")[0]
        console.error(
            f"unexpected {type(error).__name__}" + (f": {message}" if message else ""),
            "run it again with ASTRA_DEBUG=1 for the traceback; the processes of a run log to RUN_DIR/logs",
        )
        return 1


def _encode_anything() -> None:
    """A terminal or file that cannot show a character gets its escape, `\\xb1`, and not an error."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _stands_somewhere() -> bool:
    try:
        os.getcwd()
    except FileNotFoundError:
        return False
    return True


def _debug() -> None:
    if os.environ.get("ASTRA_DEBUG") == "1":
        import traceback

        traceback.print_exc()


def _lower(text: str) -> str:
    text = text.strip().rstrip(".")
    return text[:1].lower() + text[1:]


def _usage_hint(args: list[str], said: str) -> str:
    """The help page nearest to a command line that did not parse."""
    if "--set" in args and "extra argument" in said and "=" in said:
        from astracli.config.recipe_io import SET_HINT

        return SET_HINT
    command, *more = [*args, ""]
    if command not in COMMANDS:
        return "`astra --help` lists the commands"
    inner = (
        {info.name or getattr(info.callback, "__name__", "") for info in GROUPS[command].registered_commands}
        if command in GROUPS
        else ()
    )
    return f"`astra {' '.join([command, *more[: more[0] in inner]])} --help` shows what it takes"
