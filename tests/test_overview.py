"""The pages that lead a newcomer to the code name files that exist and things that are in them."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
NAMES = [
    "overview",
    "architecture",
    "rollout",
    "trainer",
    "gpu-memory",
    "faults",
    "weight-updates",
    "extending",
    "algorithms",
]
PAGES = ("README.md", *(f"docs/{name}.md" for name in NAMES))


@pytest.mark.parametrize("page", PAGES)
def test_paths_in_pages_exist(page: str) -> None:
    named = re.findall(
        r"`((?:astracli|adapters|examples|scripts|bench|tests|recipes)/[\w./-]*)`", (ROOT / page).read_text()
    )
    for path in named:
        assert (ROOT / path).exists() or path.endswith("NAME.py"), f"{page}: {path}"


def test_the_map_of_the_overview_leads_to_what_it_names() -> None:
    """Each of its rows: a file and a name that the file defines."""
    table = (ROOT / "docs" / "overview.md").read_text().split("## To change X")[1]
    rows = [line.strip("| ").split(" | ") for line in table.splitlines() if re.match(r"\| \d+\. ", line)]
    assert len(rows) == 12
    for task, place, name in rows:
        source = (ROOT / re.findall(r"`([\w/.]+\.py)`", place)[0]).read_text()
        name = name.strip("`")
        assert re.search(rf"^ *(?:def|class) {name}\b|^{name}\b.* = ", source, re.MULTILINE), (task, name)


def test_the_rooms_of_the_architecture_are_those_of_the_package() -> None:
    table = (ROOT / "docs" / "architecture.md").read_text().split("## Rooms")[1].split("## Where")[0]
    named = set(re.findall(r"^\| `(\w+)/`", table, re.MULTILINE))
    rooms = {p.name for p in (ROOT / "astracli").iterdir() if (p / "__init__.py").exists()} | {"adapters"}
    assert named == rooms
