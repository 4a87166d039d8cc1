"""The package is a house of rooms: a module imports from its own room and from those below it, nothing lies outside."""

from __future__ import annotations

import ast
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
ORDER = (
    "__main__",
    "cli",
    "launch",
    "doctor",
    "report",
    "plan",
    "rollout",
    "training",
    "evaluation",
    "backends",
    "engines",
    "hub",
    "envs",
    "rewards",
    "rl",
    "weights",
    "data",
    "adapters",
    "kernels",
    "models",
    "runs",
    "process",
    "machine",
    "config",
    "errors",
)
"""From the user inwards; docs/architecture.md says what each is for. `adapters` lies in a folder of its own."""
AT_THE_TOP = {"__init__", "__main__", "errors"}
"""The only modules that lie in no room."""
UPWARD: dict[tuple[str, str], str] = {}
"""(module, what it imports from a room above its own) -> why that is so for now. This list only shrinks."""

ENGINES_NAMED: dict[tuple[str, str], str] = {
    ("machine/packages.py", "sglang"): "what a machine's document records: packages, by name, of any host",
    ("machine/packages.py", "vllm"): "the same",
}
"""(file, engine that it names) -> why that is so for now. This list only shrinks."""
CLUSTERS = {"slurm", "ray"}
CLUSTERS_NAMED: dict[tuple[str, str], str] = {
    ("config/recipe_run.py", name): "the meaning of launch.hosts tells users what ships" for name in CLUSTERS
}
"""(file, cluster that it names) -> why that is so for now. This list only shrinks."""
WEIGHTS: dict[str, set[str]] = {
    "format": set(),
    "device": {"format"},
    "publish": {"format", "device"},
    "receive": {"format", "device"},
}
"""Part of the room `weights` -> the parts below it."""


def modules() -> dict[str, Path]:
    """Dotted name without `astracli.` -> file, of every module of the package."""
    found = {}
    for folder, prefix in ((ROOT / "astracli", ()), (ROOT / "adapters", ("adapters",))):
        for file in folder.rglob("*.py"):
            parts = (*prefix, *file.relative_to(folder).with_suffix("").parts)
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = file
    return found


def imported(source: str, names: set[str]) -> Iterator[str]:
    """Which of the modules `names` a source imports, at its top, inside functions and for types."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            full = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports name the whole path"
            full = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in full:
            inner = name.removeprefix("astracli.")
            if inner != name:
                yield inner if inner in names else inner.rpartition(".")[0]


def upward(sources: dict[str, str]) -> set[tuple[str, str]]:
    """(module, module of a room above its own that it imports)"""
    rank = {room: place for place, room in enumerate(ORDER)}
    found = set()
    for module, source in sources.items():
        for other in imported(source, set(sources)):
            if module and other and rank[other.split(".")[0]] < rank[module.split(".")[0]]:
                found.add((module, other))
    return found


def test_imports_between_rooms_go_down() -> None:
    found = upward({name: file.read_text(encoding="utf-8") for name, file in modules().items()})
    assert found - UPWARD.keys() == set(), "move what is needed to where it belongs, or the import into a room above"
    assert UPWARD.keys() - found == set(), "no longer needed: take it off the list"


def test_imports_between_the_parts_of_weights_go_down() -> None:
    files = modules()
    parts = {name: name.split(".")[1] for name in files if name.startswith("weights.")}
    assert set(parts.values()) == set(WEIGHTS)
    for module, own in parts.items():
        others = {
            parts[name] for name in imported(files[module].read_text(encoding="utf-8"), set(files)) if name in parts
        }
        assert others <= {own} | WEIGHTS[own], module


def test_a_plan_is_made_without_what_runs_it() -> None:
    files = modules()
    for module in (name for name in files if name.startswith("plan.")):
        rooms = {other.split(".")[0] for other in imported(files[module].read_text(encoding="utf-8"), set(files))}
        assert not rooms & {"launch", "rollout", "training", "evaluation", "hub", "weights"}, module


def test_every_module_lies_in_a_room() -> None:
    at_the_top = {file.stem for file in (ROOT / "astracli").glob("*.py")}
    assert at_the_top == AT_THE_TOP
    rooms = {name.split(".")[0] for name in modules() if name}
    assert rooms == set(ORDER), "a room that is new, or gone: mend ORDER and docs/architecture.md"
    described = (ROOT / "docs" / "architecture.md").read_text().partition("## Rooms")[2].partition("\n## ")[0]
    rows = [line.split("`")[1].rstrip("/") for line in described.splitlines() if line.startswith("| `")]
    assert tuple(rows) == tuple(room for room in ORDER if room not in AT_THE_TOP)


def test_core_names_no_engine() -> None:
    points = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"]["astra.engines"]
    found = set()
    for file in (ROOT / "astracli").rglob("*.py"):
        module = file.relative_to(ROOT / "astracli").as_posix()
        if not module.startswith(tuple(f"engines/{name}/" for name in points)):
            text = file.read_text(encoding="utf-8").lower()
            found |= {(module, name) for name in points if name in text}
    assert found - ENGINES_NAMED.keys() == set(), "ask the engine (astracli/engines/contract.py) instead"
    assert ENGINES_NAMED.keys() - found == set(), "no longer needed: take it off the list"


def test_core_names_no_cluster() -> None:
    points = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"]["astra.clusters"]
    assert points.keys() - {"ssh"} == CLUSTERS
    found = set()
    for file in (ROOT / "astracli").rglob("*.py"):
        module = file.relative_to(ROOT / "astracli").as_posix()
        if not module.startswith("launch/clusters/"):
            words = set(re.findall(r"[a-z]+", file.read_text(encoding="utf-8").lower()))
            found |= {(module, name) for name in CLUSTERS & words}
    assert found == CLUSTERS_NAMED.keys(), "ask the cluster (astracli/launch/clusters/contract.py) instead"


def test_every_kind_of_import_is_seen() -> None:
    sources = {
        "errors": "",
        "config.recipe": "",
        "plan": "",
        "plan.build": "from astracli import errors\nfrom astracli.config.recipe import Recipe",
        "machine.read": "def f():\n    from astracli.plan import build, nothing",
        "runs.find": "import astracli.plan.build as b",
        "hub.store": "if TYPE_CHECKING:\n    from astracli.plan.build import Plan\nfrom astracli import plan",
    }
    assert upward(sources) == {
        ("machine.read", "plan.build"),
        ("machine.read", "plan"),
        ("runs.find", "plan.build"),
        ("hub.store", "plan.build"),
        ("hub.store", "plan"),
    }
