"""The rewards `code` and `code_share`: a completion's Python program against unit tests, in a sandbox.

Tests stand in the column `data.code.tests`, else in the answer:

- Python text: one test, passed when it runs without an exception; a `check` in it gets the function `entry_point`
- a list of Python texts (assertions), each a test
- `{"inputs": [...], "outputs": [...]}`: what the program reads and writes; with `fn_name`, arguments and results
"""

from __future__ import annotations

import ast
import json
import os
import re
import secrets
import shutil
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from astracli.process import sandbox
from astracli.rewards import code_runner
from astracli.rewards.grading import extraction
from astracli.rewards.scores import Scored, shortened
from astracli.rewards.types import GradeItem, NoScoreError

_BLOCK = re.compile(r"^[ \t]*```[ \t]*([\w+.-]*)[^\n]*\n(.*?)^[ \t]*```[ \t]*$", re.DOTALL | re.MULTILINE)
_PYTHON = ("", "python", "py", "python3")
START_S = 10.0
"""Beside the tests' own time: for the processes to start and to end."""
_OUTPUT_BYTES = 1 << 20


def program(text: str) -> str | None:
    """The last Python block of a completion, without its thinking; None when there is none."""
    blocks = [found[2] for found in _BLOCK.finditer(extraction.without_thinking(text)) if found[1].lower() in _PYTHON]
    return blocks[-1] if blocks else None


def tests_of(item: GradeItem, column: str) -> dict[str, Any]:
    """What the runner is told to try. Raises NoScoreError when the row holds no tests."""
    found: Any = item.row.get(column)
    found = item.answer if found is None else found
    if isinstance(found, str):
        found = _parsed(found)
    if isinstance(found, str) and found.strip():
        return {"sources": [found], "entry_point": item.row.get("entry_point")}
    if isinstance(found, Mapping) and {"inputs", "outputs"} <= found.keys():
        inputs, outputs = found["inputs"], found["outputs"]
        if not isinstance(inputs, list) or not isinstance(outputs, list) or len(inputs) != len(outputs) or not inputs:
            raise NoScoreError("the tests' `inputs` and `outputs` are not two lists of one length")
        return {"inputs": inputs, "outputs": outputs, "fn_name": found.get("fn_name")}
    if isinstance(found, list | tuple) and found and all(isinstance(each, str) for each in found):
        return {"sources": list(found), "setup": str(item.row.get("test_setup_code") or "")}
    raise NoScoreError(
        f"the row has no tests in `{column}` or its answer: Python text, a list of assertions, "
        'or {"inputs": [...], "outputs": [...]}'
    )


def _parsed(text: str) -> Any:
    """Text that holds a list or a mapping, as JSON or as Python writes it; else the text."""
    if text.lstrip()[:1] in ("[", "{"):
        for read in (json.loads, ast.literal_eval):
            try:
                return read(text)
            except (ValueError, SyntaxError, RecursionError, MemoryError):
                continue
    return text


def score(name: str, item: GradeItem, limits: Mapping[str, Any], time_s: float) -> Scored:
    """`limits`: the table `data.code`. `time_s`: for all tests of the completion together."""
    code = program(item.text)
    if code is None:
        return Scored(0.0, "no_answer")
    task = tests_of(item, str(limits["tests"]))
    passed, total, said = run_tests(code, task, limits, time_s)
    share = passed / total
    reward = share if name == "code_share" else float(passed == total)
    return Scored(reward, "right" if passed == total else "wrong", said, {"tests_passed": share})


def run_tests(code: str, task: Mapping[str, Any], limits: Mapping[str, Any], time_s: float) -> tuple[int, int, str]:
    """-> tests passed, tests, and why the others did not."""
    total = len(task.get("sources") or task["inputs"])
    nonce = secrets.token_hex(16)
    folder = tempfile.mkdtemp(prefix="astra-code-")
    try:
        done = sandbox.run(
            [sys.executable, "-I", str(Path(code_runner.__file__))],
            limits=sandbox.Limits(
                time_s=time_s,
                memory_bytes=int(limits["memory_gib"] * (1 << 30)),
                file_bytes=int(limits["file_mb"] * 1_000_000),
                open_files=64,
                processes=limits["processes"],
            ),
            stdin=json.dumps({"code": code, "nonce": nonce, **task}).encode("utf-8", "surrogatepass"),
            env=environment(folder),
            cwd=folder,
            output_bytes=_OUTPUT_BYTES,
        )
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    lines = done.stdout.decode("utf-8", "replace").splitlines()
    passed = {line.split(" ", 1)[1] for line in lines if line.startswith(f"{nonce} ")}
    count = len(passed & {str(number) for number in range(total)})
    if done.ok:
        said = done.stderr.decode("utf-8", "replace")
    else:
        said = f"{done.ending}\n" + done.stderr.decode("utf-8", "replace")
    return count, total, "" if count == total else shortened(said.strip())


def environment(folder: str) -> dict[str, str]:
    """Nothing of this process's own: no token, no proxy, no home."""
    kept = {name: os.environ[name] for name in ("PATH", "LANG", "LC_ALL", "SYSTEMROOT") if name in os.environ}
    return kept | {"HOME": folder, "TMPDIR": folder, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
