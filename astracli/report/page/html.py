"""RUN_DIR/report.html: one file that needs no network. Its data are JSON; assets/report/*.js draw them."""

from __future__ import annotations

import html
import json
import re
from importlib.resources import files
from pathlib import Path
from typing import Any

from astracli.process.atomic import write_atomic
from astracli.report import samples as report_samples
from astracli.report.page import data as report_data
from astracli.runs.run_dir import RunDir

NAME = "report.html"
_MARK = re.compile(r"@@([A-Z]+)@@")
"""A place in the template."""


def write(run: RunDir) -> Path:
    """Write a run's page; returns its path. Raises UserError when a file of the run is damaged."""
    path = run.path / NAME
    write_atomic(path, page(report_data.document(run), report_samples.packed(run)))
    return path


def page(document: dict[str, Any], samples: str) -> str:
    """The HTML of a document (`report_data.document`) and packed samples (`report_samples.packed`)."""
    parts = {
        "TITLE": html.escape(str(document["run"]["run"])),
        "STYLE": _asset("report.css"),
        "DATA": _script_safe(json.dumps(document, separators=(",", ":"), default=str)),
        "SAMPLES": samples,
        "CHARTS": _asset("charts.js"),
        "SCRIPT": _asset("report.js"),
    }
    return _MARK.sub(lambda mark: parts[mark[1]], _asset("report.html"))


def _script_safe(text: str) -> str:
    """JSON that may stand inside a script element: no `</script>` and no comment opener in it."""
    return text.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")


def _asset(name: str) -> str:
    return (files("astracli") / "assets" / "report" / name).read_text(encoding="utf-8")
