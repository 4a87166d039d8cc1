"""The child that measures: reads a list of probes on stdin, answers each with one JSON line.

Only the standard library is imported here, so that another environment's interpreter can run this file for its imports
(`imports` needs nothing else); what measures with torch is in `measures` and is imported when it is asked for.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
from typing import Any

Row = dict[str, Any]
"""{"name", "status", "value"}"""


def main() -> None:
    """Whatever a library prints goes to stderr; stdout carries answers only."""
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
    from astracli.doctor import measures

    return measures.MEASURES[kind](**arguments)


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
