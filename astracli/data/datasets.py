"""Problem sets from files and from the Hub: one door for files of every kind, `datasets` directories and Hub ids.

`fetch` runs in the supervisor before any process starts and returns local paths; `load` opens a path offline, and
reads a problem when it is asked for. Nothing is dropped: a row without its fields is an error that names the row, and
repeated questions are counted.
"""

from __future__ import annotations

import difflib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from astracli.config.benchmarks import FORMATS, SUFFIXES, HubSet
from astracli.config.recipe_data import GENERATED, sets
from astracli.data.problems import Problems, Side
from astracli.data.rows import is_saved, split_of
from astracli.data.turns import PromptFormat
from astracli.data.unpack import cache_dir
from astracli.errors import UserError

if TYPE_CHECKING:
    from astracli.config.recipe import Recipe
    from astracli.config.recipe_data import DataTable
    from astracli.data.prompts import Problem

__all__ = ["Problems", "cache_dir", "fetch", "fetch_set", "load"]

DATA_DIR_VARIABLE = "ASTRA_DATA_DIR"
"""A directory that holds NAME.jsonl files, itself or in `eval/` and `train/`, where `data.path` names none."""

TRAINING_SETS: dict[str, HubSet] = {
    "deepscaler": HubSet("agentica-org/DeepScaleR-Preview-Dataset", "train"),
    "dapo": HubSet("open-r1/DAPO-Math-17k-Processed", "train", ("prompt",), ("solution",), config="en"),
    "gsm8k": HubSet("openai/gsm8k", "train", config="main", final_after="####"),
}
"""Training sets known by name; their Hub ids mean the same. The fields of a recipe are not needed for them."""


def load(
    data: DataTable, local_path: str | Path | None = None, side: Side = "train", usual: Sequence[str] = ()
) -> Problems:
    """The problems of one source, from what `fetch` returned. `usual`: names of the question besides the table's own.

    Raises UserError.
    """
    known = known_set(data.source)
    path = Path(local_path) if local_path is not None else find_local(data.source, data.path)
    if path is None:
        raise UserError(f"data.source = `{data.source}` is not on this machine", "fetch it first: `astra train` does")
    return Problems(
        path,
        split=data.split,
        config=data.config,
        question_fields=[*_fields(data.question_field, known.question_fields if known else ()), *usual],
        answer_fields=_fields(data.answer_field, known.answer_fields if known else ()) if data.answer_field else (),
        final_after=known.final_after if known else None,
        prompt=PromptFormat.of(data),
        holdout=data.holdout,
        side=side,
    )


def fetch(recipe: Recipe, first: dict[str, Problem] | None = None) -> dict[str, str | None]:
    """Make a recipe's training problems local and check them. {source: path for `load`}; None for the generated family.

    `first` gets the first problem of each source that is not generated.

    Raises UserError: unknown source, gated or missing on the Hub, missing fields, no rows.
    """
    tables = sets(recipe.training_data)
    paths = {name: fetch_set(table) for name, table in tables.items()}
    for name, table in tables.items():
        if (path := paths[name]) is not None:
            problem = load(table, path)[0]
            if first is not None:
                first[name] = problem
    return paths


def fetch_set(data: DataTable) -> str | None:
    """The local path of one source, downloaded when it has to be; None for the generated family. Raises UserError."""
    if data.source == GENERATED:
        return None
    path = find_local(data.source, data.path)
    if path is None:
        known = known_set(data.source)
        if known is None and data.source.count("/") != 1:
            raise _unknown(data.source)
        config = data.config or (known.config if known else None)
        path = download(HubSet(known.hub_id if known else data.source, data.split, config=config), data.revision)
    return str(path)


def known_set(source: str) -> HubSet | None:
    """A training set by its name or its Hub id."""
    by_id = {s.hub_id.lower(): s for s in TRAINING_SETS.values()}
    return TRAINING_SETS.get(source) or by_id.get(source.lower())


def find_local(source: str, data_dir: str | None = None) -> Path | None:
    """A path, or NAME in the data directory, of a known set also NAME_train; None when there is neither.

    Raises UserError for a path without a file.
    """
    path = Path(source).expanduser()
    if path.exists():
        if not (path.is_file() or path.is_dir()):
            raise UserError(f"`{source}` is a pipe or a device, not a file", "save what comes from it in a file")
        return path.resolve()
    if source.lower().endswith(SUFFIXES) or path.is_absolute() or source.startswith((".", "~")):
        kinds = ", ".join(FORMATS)
        raise UserError(f"no data at `{source}`", f"give a file ({kinds}), a `datasets` directory or a Hub id")
    names = (source, f"{source}_train") if known_set(source) else (source,)
    places = (find_in_data_dir(name, "train", data_dir) for name in names)
    return next((place for place in places if place is not None), None)


def find_in_data_dir(name: str, folder: str, data_dir: str | None = None) -> Path | None:
    """NAME with a suffix of `SUFFIXES`, or the saved data set NAME, in a directory, itself or its `folder`; None: not
    there.

    The directory is `data_dir` (a recipe's `data.path`), else ASTRA_DATA_DIR. Raises UserError when it is none.
    """
    root = data_dir or os.environ.get(DATA_DIR_VARIABLE)
    if not root:
        return None
    base = Path(root).expanduser()
    if not base.is_dir():
        raise UserError(
            f"{'data.path' if data_dir else DATA_DIR_VARIABLE} = `{root}` is no directory",
            "name the directory that holds NAME.jsonl, itself or in `train/` and `eval/`",
        )
    places = [base / sub / f"{name}{suffix}" for sub in ("", folder) for suffix in (*SUFFIXES, "")]
    return next((place.resolve() for place in places if place.is_file() or is_saved(place)), None)


def download(source: HubSet, revision: str | None = None) -> Path:
    """A Hub data set as one local .jsonl file, kept by commit in the cache. Raises UserError when it cannot be had."""
    from astracli.data.fetch import fetch_dataset

    snapshot = fetch_dataset(source.hub_id, revision)
    split = source.split.replace("/", "_")
    name = "-".join(filter(None, [source.hub_id.replace("/", "--"), source.config, split, snapshot.name[:12]]))
    target = cache_dir() / "datasets" / f"{name}.jsonl"
    if not target.exists():
        _convert(source, snapshot, target)
    return target


def _convert(source: HubSet, snapshot: Path, target: Path) -> None:
    """Write the rows one after the other as they are read: memory does not grow with the set."""
    import datasets

    folder = snapshot / source.config if source.config else None
    part = source.split if "[" in source.split else None  # a slice, which `datasets` cannot stream
    more: dict[str, Any] = {"split": part} if part else {"streaming": True}
    try:
        if folder is not None and folder.is_dir() and not (snapshot / "README.md").is_file():
            found = datasets.load_dataset(str(folder), **more)
        else:
            found = datasets.load_dataset(str(snapshot), source.config, **more)
    except Exception as error:
        hint = "name one of them in data.config" if "onfig name is missing" in str(error) else None
        raise UserError(f"data set `{source.hub_id}` cannot be read: {error}", hint) from None
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f"{target.name}.{os.getpid()}.tmp")
    with partial.open("w", encoding="utf-8") as out:
        for row in split_of(found, source.split, source.hub_id):
            out.write(json.dumps(row, ensure_ascii=False, default=str) + "\n")
    partial.replace(target)


def _fields(chosen: str, known: Sequence[str]) -> tuple[str, ...]:
    """What a known set calls its field, then the recipe's name for it (a local copy may use that)."""
    return tuple(dict.fromkeys([*known, chosen]))


def _unknown(source: str) -> UserError:
    near = difflib.get_close_matches(source, ["arithmetic", *TRAINING_SETS], n=1)
    hint = f"did you mean `{near[0]}`?" if near else "give a local file, a Hub id `owner/name`, or one of the names"
    return UserError(f"data.source = `{source}` is unknown; known: arithmetic, {', '.join(TRAINING_SETS)}", hint)
