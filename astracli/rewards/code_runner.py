"""Runs a program against its tests: `python -I code_runner.py`, a JSON task on stdin (`code.run_tests`).

For each test that passed it writes a line to what stdout was, `NONCE NUMBER`, which the program cannot print without
having read this process's memory. Every test runs in a fork: what one breaks, another does not see. The one who starts
this limits time, memory, files and processes.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from functools import partial
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any


def main() -> None:
    task = json.loads(sys.stdin.buffer.read().decode("utf-8", "surrogatepass"))
    report = os.dup(1)
    os.set_inheritable(report, False)
    null = os.open(os.devnull, os.O_RDWR)
    os.dup2(null, 0)
    os.dup2(2, 1)
    nonce, code = task.pop("nonce"), task.pop("code")
    if "sources" in task or task.get("fn_name"):
        names: dict[str, Any] = {"__name__": "solution"}
        run(code, "<completion>", names)
        if "sources" in task:
            tests = [partial(source_test, source, task, names) for source in task["sources"]]
        else:
            pairs = zip(task["inputs"], task["outputs"], strict=True)
            tests = [partial(call_test, task["fn_name"], given, wanted, names) for given, wanted in pairs]
        passed = (in_fork(test) for test in tests)
    else:
        passed = (
            program_test(code, given, wanted) for given, wanted in zip(task["inputs"], task["outputs"], strict=True)
        )
    for number, good in enumerate(passed):
        if good:
            os.write(report, f"{nonce} {number}\n".encode())
    os._exit(0)


def run(code: str, name: str, names: dict[str, Any]) -> None:
    """Define what the program defines. Its exception is shown, what it had defined before stays."""
    try:
        exec(compile(code, name, "exec"), names)
    except BaseException as error:
        show(error)


def show(error: BaseException) -> None:
    try:
        sys.stderr.write(f"{type(error).__name__}: {str(error)[:500]}\n")
        sys.stderr.flush()
    except BaseException:
        pass


def in_fork(test: Callable[[], object]) -> bool:
    """Whether a test came to its end in a process of its own."""
    reader, writer = os.pipe()
    secret = os.urandom(16)
    pid = os.fork()
    if pid == 0:
        os.close(reader)
        try:
            test()
            os.write(writer, secret)
        except BaseException as error:
            show(error)
        os._exit(0)
    os.close(writer)
    said = b""
    while chunk := os.read(reader, 64):
        said += chunk[: 64 - len(said)]
        if said == secret:
            break
    os.close(reader)
    os.waitpid(pid, 0)
    return said == secret


def source_test(source: str, task: dict[str, Any], names: dict[str, Any]) -> None:
    if task.get("setup"):
        exec(compile(task["setup"], "<setup>", "exec"), names)
    exec(compile(source, "<test>", "exec"), names)
    if callable(names.get("check")) and task.get("entry_point"):
        names["check"](names[task["entry_point"]])


def call_test(name: str, given: Any, wanted: Any, names: dict[str, Any]) -> None:
    function = names[name] if name in names else getattr(names["Solution"](), name)
    given = given if isinstance(given, list) else [given]
    found = json.loads(json.dumps(function(*given)))  # tuples are lists, keys are text: as the tests hold them
    if found != wanted and [found] != wanted:
        raise AssertionError(f"{name}({', '.join(map(repr, given))[:200]}) is {found!r:.200}, not {wanted!r:.200}")


def program_test(code: str, given: Any, wanted: Any) -> bool:
    """The whole program, with its standard input and output."""
    given = "\n".join(map(str, given)) if isinstance(given, list) else str(given)
    wanted = "\n".join(map(str, wanted)) if isinstance(wanted, list) else str(wanted)
    with tempfile.TemporaryFile() as source, tempfile.TemporaryFile() as target:
        source.write(given.encode("utf-8", "surrogatepass"))
        source.seek(0)
        pid = os.fork()
        if pid == 0:
            os.dup2(source.fileno(), 0)
            os.dup2(target.fileno(), 1)
            sys.stdin = open(0, encoding="utf-8", closefd=False)  # noqa: SIM115
            sys.stdout = open(1, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
            code_of_exit = 0
            try:
                exec(compile(code, "<completion>", "exec"), {"__name__": "__main__"})
            except SystemExit as error:
                code_of_exit = int(error.code not in (None, 0))
            except BaseException as error:
                show(error)
                code_of_exit = 1
            try:
                sys.stdout.flush()
            finally:
                os._exit(code_of_exit)
        _, status = os.waitpid(pid, 0)
        target.seek(0)
        found = target.read(1 << 24).decode("utf-8", "replace")
    if status:
        return False
    if lines(found) != lines(wanted):
        sys.stderr.write(f"for {given!r:.200} it wrote {found!r:.200}, not {wanted!r:.200}\n")
        sys.stderr.flush()
        return False
    return True


def lines(text: str) -> list[str]:
    """Without spaces at the end of lines and empty lines at the end."""
    return "\n".join(line.rstrip() for line in text.splitlines()).rstrip("\n").split("\n")


if __name__ == "__main__":
    main()
