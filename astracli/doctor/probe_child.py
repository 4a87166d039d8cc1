"""The child that measures: reads a list of probes on stdin, answers each with one JSON line.

Only the standard library is imported here, so that another environment's interpreter can run this file for its imports
(`imports` needs nothing else, `attention` a file beside this one and torch); all other measures are astracli's own.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import sys
from typing import Any

Row = dict[str, Any]
"""{"name", "status", "value"}"""


def main() -> None:
    """Whatever a library prints goes to stderr; stdout carries answers only."""
    if sys.path[0] == os.path.dirname(os.path.abspath(__file__)):
        del sys.path[0]  # run by its path: `kernels` and others beside this file are also names of packages
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for probe in json.load(sys.stdin):
        try:
            rows = run(probe["kind"], probe["arguments"])
        except Exception as error:  # a broken kernel may raise anything; that is the finding
            rows = [{"name": probe["name"], "status": "fail", "value": words(error)}]
        print(json.dumps(rows), file=answers, flush=True)


def run(kind: str, arguments: dict[str, Any]) -> list[Row]:
    if kind == "imports":
        return imports(arguments["wanted"])
    if kind == "attention":
        rows: list[Row] = _beside("attention").attention(**arguments)
        return rows
    from astracli.doctor import measures

    return measures.MEASURES[kind](**arguments)


def _beside(name: str) -> Any:
    """The module in the file of this name next to this one, whether or not astracli can be imported."""
    path = os.path.join(os.path.dirname(os.path.abspath(__file__)), f"{name}.py")
    spec = importlib.util.spec_from_file_location(f"astra_doctor_{name}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def imports(wanted: dict[str, str]) -> list[Row]:
    """`{package: "module:attribute"}`: really imported, and the attribute callable."""
    rows = []
    for package, target in wanted.items():
        module, _, attribute = target.partition(":")
        try:
            good = callable(getattr(importlib.import_module(module), attribute))
            value = f"{attribute} {'is callable' if good else 'is not callable'}"
        except Exception as error:  # an import may raise anything
            good, value = False, words(error)
        rows.append({"name": package, "status": "ok" if good else "fail", "value": value})
    return rows


def words(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]


if __name__ == "__main__":
    main()
