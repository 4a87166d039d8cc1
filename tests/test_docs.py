"""The references in docs/ are what the code says."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def test_references_are_up_to_date() -> None:
    command = [sys.executable, str(ROOT / "scripts" / "make_docs.py"), "--check"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr


def test_every_command_and_recipe_key_is_there() -> None:
    from astracli.recipe import Recipe

    cli, recipe = ((ROOT / "docs" / name).read_text() for name in ("cli.md", "recipe.md"))
    assert "--compare" in cli and "### astra runs report" in cli
    for key, field in Recipe.model_fields.items():
        inner = getattr(field.annotation, "model_fields", None)
        for name in inner or [None]:
            wanted = f"`{key}.{name}`" if name else f"`{key}`" if key != "expected" else "`expected.source`"
            assert wanted in recipe or f"[{key}.{name}]" in recipe, wanted
