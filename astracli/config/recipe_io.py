"""Find, merge, check and write recipes: TOML with `extends`, `--set a.b=c`, and the resolved JSON of a run."""

from __future__ import annotations

import difflib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from astracli.config import doors, reading, recipe_clusters, toml_text
from astracli.config.benchmarks import BENCHMARKS, get, is_path, own_sets
from astracli.errors import UserError

if TYPE_CHECKING:
    from importlib.resources.abc import Traversable

    from astracli.config.recipe import Recipe

LIST_HINT = "see them with `astra recipes list`"
SET_HINT = "every setting takes its own `--set`: `--set a.b=1 --set c.d=2`"
MOST_EXTENDS = 20
"""Recipes that may extend one another in a row."""
SHOWN = 10
"""Complaints about one recipe that are shown."""
FILE_HINT = "a recipe is a TOML file; `astra recipes copy qwen3.5-tiny-m2po-delta` makes one to start from"

EARLIER_NAMES = {"data.prompt": "data.template"}
"""Keys that recipes and runs of earlier versions may hold -> what they are called now."""


@dataclass(frozen=True)
class RecipeInfo:
    """A shipped recipe, as a list shows it."""

    name: str
    description: str


def shipped() -> list[RecipeInfo]:
    """The recipes of this package, by name. Reads TOML only: shell completion calls this."""
    files = (_folder().joinpath(f"{name}.toml") for name in _shipped_names())
    return [RecipeInfo(_stem(f.name), str(_parse(f, f.name).get("description", ""))) for f in files]


def source_text(name: str) -> str:
    """The text of a shipped recipe, comments and all. Raises UserError when there is none of that name."""
    return _shipped_file(name).read_text(encoding="utf-8")


def load(name_or_path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """A shipped name, or the path of a .toml file or of a run's recipe.json, with `a.b=c` overrides -> checked Recipe.

    Raises UserError: unknown recipe, unreadable or invalid file, circular `extends`, unknown key, value not allowed.
    """
    document = _document(str(name_or_path))
    for override in overrides:
        _override(document, override)
    return check(document, str(name_or_path))


def check(document: Mapping[str, Any], name: str) -> Recipe:
    """A plain document -> Recipe. Raises UserError with dotted key, value, what is allowed and the nearest name."""
    from pydantic import ValidationError

    from astracli.config.recipe import Recipe
    from astracli.config.schema import complaint

    try:
        recipe = Recipe.model_validate(dict(document))
    except ValidationError as error:
        items = error.errors(include_url=False)
        found = list(dict.fromkeys(complaint(dict(item)) for item in items[:SHOWN]))
        more = [f"and {len(items) - SHOWN} more"] if len(items) > SHOWN else []
        lines = "\n  ".join([message for message, _ in found] + more)
        hints = [hint for _, hint in found if hint]
        fallback = "`astra recipes show NAME` prints every key of a recipe with its value"
        separator = "\n  " if len(found) > 1 else " "
        raise UserError(f"recipe `{name}`:{separator}{lines}", " ".join(dict.fromkeys(hints)) or fallback) from None
    _check_names(recipe, name)
    return recipe


def _check_names(recipe: Recipe, label: str) -> None:
    """What the schema cannot know: names of engine and benchmarks, and their own samples. Raises UserError."""
    used = [("rollout.engine", recipe.rollout.engine, "engine", ["auto", *doors.names("astra.engines")])]
    if isinstance(recipe.launch.hosts, str):
        used.append(("launch.hosts", recipe.launch.hosts, "cluster", recipe_clusters.names()))
    used += [
        ("eval.benchmarks", name, "benchmark", [*BENCHMARKS, *own_sets(recipe)])
        for name in recipe.eval.benchmarks
        if not is_path(name)
    ]
    for key, name, kind, known in used:
        if name not in known:
            message = f"recipe `{label}`: `{key}` = {json.dumps(name)} is not allowed: there is no such {kind}"
            raise UserError(message, f"{_nearest(name, known)}known: {', '.join(known)}")
    k = recipe.eval.pass_k
    samples = recipe.eval.samples
    if isinstance(samples, dict) and (
        unused := sorted(samples.keys() - {get(n, recipe).name for n in recipe.eval.benchmarks})
    ):
        raise UserError(
            f"recipe `{label}`: eval.samples names {', '.join(f'`{name}`' for name in unused)}, not in eval.benchmarks",
            f"its benchmarks: {', '.join(recipe.eval.benchmarks) or 'none'}",
        )
    for spec in [get(name, recipe) for name in recipe.eval.benchmarks if samples is None]:
        if spec.samples < k:
            raise UserError(
                f"recipe `{label}`: eval.pass_k = {k}, and `{spec.name}` is asked {spec.samples} samples an item: "
                "pass@k needs at least k",
                f"ask for more with `--set eval.samples={k}`, or lower eval.pass_k",
            )


def to_document(recipe: Recipe) -> dict[str, Any]:
    """Recipe -> plain JSON-ready document with every default filled in."""
    return recipe.model_dump(mode="json")


def to_json(recipe: Recipe) -> str:
    """Recipe -> the text of `recipe.json`; `load` reads it back to an equal recipe."""
    return json.dumps(to_document(recipe), indent=2, ensure_ascii=False) + "\n"


def to_toml(recipe: Recipe) -> str:
    """Recipe -> TOML with every default filled in; keys whose value is "none" are left out (TOML has no null)."""
    return toml_text.text_of(to_document(recipe))


def _folder() -> Traversable:
    return resources.files("astracli.recipes")


def _stem(name: str) -> str:
    return name.removesuffix(".toml")


def _shipped_names() -> list[str]:
    """Recipes to run; a leading underscore marks what several of them extend."""
    files = (f.name for f in _folder().iterdir())
    return sorted(_stem(name) for name in files if name.endswith(".toml") and not name.startswith("_"))


def _shipped_file(name: str) -> Traversable:
    names = _shipped_names()
    if name not in names and not (name.startswith("_") and _folder().joinpath(f"{name}.toml").is_file()):
        hint = SET_HINT if "=" in name else _nearest(name, names) + LIST_HINT
        raise UserError(f"there is no recipe `{name}`", hint)
    return _folder().joinpath(f"{name}.toml")


def _nearest(name: str, names: Sequence[str]) -> str:
    close = difflib.get_close_matches(name, names, n=3, cutoff=0.5)
    return f"did you mean {' or '.join(f'`{c}`' for c in close)}? " if close else ""


def _is_path(text: str) -> bool:
    return "/" in text or text.endswith((".toml", ".json"))


def _document(name_or_path: str) -> dict[str, Any]:
    """Name or path -> merged document, before overrides and checks."""
    if name_or_path.endswith(".json"):
        path = Path(name_or_path)
        try:
            document = reading.from_json(_read(path))
        except ValueError as error:
            raise UserError(f"`{path}` is not valid JSON: {error}", FILE_HINT) from None
        if not isinstance(document, dict):
            raise UserError(f"`{path}` holds no recipe: a JSON object is needed", FILE_HINT)
        return _with_new_names(document)
    file = _find(name_or_path, None)
    return _merged(file, ())


def _find(name_or_path: str, origin: Path | Traversable | None) -> Path | Traversable:
    """The file that a name or a path means; a path in `extends` is relative to the file that says it."""
    if not _is_path(name_or_path):
        if name_or_path not in _shipped_names() and reading.is_file(Path(name_or_path)):
            return Path(name_or_path)
        beside = Path(f"{name_or_path}.toml")
        if name_or_path not in _shipped_names() and reading.is_file(beside):
            raise UserError(f"there is no recipe `{name_or_path}`", f"a file is meant by its path: `{beside}`")
        return _shipped_file(name_or_path)
    path = Path(name_or_path).expanduser()
    return origin.parent / path if isinstance(origin, Path) and not path.is_absolute() else path


def _merged(file: Path | Traversable, chain: tuple[str, ...]) -> dict[str, Any]:
    label = os.path.realpath(file) if isinstance(file, Path) and "\0" not in str(file) else file.name
    own = isinstance(file, Path) and file.parent != _folder()  # a file of the user's, not a shipped recipe
    shown = str(file) if own else _stem(file.name)
    if label in chain:
        circle = " -> ".join(_stem(Path(step).name) for step in (*chain, label))
        raise UserError(f"recipe `{shown}` extends itself: {circle}", "break the circle of `extends`")
    if len(chain) > MOST_EXTENDS:
        raise UserError(f"recipe `{shown}` is the end of more than {MOST_EXTENDS} that extend one another")
    document = _parse(file, shown)
    parent = document.pop("extends", None)
    own_name = document.setdefault("name", _stem(file.name))
    if parent is None:
        return document
    if not isinstance(parent, str):
        raise UserError(
            f"recipe `{shown}`: `extends` = {json.dumps(parent, default=str)} is not a recipe's name or path"
        )
    try:
        found = _find(parent, file)
    except UserError as error:
        raise UserError(f"recipe `{shown}`, `extends`: {error.message}", error.hint) from None
    base = _merged(found, (*chain, label))
    base.pop("description", None)
    return _merge(base, document) | {"name": own_name}


def _merge(base: dict[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """Tables merge key by key; anything else, lists included, is replaced."""
    merged = dict(base)
    for key, value in over.items():
        old = merged.get(key)
        merged[key] = _merge(old, value) if isinstance(old, dict) and isinstance(value, Mapping) else value
    return merged


def _read(file: Path | Traversable) -> str:
    try:
        text = reading.text(file, reading.RECIPE_BYTES) if isinstance(file, Path) else file.read_text(encoding="utf-8")
        return text.removeprefix("\ufeff")
    except FileNotFoundError:
        names = _shipped_names()
        raise UserError(
            f"there is no recipe file `{file}`",
            _nearest(_stem(file.name), names) + "shipped ones: `astra recipes list`",
        ) from None
    except UnicodeDecodeError as error:
        raise UserError(
            f"recipe file `{file}` is not UTF-8 text: {error.reason} at byte {error.start}", FILE_HINT
        ) from None
    except OSError as error:
        raise UserError(
            f"cannot read recipe file `{file}`: {(error.strerror or str(error)).lower()}", FILE_HINT
        ) from None


def _parse(file: Path | Traversable, shown: str) -> dict[str, Any]:
    try:
        return _with_new_names(reading.from_toml(_read(file)))
    except ValueError as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"recipe `{shown}` is not valid TOML: {error}", FILE_HINT) from None


def _with_new_names(document: dict[str, Any]) -> dict[str, Any]:
    """A file's document with the names that keys have now."""
    for old, new in EARLIER_NAMES.items():
        table, _, key = old.partition(".")
        inner = document.get(table)
        if isinstance(inner, dict) and key in inner:
            inner.setdefault(new.partition(".")[2], inner.pop(key))
    return document


def _override(document: dict[str, Any], text: str) -> None:
    """Put one `a.b=c` into the document. Raises UserError on bad form; keys and values are checked with the rest."""
    dotted, equals, raw = text.partition("=")
    dotted = EARLIER_NAMES.get(dotted.strip(), dotted)
    keys = [part.strip() for part in dotted.split(".")]
    if not equals or not all(keys):
        raise UserError(f"`--set {text}` is not of the form key.name=value", "for example `--set train.steps=20`")
    table = document
    for depth, key in enumerate(keys[:-1], 1):
        inner = table.get(key)
        if inner is not None and not isinstance(inner, dict):
            raise UserError(f"`--set {text}`: `{'.'.join(keys[:depth])}` is a value, not a table")
        table[key] = dict(inner or {})
        table = table[key]
    table[keys[-1]] = _value(keys, raw.strip())


def _value(keys: list[str], raw: str) -> Any:
    """The first reading of `raw` that the schema takes: TOML, "none", Python's True, plain string, list with commas."""
    from astracli.config.schema import at

    readings: list[Any] = []
    try:
        readings.append(reading.from_toml(f"v = {raw}")["v"])
    except ValueError:
        readings.append(raw)
    if raw == "none":
        readings.insert(0, None)
    if raw in ("True", "False"):
        readings.append(raw == "True")
    parts = [part.strip() for part in raw.strip("[]").split(",") if part.strip()]
    readings += [raw, parts]
    slot = at(keys)
    if slot is None:
        return readings[0]
    return next((reading for reading in readings if slot.accepts(reading)), readings[0])
