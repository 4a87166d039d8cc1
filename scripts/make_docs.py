"""Write the references in docs/ from the code: `python scripts/make_docs.py`; with --check say which are out of date.

docs/cli.md            the --help of every command
docs/recipe.md         every key of a recipe with type, default and meaning, from the comments under the fields
docs/datasets.md       its tables of benchmarks and training sets: size, content hash, licence, where they load from
"""

from __future__ import annotations

import ast
import contextlib
import inspect
import io
import os
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
MADE = "<!-- made by scripts/make_docs.py: change the code, then run it -->\n\n"


BEGIN = "<!-- begin: made by scripts/make_docs.py -->\n"
END = "<!-- end -->"


def help_of(*words: str) -> str:
    """What `astra WORDS --help` prints at 100 columns."""
    from astracli.cli.main import run

    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        code = run([*words, "--help"])
    assert code == 0, f"astra {' '.join(words)} --help ends with {code}"
    return "\n".join(line.rstrip() for line in said.getvalue().strip().splitlines())


def cli() -> str:
    from astracli.cli import main

    groups = {group.name: group.typer_instance.registered_commands for group in main.app.registered_groups}
    parts = ["# Command line\n\n" + MADE + f"```\n{help_of()}\n```"]
    for command in main.COMMANDS:
        parts.append(f"## astra {command}\n\n```\n{help_of(command)}\n```")
        for found in groups.get(command, ()):
            name = found.name or getattr(found.callback, "__name__", "")
            parts.append(f"### astra {command} {name}\n\n```\n{help_of(command, name)}\n```")
    return "\n\n".join(parts) + "\n"


def fields(tree: ast.ClassDef) -> Iterator[tuple[str, str, str, str]]:
    """(key, type, default, meaning) of a table, as the source has them."""
    for i, node in enumerate(tree.body):
        if not isinstance(node, ast.AnnAssign) or not isinstance(node.target, ast.Name):
            continue
        after = tree.body[i + 1] if i + 1 < len(tree.body) else None
        text = ""
        if isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant) and isinstance(after.value.value, str):
            text = " ".join(after.value.value.split())
        yield node.target.id, ast.unparse(node.annotation), _default(node.value), text


def _default(value: ast.expr | None) -> str:
    if isinstance(value, ast.Call) and ast.unparse(value.func) == "Field":
        given = {keyword.arg: keyword.value for keyword in value.keywords}
        value = given.get("default")
    return "required" if value is None else ast.unparse(value)


def recipe() -> str:
    from astracli.config.recipe import Recipe
    from astracli.config.recipe_run import Table
    from astracli.config.schema import Slot

    parts = [
        "# Recipe reference\n\n" + MADE + 'A recipe is a TOML file; `extends = "NAME"` starts from another one, and '
        "`--set table.key=value` changes one value. Unknown keys are refused.\n`astra recipes show NAME` prints one "
        "with every value filled in."
    ]

    def table(kind: type[Table], prefix: str, title: str) -> None:
        rows: list[str] = []
        inner: list[tuple[type[Table], str, str]] = []
        for key, written, default, text in described(kind):
            child = Slot(kind).child(key)
            if child is not None and child.table is not None:
                inner.append((child.table, f"{prefix}{key}.", f"[{prefix}{key}]"))
                continue
            for step, path, shown in (
                (0, "", "[[{}]]"),
                ("NAME", ".NAME", "[{}]"),
            ):  # a list of tables, a table of them
                entry = child.child(step) if child is not None else None
                if entry is not None and entry.table is not None:
                    inner.append((entry.table, f"{prefix}{key}{path}.", shown.format(f"{prefix}{key}{path}")))
                    break
            else:
                takes = child.allowed() if child is not None else ""
                kind_of = takes if " at most " in takes else f"`{_cell(written)}`"
                rows.append(f"| `{prefix}{key}` | {kind_of} | `{default}` | {_cell(text)} |")
        note = inspect.getdoc(kind) if kind.__doc__ and kind.__module__.startswith("astracli.config.") else None
        head = f"## {title}\n\n" + (f"{note}\n\n" if note else "")
        parts.append(head + "| key | type | default | meaning |\n|---|---|---|---|\n" + "\n".join(rows))
        shipped = {name: its for name, its in kind.brought().items() if its.__module__.startswith("astracli.")}
        inner += [(its, f"{prefix}{name}.", f"[{prefix}{name}]") for name, its in shipped.items()]
        for found, path, title in inner:
            table(found, path, title)

    table(Recipe, "", "Top level")
    return "\n\n".join(parts) + "\n"


def described(kind: type) -> list[tuple[str, str, str, str]]:
    """`fields` of a table and of those that it extends, each key once, in the order of the schema."""
    found: dict[str, tuple[str, str, str, str]] = {}
    for part in reversed(kind.__mro__):
        if part.__module__.startswith("astracli."):
            (tree,) = ast.parse(textwrap.dedent(inspect.getsource(part))).body
            assert isinstance(tree, ast.ClassDef)
            found |= {row[0]: row for row in fields(tree)}
    return list(found.values())


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def benchmarks() -> str:
    from astracli.config.benchmarks import BENCHMARKS
    from astracli.data.datasets import TRAINING_SETS

    rows = []
    for name, spec in BENCHMARKS.items():
        counts = " or ".join(map(str, spec.counts))
        hashes = ", ".join(f"`{h}`" for h in spec.hashes) or (
            "-" if spec.hub is None else "not recorded; count checked"
        )
        hashes += "".join(f"; of {count} items not recorded, count checked" for count in spec.counts[1:])
        hub = "generated" if spec.hub is None else f"`{spec.hub.hub_id}` ({spec.hub.split})"
        state = "" if spec.hub is None or spec.hub_loaded else "not run"
        rows.append(f"| `{name}` | {counts} | {spec.samples} | {hashes} | {hub} | {state} | {spec.licence} |")
    sets = [f"| `{name}` | `{found.hub_id}` ({found.split}) |" for name, found in TRAINING_SETS.items()]
    return "\n".join(
        [
            BEGIN,
            "| name | items | samples | content hash | on the Hub | Hub | licence |",
            "|---|---|---|---|---|---|---|",
            *rows,
            "\nTraining sets by name, `data.source`:\n",
            "| name | on the Hub |",
            "|---|---|",
            *sets,
            END,
        ]
    )


def between(page: Path, text: str) -> str:
    """The page with `text` in the place of what stands from `BEGIN` to `END`."""
    whole = page.read_text(encoding="utf-8")
    return whole[: whole.index(BEGIN)] + text + whole[whole.index(END) + len(END) :]


def pages() -> dict[Path, str]:
    os.environ["COLUMNS"] = os.environ["TERMINAL_WIDTH"] = "100"
    docs = ROOT / "docs"
    return {
        docs / "cli.md": cli(),
        docs / "recipe.md": recipe(),
        docs / "datasets.md": between(docs / "datasets.md", benchmarks()),
    }


def main() -> int:
    stale = [path for path, text in pages().items() if not path.is_file() or path.read_text(encoding="utf-8") != text]
    if "--check" in sys.argv[1:]:
        for path in stale:
            print(f"{path.relative_to(ROOT)} is out of date: run python scripts/make_docs.py", file=sys.stderr)
        return 1 if stale else 0
    for path, text in pages().items():
        path.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
