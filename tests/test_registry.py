"""The adapter registry against real entry points: built-ins, a stranger's package, a broken one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from astracli.config.recipe import Recipe
from astracli.errors import UserError
from astracli.models import registry

PROJECT = """
[build-system]
requires = ["setuptools"]
build-backend = "setuptools.build_meta"
[project]
name = "{package}"
version = "2.1"
[project.entry-points."astra.adapters"]
{name} = "{module}:ADAPTER"
[tool.setuptools]
py-modules = ["{module}"]
"""
GOOD = """
from astracli.models.adapter import MemoryShape, ModelAdapter
ADAPTER = ModelAdapter(
    name="olmo", model_types=("olmo9",), summary="a stranger's family",
    load_for_training=lambda path, *, attention: None, load_for_serving=lambda path, *, attention: None,
    memory_shape=lambda config: MemoryShape(7, 8, 9, 1, 2, 0, 42.0), wire_tensors=lambda model: {},
)
"""


def recipe(path: str = "astra:tiny", adapter: str = "auto") -> Recipe:
    return Recipe.model_validate(
        {
            "model": {"path": path, "adapter": adapter},
            "data": {"source": "arithmetic"},
            "train": {"steps": 1},
        }
    )


def made(source: Path, package: str, name: str, module: str, code: str) -> str:
    source.mkdir(parents=True)
    (source / "pyproject.toml").write_text(PROJECT.format(package=package, name=name, module=module))
    (source / f"{module}.py").write_text(code)
    return str(source)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with one good and one broken third-party adapter package, really installed by pip."""
    root = tmp_path_factory.mktemp("strangers")
    broken = "import a_module_that_nobody_has\nADAPTER = 1\n"
    sources = [
        made(root / "good", "astra-olmo", "olmo", "astra_olmo", GOOD),
        made(root / "bad", "astra-broken", "shaky", "astra_broken", broken),
    ]
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run([*command, "--no-index", "--target", str(root / "site"), *sources], check=True, timeout=120)
    return root / "site"


def run(site: Path, code: str) -> dict:
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": str(site)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_built_ins_come_in_by_entry_point_without_torch() -> None:
    code = (
        "import json, sys; from astracli.models import registry\n"
        "found = [registry.to_json(i) for i in registry.installed()]\n"
        "print(json.dumps({'found': found, 'torch': 'torch' in sys.modules}))"
    )
    document = run(Path("/nonexistent"), code)
    assert document["torch"] is False
    by_name = {item["name"]: item for item in document["found"]}
    assert sorted(by_name) == ["generic", "llama", "qwen2", "qwen3", "qwen3_5"]
    assert {item["package"] for item in document["found"]} == {"astracli"}
    assert by_name["qwen3_5"]["model_types"] == ["qwen3_5", "qwen3_5_text"]
    assert by_name["generic"]["model_types"] == []


def test_a_strangers_package_is_resolved_by_type_and_by_name(site: Path) -> None:
    code = """
import json
from astracli.models import registry
from astracli.config.recipe import Recipe
def r(adapter):
    model = {"path": "x/y", "adapter": adapter}
    return Recipe.model_validate({"model": model, "data": {"source": "arithmetic"}, "train": {"steps": 1}})
a, b = registry.resolve(r("auto"), {"model_type": "olmo9"}), registry.resolve(r("olmo"))
listed = [registry.to_json(i) for i in registry.installed()]
print(json.dumps({"same": a is b, "flops": a.memory_shape({}).flops_per_token, "listed": listed}))
"""
    document = run(site, code)
    assert document["same"] and document["flops"] == 42.0
    listed = {item["name"]: item for item in document["listed"]}
    assert listed["olmo"]["package"] == "astra-olmo" and listed["olmo"]["version"] == "2.1"


def test_a_broken_plugin_is_named_and_hurts_nobody_else(site: Path) -> None:
    code = """
import json
from astracli.models import registry
from astracli.errors import UserError
try:
    registry.get("shaky"); text = None
except UserError as error:
    text = [error.message, error.hint]
print(json.dumps({"text": text, "names": [i.name for i in registry.installed()], "qwen": registry.get("qwen3_5").name}))
"""
    document = run(site, code)
    message, hint = document["text"]
    assert message == (
        "adapter `shaky` of package `astra-broken` 2.1 is broken: "
        "ModuleNotFoundError: No module named 'a_module_that_nobody_has'"
    )
    assert "pip uninstall astra-broken" in hint
    assert document["names"] == ["generic", "llama", "olmo", "qwen2", "qwen3", "qwen3_5", "shaky"]
    assert document["qwen"] == "qwen3_5"


@pytest.mark.parametrize(
    ("model_type", "name"),
    [("qwen3_5", "qwen3_5"), ("qwen3_5_text", "qwen3_5"), ("qwen3", "qwen3"), ("llama", "llama")],
)
def test_auto_goes_by_model_type(model_type: str, name: str) -> None:
    assert registry.resolve(recipe(), {"model_type": model_type}).name == name


def test_the_config_may_be_a_checkpoint_directory(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "qwen3"}')
    assert registry.resolve(recipe(), tmp_path).name == "qwen3"


def test_auto_knows_published_ids_before_a_download() -> None:
    assert registry.resolve(recipe("Qwen/Qwen3.5-4B")).name == "qwen3_5"
    assert registry.resolve(recipe("Qwen/Qwen3-1.7B")).name == "qwen3"
    with pytest.raises(UserError, match="cannot tell which adapter `some/model` needs") as error:
        registry.resolve(recipe("some/model"))
    assert "model.adapter=NAME" in str(error.value.hint)


def test_unknown_name_says_what_is_there_the_nearest_and_how_to_add_one() -> None:
    with pytest.raises(UserError) as error:
        registry.resolve(recipe(adapter="qwen35"))
    assert error.value.exit_code == 2
    assert "no adapter `qwen35` is installed" in error.value.message
    assert "generic, llama, qwen2, qwen3, qwen3_5" in error.value.message
    assert "did you mean `qwen3`?" in error.value.message or "did you mean `qwen3_5`?" in error.value.message
    assert "astra.adapters" in str(error.value.hint)


def test_an_adapter_for_another_family_is_refused() -> None:
    with pytest.raises(UserError, match="adapter `llama` is for `llama`, `astra:tiny` is `qwen3_5_text`") as error:
        registry.resolve(recipe(adapter="llama"), {"model_type": "qwen3_5_text"})
    assert error.value.hint == "set model.adapter to `qwen3_5`"


def test_generic_claims_nothing_by_itself() -> None:
    with pytest.raises(UserError, match="no installed adapter claims model_type `gpt2`") as error:
        registry.resolve(recipe(), {"model_type": "gpt2"})
    assert "model.adapter=generic" in str(error.value.hint)
    assert registry.resolve(recipe(adapter="generic"), {"model_type": "gpt2"}).name == "generic"
