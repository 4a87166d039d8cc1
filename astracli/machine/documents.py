"""Machine documents by what a command line calls them: the name of a shipped one, or a file."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from pathlib import Path

from astracli.config import reading
from astracli.errors import UserError
from astracli.machine.facts import Machine, validate

FOLDER = Path(__file__).parents[1] / "assets" / "machines"
RECORD = "make one on the machine itself with `astra doctor RECIPE --facts-out FILE`"


def names() -> list[str]:
    """The shipped documents, machines with fewer GPUs first."""
    found = [path.stem for path in FOLDER.glob("*.json")]
    return sorted(found, key=lambda name: (_count(name), name))


def _count(name: str) -> int:
    count = name.partition("x")[0]
    return int(count) if count.isdigit() else 0


def load(text: str) -> Machine:
    """The document that `--facts` names, whole. Raises UserError.

    A shipped name wins over a file of the same name; `./NAME` is always the file.
    """
    if text in names():
        return _read(FOLDER / f"{text}.json", text)
    path = Path(text)
    if path.suffix != ".json" and path.name == text and not reading.is_file(path):
        near = difflib.get_close_matches(text, names(), n=1)
        guess = f"did you mean `{near[0]}`? " if near else ""
        hint = f"{guess}they are {', '.join(names())}; or name a file: {RECORD}"
        raise UserError(f"no machine `{text}` ships with astra, and there is no such file", hint)
    return _read(path, text)


def fleet(hosts: Sequence[str], texts: Sequence[str | None]) -> dict[str, Machine]:
    """The documents of the hosts beside the first. `texts`: what `--facts` names after its first time. Raises UserError
    when the run has fewer hosts."""
    if len(texts) > len(hosts):
        raise UserError(
            f"--facts is given {1 + len(texts)} times, and launch.hosts has {1 + len(hosts)} for it",
            'a cluster is planned with, for example, `--set \'launch.hosts=["a", "b"]\'`',
        )
    return {host: load(text) for host, text in zip(hosts, texts, strict=False) if text}


def _read(path: Path, text: str) -> Machine:
    hint = f"{RECORD}, or take a shipped one: {', '.join(names())}"
    try:
        document = reading.document(path)
    except OSError as error:
        raise UserError(f"cannot read facts file `{text}`: {(error.strerror or str(error)).lower()}", hint) from None
    except ValueError as error:
        raise UserError(f"facts file `{text}` is not JSON: {error}", hint) from None
    if not isinstance(document, dict):
        raise UserError(f"facts file `{text}` holds no JSON object", hint)
    try:
        return validate(document)
    except UserError as error:
        raise UserError(f"facts file `{text}`: {error.message}", hint) from None
