"""The references in docs/ are what the code says, and what the how-tos show works."""

import ast
import json
import os
import re
import tomllib
from pathlib import Path

import warm

ROOT = Path(__file__).resolve().parent.parent


def test_references_are_up_to_date() -> None:
    done = warm.run([str(ROOT / "scripts" / "make_docs.py"), "--check"], cwd=ROOT)
    assert done.returncode == 0, done.stderr


def test_every_command_and_recipe_key_is_there() -> None:
    from astracli.config.recipe import Recipe

    cli, recipe = ((ROOT / "docs" / name).read_text() for name in ("cli.md", "recipe.md"))
    assert "--compare" in cli and "### astra runs report" in cli
    for key, field in Recipe.model_fields.items():
        inner = getattr(field.annotation, "model_fields", None)
        for name in inner or [None]:
            wanted = f"`{key}.{name}`" if name else f"`{key}`" if key != "expected" else "`expected.source`"
            assert wanted in recipe or f"[{key}.{name}]" in recipe, wanted


def said_by_the_code() -> str:
    """Every string constant of the package, the constant parts of formatted ones joined by `...`."""
    found = []
    for file in (ROOT / "astracli").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                found.append("".join(str(p.value) if isinstance(p, ast.Constant) else "..." for p in node.values))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return "\n".join(found).replace("`", "")


def test_troubleshooting_quotes_what_the_code_says() -> None:
    """Messages in the first column, cut at their values, stand in the code; renamed ones must be renamed here."""
    said = said_by_the_code()
    rows = [line.split(" | ")[0] for line in (ROOT / "docs" / "troubleshooting.md").read_text().splitlines()]
    quoted = [text for row in rows if row.startswith("| ") for text in re.findall(r"`([^`]*(?:\.\.\.| )[^`]*)`", row)]
    assert len(quoted) > 35
    for text in quoted:
        for part in text.removeprefix("| ").split("..."):
            assert part.strip(" ;,()") in said, (text, part)


def anchors(page: Path) -> set[str]:
    """What `#...` may name in a page: its headings as GitHub writes them."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_links_between_documents_lead_somewhere() -> None:
    for page in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]:
        for target, anchor in re.findall(r"\]\(([^)#]*)(?:#([^)]*))?\)", page.read_text(encoding="utf-8")):
            if target.startswith("http"):
                continue
            place = page.parent / target if target else page
            assert place.exists(), (page.name, target)
            assert not anchor or anchor in anchors(place), (page.name, target, anchor)
    linked = (ROOT / "README.md").read_text() + "".join(p.read_text() for p in (ROOT / "docs").glob("*.md"))
    for page in (ROOT / "docs").glob("*.md"):
        assert f"{page.name})" in linked, f"nothing leads to docs/{page.name}"


def test_the_adapter_of_the_howto_passes_its_check(tmp_path: Path) -> None:
    """The package of docs/adapters-howto.md, its two files as they stand there."""
    blocks = re.findall(r"```(toml|python)\n(.*?)```", (ROOT / "docs" / "adapters-howto.md").read_text(), re.S)
    files = dict(blocks)
    (tmp_path / "astra_qwen2.py").write_text(files["python"])
    points = tomllib.loads(files["toml"])["project"]["entry-points"]["astra.adapters"]
    info = tmp_path / "astra_qwen2-0.1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: astra-qwen2\nVersion: 0.1\n")
    (info / "entry_points.txt").write_text("[astra.adapters]\n" + "".join(f"{k} = {v}\n" for k, v in points.items()))
    words = ["-m", "astracli", "adapters", "check", "qwen2", "--json"]
    done = warm.run(words, env={**os.environ, "PYTHONPATH": str(tmp_path)})
    report = json.loads(done.stdout)
    assert done.returncode == 0 and report["ok"], report
    assert [check["name"] for check in report["checks"]] == [
        "load", "block classes", "wire names", "parameter count", "padded rows == separate",
        "packed row == separate",
    ]  # fmt: skip
