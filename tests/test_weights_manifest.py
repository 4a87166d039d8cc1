"""What a manifest is refused for before any payload is read: each check by a manifest that fails it alone."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest

from astracli.weights import WeightCorrupt
from astracli.weights.format.manifest import FileEntry, Manifest, Piece, TensorEntry, seal

HEX = "0123456789abcdef" * 2
FIRST = Piece(0, 4, "a.bin", 0, 8, HEX, "raw", 4)
SECOND = Piece(4, 2, "a.bin", 8, 4, HEX, "raw", 2)
TENSOR = TensorEntry("w", "bfloat16", (2, 3), "raw", 6, HEX, (FIRST, SECOND))
FULL = Manifest("m", 3, None, "full", (TENSOR,), {"a.bin": FileEntry(12, HEX)}, {"tied": HEX})
CHANGE = Piece(1, 3, "a.bin", 0, 12, HEX, "gap-ulp", 2)
DELTA = replace(
    FULL, kind="delta", base_version=2, tensors=(replace(TENSOR, encoding="gap-ulp", count=2, pieces=(CHANGE,)),)
)


def with_pieces(manifest: Manifest, *pieces: Piece, **changes: Any) -> Manifest:
    return replace(manifest, tensors=(replace(manifest.tensors[0], pieces=pieces, **changes),))


def test_a_manifest_comes_back() -> None:
    for manifest in (FULL, DELTA):
        assert Manifest.from_bytes(manifest.to_bytes()) == manifest
    assert (FULL.payload_bytes, FULL.changed, FULL.elements, DELTA.changed) == (12, 6, 6, 2)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (replace(FULL, base_version=2), "a full version with base 2"),
        (replace(DELTA, base_version=3), "version 3 with base 3"),
        (replace(DELTA, base_version=None), "version 3 with base None"),
        (replace(FULL, version=-1), "version -1"),
        (replace(FULL, files={"../a.bin": FileEntry(12, HEX)}), "file '../a.bin'"),
        (replace(FULL, frozen_digests={"tied": "0"}), "frozen tensor 'tied'"),
        (replace(FULL, tensors=(TENSOR, TENSOR)), "tensor `w` stands there twice"),
        (replace(FULL, frozen_digests={"w": HEX}), "tensor `w` stands there twice"),
        (with_pieces(FULL, FIRST, SECOND, dtype="int8"), "dtype 'int8'"),
        (
            with_pieces(FULL, FIRST, replace(SECOND, start=3)),
            "piece of 2 at 3 with 2 changes, after one that ends at 4",
        ),
        (
            with_pieces(FULL, FIRST, replace(SECOND, start=5)),
            "piece of 2 at 5 with 2 changes, after one that ends at 4",
        ),
        (with_pieces(FULL, FIRST, count=4), "pieces hold 4 of 6 elements"),
        (with_pieces(FULL, FIRST, SECOND, count=5), "5 changes as `raw`, its pieces disagree"),
        (with_pieces(FULL, FIRST, replace(SECOND, offset=9)), "piece at byte 9 of `a.bin`, 4 bytes"),
        (with_pieces(FULL, FIRST, replace(SECOND, file="b.bin")), "piece at byte 8 of `b.bin`, 4 bytes"),
        (with_pieces(FULL, FIRST, replace(SECOND, bytes=3)), "full piece of 2 elements, `raw`, 3 bytes"),
        (with_pieces(DELTA, replace(CHANGE, encoding="raw"), encoding="raw"), "piece with encoding 'raw'"),
        (with_pieces(DELTA, replace(CHANGE, count=0), count=0), "piece of 3 at 1 with 0 changes"),
        (with_pieces(DELTA, replace(CHANGE, count=4), count=4), "piece of 3 at 1 with 4 changes"),
    ],
)
def test_each_check_refuses(wrong: Manifest, said: str) -> None:
    with pytest.raises(WeightCorrupt) as error:
        Manifest.from_bytes(wrong.to_bytes(), "v000003")
    assert error.value.message.startswith("v000003: ") and said in error.value.message


def test_another_format_is_refused_with_the_way_out() -> None:
    document = json.loads(FULL.to_bytes())
    del document["hash"]
    with pytest.raises(WeightCorrupt, match="has another format than 1") as error:
        Manifest.from_bytes(seal(document | {"format": 2}))
    assert error.value.hint == "publisher and engine need one version"


def test_only_the_sealed_bytes_pass() -> None:
    blob = FULL.to_bytes()
    spaced = json.dumps(json.loads(blob), sort_keys=True).encode()  # the same document, and its hash is right
    for other in (spaced, blob + b" ", blob.replace(b'"version":3', b'"version":4')):
        with pytest.raises(WeightCorrupt, match="fails its own hash"):
            Manifest.from_bytes(other)
    for broken in (b"", b"[]", b"{}", blob[:-1]):
        with pytest.raises(WeightCorrupt, match="is not sealed JSON"):
            Manifest.from_bytes(broken)
