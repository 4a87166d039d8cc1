"""docs/extending.md quotes the example packages as they are, and says something of each of them."""

import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGE = (ROOT / "docs" / "extending.md").read_text(encoding="utf-8")
PLUGINS = ROOT / "examples" / "plugins"


def test_quoted_files_are_the_examples() -> None:
    quoted = re.findall(r"<!-- (\S+) -->\n```\w+\n(.*?)```", PAGE, re.DOTALL)
    assert quoted and PAGE.count("```") == 2 * len(quoted)
    for name, text in quoted:
        assert text.rstrip() == (ROOT / name).read_text(encoding="utf-8").rstrip(), name


def test_every_example_is_quoted_and_its_name_is_how_a_recipe_calls_it() -> None:
    """The entry point's name stands on the page, and its group in the table of what can be added."""
    packages = sorted(PLUGINS.glob("*/pyproject.toml"))
    assert len(packages) == 6
    for package in packages:
        points = tomllib.loads(package.read_text(encoding="utf-8"))["project"]["entry-points"]
        ((group, names),) = points.items()
        assert f"| `{group}` |" in PAGE
        assert all(f"={name}`" in PAGE or f'"{name}"' in PAGE or f" {name}`" in PAGE for name in names), names
        assert any(f"<!-- {file.relative_to(ROOT)} -->" in PAGE for file in package.parent.rglob("*.py")), package
