"""The Triton kernels that compare two versions, without a GPU: interpreted on a CPU, compiled for two kinds of GPU."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch

if __name__ == "__main__":  # before Triton is imported: it interprets then
    os.environ["TRITON_INTERPRET"] = "1"

from test_weights_device import a_model, by_numpy, coded, pairs, versions

from astracli.weights.device import difference as device
from astracli.weights.publish import payload

pytest.importorskip("triton", reason="Triton has no wheel for this system; it stands beside torch where there are GPUs")


def interpreted(tensors: list[tuple[str, torch.Tensor, torch.Tensor]], piece: int) -> Any:
    from astracli.weights.device.change_kernels import ByTriton

    with patch.object(device, "ByTorch", ByTriton):
        return coded(tensors, piece)


def check_many_tensors() -> None:
    """Of both widths, empty, unchanged and dense ones, smaller and larger than a pass, aligned and not."""
    for seed, flat, piece in ((0, True, 64), (1, False, 256)):
        model = a_model(seed, piece)
        wanted = [(name, *found) for name, base, new in model for found in by_numpy(base, new, piece)]
        assert interpreted(pairs(model, flat), piece) == wanted
        print(len(wanted), "pieces")
    # more short tensors than pieces of the publisher's size fit between 0 and 2^31
    short = [(f"t{k}", *versions(k, 8, 2, 0.1, False)) for k in range((1 << 31) // payload.PIECE + 8)]
    wanted = [(name, *found) for name, base, new in short for found in by_numpy(base, new, payload.PIECE)]
    assert interpreted(pairs(short, flat=True), payload.PIECE) == wanted
    print(len(wanted), "short pieces")


def check_tiles() -> None:
    """Several tiles and blocks a piece, changes at every edge, gaps longer than a tile."""
    piece = 1 << 17
    edges = [k + d for k in (2048, 65_536, piece, 2 * piece) for d in (-1, 0, 1)]
    ends = (("ends", 140_000, [0, -1]), ("last", piece, [-1]), ("none", piece, []))
    for name, size, at in (("edges", 270_000, [0, *edges, -1]), *ends):
        base, _ = versions(1, size, 2, 0.0, False)
        new = base.copy()
        new[at] ^= np.uint16(0x8001)
        assert interpreted(pairs([("w", base, new)], flat=True), piece) == [
            ("w", *found) for found in by_numpy(base, new, piece)
        ]
        print(len(at), name)
    for share in (0.0005, 0.12):
        base, new = versions(2, 140_000, 2, share, wild=True)
        assert interpreted(pairs([("w", base, new)], flat=True), piece) == [
            ("w", *found) for found in by_numpy(base, new, piece)
        ]
    every = np.arange(1 << 16, dtype=np.uint16)  # every value, to one of five distances
    base, new = np.zeros((2, 4 << 16), np.uint16)
    base[::4] = every
    new[::4] = every + np.resize(np.array([1, 2, 0x7FFF, 0x8000, 0xFFFF], np.uint16), 1 << 16)
    assert interpreted(pairs([("w", base, new)], flat=True), 1 << 20) == [
        ("w", *found) for found in by_numpy(base, new, 1 << 20)
    ]
    print("steps")


def check_few_launches() -> None:
    """Whatever a pass consists of."""
    from astracli.weights.device import change_kernels

    launches: list[str] = []

    class Watched:
        def __init__(self, kernel: Any, name: str):
            self.kernel, self.name = kernel, name

        def __getitem__(self, grid: Any) -> Any:
            launches.append(self.name)
            return self.kernel[grid]

    names = ("_count", "_gather", "_code")
    with patch.multiple(change_kernels, **{name: Watched(getattr(change_kernels, name), name) for name in names}):
        model = [(f"t{k}", *versions(k, 64, 2, 0.05, False)) for k in range(64)]
        interpreted(pairs(model, flat=True), 64)
    assert sorted(launches) == ["_code", "_count", "_gather"], launches
    print("launches", len(launches))


def test_interpreted_they_write_the_bytes_of_numpy_in_few_launches() -> None:
    """All checks in one new process."""
    path = os.pathsep.join(filter(None, [str(Path(__file__).parent), os.environ.get("PYTHONPATH")]))
    env = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, __file__], env=env, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stdout + done.stderr
    assert [line.split()[0] for line in done.stdout.splitlines()[-2:]] == ["steps", "launches"], done.stdout


@pytest.mark.parametrize("capability", [80, 90])
def test_they_compile_and_load_16_bytes_at_once(capability: int) -> None:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from astracli.weights.device import change_kernels

    def ptx(kernel: Any, types: dict[str, str], **constants: int) -> str:
        signature = types | dict.fromkeys(constants, "constexpr")
        source = ASTSource(kernel, signature, constants)
        made = triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": 8})
        return str(made.asm["ptx"])

    for width in (2, 4):
        text = ptx(
            change_kernels._count,
            {"tiles": "*i64", "out": "*i32"},
            WIDTH=width,
            ALIGNED=True,
            BLOCK=change_kernels.BLOCK,
        )
        assert text.count("ld.global.v4.b32") == width
        assert "ld.global.v4" not in ptx(
            change_kernels._count,
            {"tiles": "*i64", "out": "*i32"},
            WIDTH=width,
            ALIGNED=False,
            BLOCK=change_kernels.BLOCK,
        )
    found = {"tiles": "*i64", "at_out": "*i32", "bits_out": "*i32"}
    assert ptx(change_kernels._gather, found, ALIGNED=True, BLOCK=change_kernels.BLOCK).count("ld.global.v4.b32") == 2
    coded = {"at": "*i32", "bits": "*i32", "total": "i32", "gaps": "*i32", "short": "*u8", "values": "*u8"}
    assert "st.global" in ptx(change_kernels._code, coded, PIECE=1 << 22, BLOCK=change_kernels.BLOCK)


if __name__ == "__main__":
    torch.set_num_threads(1)
    check_many_tensors()
    check_tiles()
    check_few_launches()
