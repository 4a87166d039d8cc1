"""Problem sets from files and from the Hub: one door for .jsonl, .parquet, `datasets` directories and Hub ids.

`fetch` runs in the supervisor before any process starts and returns a local path; `load` opens that path offline, and
reads a problem when it is asked for. Nothing is dropped: a row without its fields is an error that names the row, and
repeated questions are counted.
"""

from __future__ import annotations

import difflib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

from astracli.config.benchmarks import HubSet
from astracli.data.prompts import Problem
from astracli.data.rows import is_saved, open_rows, split_of
from astracli.errors import UserError

if TYPE_CHECKING:
    import numpy as np

    from astracli.config.recipe import DataTable, Recipe

DATA_DIR_VARIABLE = "ASTRA_DATA_DIR"
"""A directory that holds NAME.jsonl files, itself or in `eval/` and `train/`, where `data.path` names none."""

TRAINING_SETS: dict[str, HubSet] = {
    "deepscaler": HubSet("agentica-org/DeepScaleR-Preview-Dataset", "train"),
    "dapo": HubSet("open-r1/DAPO-Math-17k-Processed", "train", ("prompt",), ("solution",), config="en"),
    "gsm8k": HubSet("openai/gsm8k", "train", config="main", final_after="####"),
}
"""Training sets known by name; their Hub ids mean the same. The fields of a recipe are not needed for them."""


def load(data: DataTable, local_path: str | Path | None = None) -> Problems:
    """The problems of a recipe's data table, from what `fetch` returned. Raises UserError."""
    known = known_set(data.source)
    path = Path(local_path) if local_path is not None else find_local(data.source, data.path)
    if path is None:
        raise UserError(f"data.source = `{data.source}` is not on this machine", "fetch it first: `astra train` does")
    return Problems(
        path,
        split=known.split if known else data.split,
        question_fields=_fields(data.question_field, known.question_fields if known else ()),
        answer_fields=_fields(data.answer_field, known.answer_fields if known else ()),
        final_after=known.final_after if known else None,
    )


def fetch(recipe: Recipe) -> str | None:
    """Make a recipe's training problems local and check them. The path for `load`; None for the generated family.

    Raises UserError: unknown source, gated or missing on the Hub, missing fields, no rows.
    """
    data = recipe.data
    if data.source == "arithmetic":
        return None
    path = find_local(data.source, data.path)
    if path is None:
        known = known_set(data.source)
        if known is None and data.source.count("/") != 1:
            raise _unknown(data.source)
        path = download(known or HubSet(data.source, data.split), data.revision)
    load(data, path)
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
        return path.resolve()
    if path.suffix in (".jsonl", ".json", ".parquet") or path.is_absolute() or source.startswith((".", "~")):
        raise UserError(f"no data at `{source}`", "give a .jsonl or .parquet file, a `datasets` directory or a Hub id")
    names = (source, f"{source}_train") if known_set(source) else (source,)
    places = (find_in_data_dir(name, "train", data_dir) for name in names)
    return next((place for place in places if place is not None), None)


def find_in_data_dir(name: str, folder: str, data_dir: str | None = None) -> Path | None:
    """NAME.jsonl, NAME.parquet or the saved data set NAME in a directory, itself or its `folder`; None: not there.

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
    places = [base / sub / f"{name}{suffix}" for sub in ("", folder) for suffix in (".jsonl", ".parquet", "")]
    return next((place.resolve() for place in places if place.is_file() or is_saved(place)), None)


class Problems(Sequence[Problem]):
    """The problems of a set, each read when it is asked for. A pass at the start looks at every row.

    The first of the field names that a row has is taken. In memory is what `rows` keeps, and while the pass goes on 16
    bytes a row. Raises UserError for no rows, and for the first row without its fields.
    """

    def __init__(
        self,
        path: Path,
        *,
        split: str,
        question_fields: Sequence[str],
        answer_fields: Sequence[str],
        final_after: str | None = None,
    ):
        import numpy as np
        import xxhash

        self._path = path
        self._rows = open_rows(path, split)
        self._fields = (tuple(question_fields), tuple(answer_fields))
        self._final_after = final_after
        self._renamed: dict[int, str] = {}
        if not len(self._rows):
            raise UserError(f"`{path}` holds no rows")
        hashes = np.fromiter(self._look(), np.dtype((np.uint64, 2)), len(self._rows))
        self.duplicates = len(hashes) - len(np.unique(hashes[:, 0]))
        """Rows whose question occurred before; they stay in."""
        self.fingerprint = xxhash.xxh64_hexdigest(hashes[:, 0].tobytes())
        """16 hex digits over the questions in their order: what a place in the set means."""
        self._rename(hashes[:, 1])

    def _look(self) -> Iterator[tuple[int, int]]:
        """Hashes of (question, name) of every row."""
        for place, row in enumerate(self._rows):
            problem = self._problem(place, row)
            yield _hash(problem.question), _hash(problem.id)

    def _rename(self, hashes: np.ndarray) -> None:
        """A name that occurred before gets its row's number behind it: names are unique in a set."""
        import numpy as np

        taken, first = np.unique(hashes, return_index=True)
        given: set[str] = set()
        for place in np.setdiff1d(np.arange(len(hashes)), first, assume_unique=True):
            name = f"{self[int(place)].id}#{place}"
            while name in given or np.isin(np.uint64(_hash(name)), taken):
                name = f"{name}#{place}"
            given.add(name)
            self._renamed[int(place)] = name

    def _problem(self, place: int, row: Mapping[str, Any]) -> Problem:
        question = _text(row, self._fields[0], self._path, place, "data.question_field")
        answer = _text(row, self._fields[1], self._path, place, "data.answer_field")
        if self._final_after and self._final_after in answer:
            answer = answer.rsplit(self._final_after, 1)[1].strip().replace(",", "")
        name = str(next((row[key] for key in ("id", "unique_id") if row.get(key) is not None), place))
        return Problem(self._renamed.get(place, name), question, answer)

    def __len__(self) -> int:
        return len(self._rows)

    @overload
    def __getitem__(self, place: int) -> Problem: ...
    @overload
    def __getitem__(self, place: slice) -> list[Problem]: ...
    def __getitem__(self, place: int | slice) -> Problem | list[Problem]:
        places = range(len(self))[place]
        if isinstance(places, range):
            return [self._problem(i, self._rows.row(i)) for i in places]
        return self._problem(places, self._rows.row(places))

    def __iter__(self) -> Iterator[Problem]:
        return (self._problem(place, row) for place, row in enumerate(self._rows))


def download(source: HubSet, revision: str | None = None) -> Path:
    """A Hub data set as one local .jsonl file, kept by commit in the cache. Raises UserError when it cannot be had."""
    from astracli.data.fetch import fetch_dataset

    snapshot = fetch_dataset(source.hub_id, revision)
    name = "-".join(filter(None, [source.hub_id.replace("/", "--"), source.config, source.split, snapshot.name[:12]]))
    target = cache_dir() / "datasets" / f"{name}.jsonl"
    if not target.exists():
        _convert(source, snapshot, target)
    return target


def _convert(source: HubSet, snapshot: Path, target: Path) -> None:
    """Write the rows one after the other as they are read: memory does not grow with the set."""
    import datasets

    folder = snapshot / source.config if source.config else None
    try:
        if folder is not None and folder.is_dir():
            found = datasets.load_dataset(str(folder), streaming=True)
        else:
            found = datasets.load_dataset(str(snapshot), source.config, streaming=True)
    except Exception as error:
        raise UserError(f"data set `{source.hub_id}` cannot be read: {error}") from None
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f"{target.name}.{os.getpid()}.tmp")
    with partial.open("w", encoding="utf-8") as out:
        for row in split_of(found, source.split, source.hub_id):
            out.write(json.dumps(row, ensure_ascii=False, default=str) + "\n")
    partial.replace(target)


def cache_dir() -> Path:
    """ASTRA_CACHE_DIR, else `astra` in the user's cache directory."""
    own = os.environ.get("ASTRA_CACHE_DIR")
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(own) if own else Path(base) / "astra"


def _hash(text: str) -> int:
    import xxhash

    return xxhash.xxh64_intdigest(text.encode("utf-8", "surrogatepass"))


def _fields(chosen: str, known: Sequence[str]) -> tuple[str, ...]:
    """What a known set calls its field, then the recipe's name for it (a local copy may use that)."""
    return tuple(dict.fromkeys([*known, chosen]))


def _text(row: Mapping[str, Any], names: Sequence[str], path: Path, number: int, setting: str) -> str:
    """The first of the named fields as text. Numbers lose a `.0`, lists are joined with `, `."""
    where = f"row {number + 1} of `{path}`"
    for name in names:
        value: Any = row
        for part in name.split("."):
            value = value.get(part) if isinstance(value, Mapping) else None
        if value is None:
            continue
        if isinstance(value, list) and value and all(isinstance(v, str | int | float) for v in value):
            value = ", ".join(map(str, value))
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if isinstance(value, bool) or not isinstance(value, str | int | float):
            raise UserError(f"{where}: field `{name}` is {type(value).__name__}, not text")
        if not str(value).strip():
            raise UserError(f"{where}: field `{name}` is empty")
        return str(value)
    wanted = " or ".join(f"`{name}`" for name in names)
    there = ", ".join(f"`{key}`" for key in row) or "none"
    raise UserError(f"{where} has no field {wanted}; its fields: {there}", f"name the right one with {setting}")


def _unknown(source: str) -> UserError:
    near = difflib.get_close_matches(source, ["arithmetic", *TRAINING_SETS], n=1)
    hint = f"did you mean `{near[0]}`?" if near else "give a local file, a Hub id `owner/name`, or one of the names"
    return UserError(f"data.source = `{source}` is unknown; known: arithmetic, {', '.join(TRAINING_SETS)}", hint)
