"""Does the working tree behave as another commit does? The safety net of a change that must not change behaviour.

    python bench/loop/same_as.py COMMIT [--steps 6] [--only documents runs help] [--keep DIR]

Both trees are installed into folders of their own and run on this machine with the same Python:

    help        `--help` of every command
    documents   `recipes show`, `train --dry-run` and `doctor`, each with `--json`, of every shipped recipe on every
                shipped machine
    runs        deterministic runs of the tiny recipes, `delta` and `full`: exported weights, evaluation items, samples,
                eval.csv, every figure that is no time, and the bytes of every published version

What differs goes to stderr by name. Exits 1 when anything does. What a text is meant to say differently shows up here
too: list it in the commit. A few minutes on two cores.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from shared import command, folder, options, say, show

from loop.exactness import SMALL, difference

ROOT = Path(__file__).resolve().parents[2]
RECIPES = ("qwen3.5-tiny-m2po-delta", "qwen3.5-tiny-m2po-full")
PARTS = ("help", "documents", "runs")
COMMANDS = """
import typer
from astracli.cli.main import app
def walk(command, words):
    print(" ".join(words))
    for name, inner in sorted(getattr(command, "commands", {}).items()):
        walk(inner, [*words, name])
walk(typer.main.get_command(app), [])
"""
KEEP_WEIGHTS = "weights.keep=100"


class Tree:
    """A copy of `astracli` that can be run, and nothing else of the project."""

    def __init__(self, name: str, source: Path, folder: Path):
        self.name = name
        self.site = folder / f"site-{name}"
        self.folder = folder / name
        self.folder.mkdir()
        install = ["install", "--quiet", "--no-deps", "--no-build-isolation", "--target", str(self.site), str(source)]
        subprocess.run([sys.executable, "-m", "pip", *install], check=True, stderr=subprocess.DEVNULL)
        self.env = os.environ | {"PYTHONPATH": str(self.site), "COLUMNS": "100", "NO_COLOR": "1"}

    def run(self, *words: str, timeout_s: float = 900) -> tuple[int, str, str]:
        """-> (exit code, stdout, stderr) of `python WORDS` in this tree's folder."""
        done = subprocess.run(
            [sys.executable, *words], cwd=self.folder, env=self.env, text=True, capture_output=True, timeout=timeout_s
        )
        return done.returncode, done.stdout, done.stderr

    def astra(self, *words: str) -> str:
        """Exit code and everything said, with this tree's own paths written alike in both."""
        code, said, complained = self.run("-m", "astracli", *words)
        text = f"exit {code}\n{said}\n{complained}"
        return text.replace(str(self.site), "SITE").replace(str(self.folder), "FOLDER")


def checkout(commit: str, into: Path) -> Path:
    """The files of a commit, without a worktree that would have to be removed."""
    into.mkdir()
    archive = subprocess.run(["git", "archive", commit], cwd=ROOT, check=True, stdout=subprocess.PIPE).stdout
    subprocess.run(["tar", "-x", "-C", str(into)], input=archive, check=True)
    return into


def working_tree(into: Path) -> Path:
    """What the working tree holds now, untracked files included: building in place would leave files there."""
    into.mkdir()
    listed = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(listed, cwd=ROOT, check=True, stdout=subprocess.PIPE).stdout
    there = b"\0".join(name for name in names.split(b"\0") if name and (ROOT / os.fsdecode(name)).is_file())
    pack = subprocess.run(["tar", "-c", "--null", "-T", "-"], cwd=ROOT, check=True, input=there, stdout=subprocess.PIPE)
    subprocess.run(["tar", "-x", "-C", str(into)], input=pack.stdout, check=True)
    return into


def texts(tree: Tree, part: str) -> Iterator[tuple[str, str]]:
    """(what was asked, what was answered)"""
    if part == "help":
        code, listed, complained = tree.run("-c", COMMANDS)
        assert code == 0, complained
        for words in listed.splitlines():
            yield f"astra {words} --help", tree.astra(*words.split(), "--help")
        return
    names = [row["name"] for row in json.loads(tree.run("-m", "astracli", "recipes", "list", "--json")[1])]
    for name in names:
        yield f"recipes show {name}", tree.astra("recipes", "show", name, "--json")
        for machine in machines(tree):
            yield f"doctor {name} on {machine}", tree.astra("doctor", name, "--facts", machine, "--json")
            plan = tree.astra("train", name, "--dry-run", "--facts", machine, "--json")
            yield f"plan of {name} on {machine}", re.sub(r"-\d{8}-\d{6}", "-TIME", plan)


def machines(tree: Tree) -> list[str]:
    """Names of the shipped machine documents."""
    return sorted(path.stem for path in tree.site.glob("astracli/assets/machines/*.json"))


def versions(run: Path) -> dict[str, str]:
    """File -> hash, of every published version that is there; of the store's nonce, which is drawn, nothing."""
    files = [path for path in run.glob("weights/**/*") if path.is_file() and path.name != "NONCE"]
    return {str(path.relative_to(run)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def run_of(tree: Tree, recipe: str, steps: int) -> Path:
    run = tree.folder / recipe
    words = command("train", run, [*SMALL, f"train.steps={steps}", KEEP_WEIGHTS], recipe)[1:]
    code, _, complained = tree.run(*words)
    if code:
        sys.exit(f"error: {recipe} of {tree.name} ended with {code}:\n{complained}")
    return run


def compare_runs(old: Tree, new: Tree, steps: int) -> tuple[int, list[str]]:
    """-> (how many files were compared, what differs)"""
    odd: list[str] = []
    seen = 0
    for recipe in RECIPES:
        one, two = run_of(old, recipe, steps), run_of(new, recipe, steps)
        odd += [f"{recipe}: {what}" for what in difference(one, two, whole=True)]
        a, b = versions(one), versions(two)
        seen += len(a)
        odd += [f"{recipe}: {name}" for name in sorted(a.keys() | b.keys()) if a.get(name) != b.get(name)]
    return seen, odd


def compare_texts(old: Tree, new: Tree, part: str) -> tuple[int, list[str]]:
    a, b = dict(texts(old, part)), dict(texts(new, part))
    return len(a), sorted(what for what in a.keys() | b.keys() if a.get(what) != b.get(what))


def main() -> None:
    parser = options(__doc__, steps=6, keep={Path: "a new folder for everything that both trees made"})
    parser.add_argument("commit")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS))
    args = parser.parse_args()
    rows = []
    with folder() as name:
        if args.keep:
            name = args.keep.resolve()
            name.mkdir(parents=True)
        old = Tree("old", checkout(args.commit, name / "source-old"), name)
        new = Tree("new", working_tree(name / "source-new"), name)
        for part in args.only:
            seen, odd = compare_runs(old, new, args.steps) if part == "runs" else compare_texts(old, new, part)
            rows.append({"part": part, "compared": seen, "differ": len(odd)})
            say(rows[-1], what=odd)
    show(args, {"rows": rows})
    sys.exit(1 if any(row["differ"] or not row["compared"] for row in rows) else 0)


if __name__ == "__main__":
    main()
