"""The wheel holds what the tree holds, the metadata is whole, and CI types what README says."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

from astracli.engines.vllm import names
from astracli.engines.vllm.plugin import TORCH
from astracli.machine.facts import version_tuple

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
SET_UP = ["python3 -m venv .venv && . .venv/bin/activate", 'pip install -e ".[dev,sinks]" -c constraints/cpu.txt']
TEST = "pytest -n 3"
MAPPED = {"adapters": "astracli/adapters", "recipes": "astracli/recipes", "astracli": "astracli"}
"""Top-level folder -> where it is installed."""


def files_of_the_tree() -> set[str]:
    """Installed path of every source file and asset."""
    found = set()
    for folder, place in MAPPED.items():
        for path in (ROOT / folder).rglob("*"):
            inside = path.relative_to(ROOT / folder)
            if path.is_file() and "__pycache__" not in inside.parts and not path.name.startswith("."):
                found.add(f"{place}/{inside.as_posix()}")
    return found


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    """A wheel built from a copy of the tree, without network."""
    copy, out = tmp_path_factory.mktemp("tree"), tmp_path_factory.mktemp("wheel")
    for folder in MAPPED:
        shutil.copytree(ROOT / folder, copy / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy / name)
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-index", "--no-build-isolation"]
    done = subprocess.run([*pip, "--wheel-dir", str(out), str(copy)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (built,) = out.glob("*.whl")
    assert built.name == f"astracli-{PROJECT['project']['version']}-py3-none-any.whl"
    return zipfile.ZipFile(built)


def test_the_wheel_holds_the_tree(wheel: zipfile.ZipFile) -> None:
    packed = {name for name in wheel.namelist() if ".dist-info/" not in name}
    tree = files_of_the_tree()
    assert sorted(tree - packed) == []
    assert sorted(packed - tree) == []
    assert {"astracli/py.typed", "astracli/recipes/_math-m2po.toml", "astracli/adapters/qwen3_5.py"} <= packed


def test_the_wheel_brings_nothing_to_the_top_level(wheel: zipfile.ZipFile) -> None:
    assert {name.partition("/")[0] for name in wheel.namelist()} == {
        "astracli",
        f"astracli-{PROJECT['project']['version']}.dist-info",
    }


def test_licence_and_entry_points(wheel: zipfile.ZipFile) -> None:
    (licence,) = [name for name in wheel.namelist() if name.endswith("licenses/LICENSE")]
    assert b"Version 2.0, January 2004" in wheel.read(licence)
    (points,) = [name for name in wheel.namelist() if name.endswith("entry_points.txt")]
    assert b"astra = astracli.__main__:main" in wheel.read(points)
    metadata = wheel.read(points.replace("entry_points.txt", "METADATA")).decode()
    assert "License-Expression: Apache-2.0" in metadata and "Requires-Python: >=3.11" in metadata


def pins(name: str) -> dict[str, str]:
    lines = (ROOT / "constraints" / name).read_text().splitlines()
    found = dict(line.lower().replace("_", "-").split("==") for line in lines if line and not line.startswith("#"))
    assert all(found.values())
    return found


@pytest.mark.parametrize("name", ["cpu.txt", "cuda.txt", "cuda-torch2.11.txt"])
def test_constraints_pin_every_direct_dependency(name: str) -> None:
    extras = PROJECT["project"]["optional-dependencies"]
    wanted = PROJECT["project"]["dependencies"] + extras["dev"]
    if name == "cpu.txt":
        wanted += extras["tensorboard"] + extras["wandb"] + extras["trackio"]
    else:
        wanted += extras["gpu"] + extras["sglang"]
    pinned, floors = pins(name), {}
    for text in wanted:
        found, least = re.match(r"([\w.-]+)(?:>=([\d.]+))?", text).groups()  # type: ignore[union-attr]
        floors[found.lower().replace("_", "-")] = version_tuple(least or "0")
    assert sorted(floors.keys() - pinned.keys()) == []
    assert {found for found, least in floors.items() if version_tuple(pinned[found]) < least} == set()


def test_constraints_are_the_sets_that_belong_together() -> None:
    cpu, cuda, ran = pins("cpu.txt"), pins("cuda.txt"), pins("cuda-torch2.11.txt")
    assert (cpu["torch"], cpu["transformers"]) == ("2.13.0", "5.12.1")
    assert (cuda["torch"], cuda["transformers"], cuda["triton"]) == ("2.14.1", "5.19.0", "3.8.0")
    assert (cuda["sglang"], cuda["flashinfer-python"]) == ("0.5.23", "0.7.2")
    assert cuda["flash-linear-attention"] == "0.6.0"
    assert (ran["torch"], ran["transformers"], ran["triton"]) == ("2.11.0", "5.12.1", "3.6.0")
    assert (ran["sglang"], ran["flash-linear-attention"], ran["tilelang"]) == ("0.5.17", "0.5.0", "0.1.11")
    for name, release in (("vllm.txt", "0.33.0"), ("vllm-torch2.11.txt", "0.20.2")):
        beside = pins(name)
        assert beside["vllm"] == release and beside["torch"] == TORCH[version_tuple(release)[:2]]
        assert names.old_transformers(beside["transformers"]) is None


FAKE_UV = """#!{python}
import json, os, sys
arguments = sys.argv[1:]
if arguments == ["--version"]:
    sys.exit()
indexes = {{key: os.environ.get(key) for key in ("UV_DEFAULT_INDEX", "UV_FIND_LINKS")}}
with open({log!r}, "a") as log:
    print(json.dumps([arguments, indexes]), file=log)
name = os.path.basename(arguments[arguments.index("--constraint") + 1])
python = arguments[arguments.index("--python-version") + 1]
if (name, python) == {unsolvable!r}:
    sys.exit("error: No solution found")
print(open(arguments[arguments.index("--constraint") + 1]).read() + {more!r})
"""


@pytest.mark.parametrize(
    ("unsolvable", "more", "code", "says"),
    [
        (None, "", 0, "constraints/cuda.txt: astracli[gpu,sglang] on Python 3.11: resolves\n"),
        (("cuda.txt", "3.12"), "", 1, "astracli[dev,gpu,sglang] on Python 3.12: does not resolve\nerror: No solution"),
        (None, "cuda-tile==1.6.0rc9\nbrand-new==1.0\n", 1, "3.11: the file does not pin brand-new==1.0: add them\n"),
    ],
)
def test_the_constraints_are_asked_of_pips_index_alone(
    tmp_path: Path, unsolvable: tuple[str, str] | None, more: str, code: int, says: str
) -> None:
    """A stand-in for uv: what it is asked, and what is made of its answers. CI asks the real one."""
    uv, log = tmp_path / "uv", tmp_path / "log"
    uv.write_text(FAKE_UV.format(python=sys.executable, log=str(log), unsolvable=unsolvable, more=more))
    uv.chmod(0o755)
    env = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "UV_FIND_LINKS": "/elsewhere"}
    env = {key: value for key, value in env.items() if key != "UV_DEFAULT_INDEX"} | {"PIP_INDEX_URL": "file:///index"}
    command = [sys.executable, str(ROOT / "scripts" / "check_constraints.py")]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == code and says in done.stdout, done
    assert ("would not install" in done.stderr) is bool(code)
    asked = [json.loads(line) for line in log.read_text().splitlines()]
    assert {tuple(env.values()) for _, env in asked} == {("file:///index", None)}
    for arguments, _ in asked:
        source = "-" if Path(arguments[4]).name.startswith("vllm") else "pyproject.toml"
        assert arguments[:3] == ["pip", "compile", source] and "--no-config" in arguments
        assert arguments[arguments.index("--only-binary") + 1] == ":all:"
    both = [(Path(a[4]).name, a[6]) for a, _ in asked]
    assert {(name, python) for name in ("cuda.txt", "cuda-torch2.11.txt") for python in ("3.11", "3.12")} <= set(both)


def test_ci_types_what_readme_says() -> None:
    script = (ROOT / ".ci" / "run").read_text()
    commands = [line.strip() for line in script.splitlines() if line.strip() and not line.startswith("#")]
    readme = [line.strip() for line in (ROOT / "README.md").read_text().splitlines()]
    for command in [*SET_UP, TEST]:
        assert command in commands
        assert command in readme
    assert commands[-1] == TEST
    assert [commands.index(command) for command in SET_UP] == sorted(commands.index(command) for command in SET_UP)
    checks = {"ruff check .", "ruff format --check .", "python scripts/check_constraints.py"}
    assert checks | {"set -euo pipefail"} <= set(commands)


def test_ci_names_no_registry() -> None:
    script = (ROOT / ".ci" / "run").read_text()
    assert "://" not in script and "index-url" not in script
    assert (ROOT / ".ci" / "run").stat().st_mode & 0o111 == 0o111
