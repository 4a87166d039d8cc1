"""The engine's side: apply and prove, refuse what is not right, detect damage of any kind."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from staged_tools import Weights, chain, delta, restage, stage
from transfer_tools import copies, same

from astracli.errors import RunFailed
from astracli.weights import WeightCorrupt, WeightMismatch
from astracli.weights.format import codec, container
from astracli.weights.format.digest import bits_of
from astracli.weights.format.flat import flatten
from astracli.weights.format.manifest import version_name
from astracli.weights.receive import apply, resident
from astracli.weights.receive.placement import EngineSlice

sys.path.append(str(Path(__file__).parents[1] / "bench"))

from weights.damage import damage


def test_a_delta_lands_in_place_bit_for_bit_and_says_so(tmp_path: Path) -> None:
    versions = chain(3)
    where = stage(tmp_path, versions, [delta(1), delta(2)])
    engine = copies(versions[0])
    memory = {name: tensor.data_ptr() for name, tensor in engine.items()}
    result = apply.apply(where, engine, 0)
    assert same(engine, versions[2]) and memory == {name: tensor.data_ptr() for name, tensor in engine.items()}
    files = [where / version_name(v) / "delta-00000.bin" for v in (1, 2)]
    assert (result.version, result.kind, result.steps) == (2, "delta", 2)
    assert result.bytes == sum(f.stat().st_size for f in files)
    written = json.loads((where / "result.json").read_text())
    assert written["ok"] and written["version"] == 2 and written["changed"] == result.changed > 0


def test_a_full_version_needs_no_base(tmp_path: Path) -> None:
    versions = chain(2)
    where = stage(tmp_path, versions, ["v000001/manifest.full.json"], transfer="full")
    engine = {name: torch.full_like(tensor, float("nan")) for name, tensor in versions[0].items()}
    assert apply.apply(where, engine, None).kind == "full"
    assert same(engine, versions[1])


def test_decoding_beforehand_leaves_only_the_scatter(tmp_path: Path) -> None:
    versions = chain(3)
    where = stage(tmp_path, versions, [delta(1)])
    prepared = apply.prepare(where)
    shutil.rmtree(where / "v000001")
    engine = copies(versions[0])
    apply.apply(where, engine, 0, prepared)
    assert same(engine, versions[1])
    restage(tmp_path, [delta(2)])  # a plan that was prepared is not used for another one
    assert apply.apply(where, engine, 1, prepared).version == 2
    assert same(engine, versions[2])


def test_a_wrong_base_is_refused_untouched(tmp_path: Path) -> None:
    versions = chain(3)
    where = stage(tmp_path, versions, [delta(2)])
    for have in (0, None, 2):
        engine = copies(versions[0])
        with pytest.raises(WeightMismatch, match=f"changes version 1, the engine holds {have}"):
            apply.apply(where, engine, have)
        assert same(engine, versions[0])
        written = json.loads((where / "result.json").read_text())
        assert not written["ok"] and written["error"] == "WeightMismatch"


def test_a_base_that_lies_about_its_version_is_found_by_the_digests(tmp_path: Path) -> None:
    versions = chain(3)
    where = stage(tmp_path, versions, [delta(2)])
    with pytest.raises(WeightMismatch, match=r"9 tensors have the wrong digest: model\.embed_tokens\.weight, "):
        apply.apply(where, copies(versions[0]), 1)


def test_missing_unknown_and_misshapen_tensors_are_named(tmp_path: Path) -> None:
    versions = chain(2)
    where = stage(tmp_path, versions, [delta(1)])

    def refused(change: Callable[[Weights], object], message: str) -> None:
        engine = copies(versions[0])
        change(engine)
        with pytest.raises(WeightMismatch, match=message):
            apply.apply(where, engine, 0)

    refused(lambda e: e.pop("model.norm.weight"), r"lacks 1 of 9 tensors: model\.norm\.weight")
    refused(lambda e: e.update(extra=torch.zeros(2)), "1 tensors of the engine are not in the manifest: extra")
    refused(lambda e: e.update({"model.norm.weight": torch.zeros(17).bfloat16()}), "holds 17 elements .* manifest 16")
    refused(lambda e: e.update({"model.norm.weight": torch.zeros(16)}), "in float32 .* the wire in bfloat16")
    refused(lambda e: e.update({"model.embed_tokens.weight": torch.zeros(16, 40).bfloat16().T}), "not contiguous")


def test_frozen_and_tied_tensors_are_checked_when_given(tmp_path: Path) -> None:
    versions = chain(2)
    frozen = {"visual.weight": torch.randn(4, 4).bfloat16()}
    tied = {"lm_head.weight": "model.embed_tokens.weight"}
    where = stage(tmp_path, versions, [delta(1)], frozen=frozen, tied=tied)
    engine = copies(versions[0])
    engine["visual.weight"] = frozen["visual.weight"]
    engine["lm_head.weight"] = engine["model.embed_tokens.weight"]
    assert apply.apply(where, engine, 0).version == 1
    engine = copies(versions[0]) | {"visual.weight": torch.zeros(4, 4).bfloat16()}
    with pytest.raises(WeightMismatch, match=r"frozen tensors differ from the trainer's: visual\.weight"):
        apply.apply(where, engine, 0)


@pytest.mark.parametrize("encoding", list(container.ENCODINGS))
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_torch_scatter_is_the_numpy_one(encoding: str, dtype: torch.dtype) -> None:
    """What runs on a GPU gives the same bits; the operations are the same ones on any device."""
    draw = np.random.default_rng(2)
    kind, top = ("<u2", 1 << 16) if dtype == torch.bfloat16 else ("<u4", 1 << 32)
    base, new = (draw.integers(0, top, 3000, dtype=np.uint64).astype(kind) for _ in range(2))
    new[::3] = base[::3]
    at = codec.changed_indices(base, new)
    blob = codec.encode_as(encoding, base, new, at).payload
    update = codec.decode(blob, encoding, len(at), 3000, base.itemsize)
    view = torch.from_numpy(base.view(kind.replace("u", "i")).copy()).view(dtype)
    prepared = apply.Prepared(b"", 1, "delta", 0, None, flat=[flatten([("a", 0, update)])])
    resident.Resident({"a": [EngineSlice(view[:1000], 0), EngineSlice(view[1000:], 1000)]}).apply(prepared)
    assert np.array_equal(bits_of(view), new)


def test_an_update_falls_into_the_placements_that_hold_it(tmp_path: Path) -> None:
    versions = chain(2)
    where = stage(tmp_path, versions, [delta(1)])
    name = "model.embed_tokens.weight"
    flat = versions[0][name].reshape(-1)
    parts = [flat[:100].clone(), flat[100:333].clone(), flat[333:].clone()]
    engine: dict[str, Any] = copies(versions[0])
    engine[name] = [EngineSlice(parts[0], 0), EngineSlice(parts[1], 100), EngineSlice(parts[2], 333)]
    apply.apply(where, engine, 0)
    assert torch.equal(torch.cat(parts), versions[1][name].reshape(-1))
    engine[name] = engine[name][:2]
    with pytest.raises(WeightMismatch, match="holds 333 elements"):
        apply.apply(where, engine, 0)


# ---- damage ---------------------------------------------------------------------------------------------------------


def test_damages_of_payload_manifest_plan_and_base_are_all_detected(tmp_path: Path) -> None:
    """Every trial ends in an error, and an untouched engine unless the base itself was damaged; afterwards a full
    version puts it right. Damage that changes no byte is drawn again."""
    versions = chain(4)
    where = stage(tmp_path, versions, [delta(1), delta(2)])
    swapped = (where / "v000001", where / "v000002")
    files = [where / "next.json", *(d / n for d in swapped for n in ("manifest.json", "delta-00000.bin"))]
    content = {path: path.read_bytes() for path in files}
    draw = np.random.default_rng(7)
    trials = {"file": 0, "base": 0, "order": 0}
    while sum(trials.values()) < 600:  # bench/weights/damage.py does ten thousand
        engine, have = copies(versions[0]), 0
        kind = ("file", "base", "order")[draw.choice(3, p=[0.65, 0.3, 0.05])]
        if kind == "file":
            path = files[draw.integers(len(files))]
            _, blob = damage(draw, content[path])
            if blob == content[path]:
                continue
            path.write_bytes(blob)
        elif kind == "order":  # whole files in each other's place
            one, two = draw.choice(len(files), 2, replace=False)
            files[one].write_bytes(content[files[two]])
            files[two].write_bytes(content[files[one]])
        else:
            name = list(engine)[draw.integers(len(engine))]
            view = bits_of(engine[name]).view(np.uint8)
            _, blob = damage(draw, view.tobytes())
            blob += bytes(len(view) - len(blob))  # a truncated base reads as zeros
            if blob == view.tobytes():
                continue
            view[:] = np.frombuffer(blob, np.uint8)
        with pytest.raises(RunFailed):
            apply.apply(where, engine, have)
        assert not json.loads((where / "result.json").read_text())["ok"]
        if kind != "base":
            assert same(engine, versions[0])
        for path in files:
            if path.read_bytes() != content[path]:
                path.write_bytes(content[path])
        trials[kind] += 1
    assert min(trials.values()) > 15
    engine = copies(versions[0])
    apply.apply(where, engine, 0)
    assert same(engine, versions[2])
    restage(tmp_path, ["v000000/manifest.full.json"])
    bits_of(engine["model.norm.weight"])[:] = 0
    apply.apply(where, engine, None)
    assert same(engine, versions[0])


def test_damage_of_a_full_version_is_detected(tmp_path: Path) -> None:
    versions = chain(1)
    where = stage(tmp_path, versions, ["v000000/manifest.full.json"])
    path, draw = where / "v000000" / "full-00000.safetensors", np.random.default_rng(8)
    content = path.read_bytes()
    for _ in range(200):
        _, blob = damage(draw, content)
        if blob == content:
            continue
        path.write_bytes(blob)
        engine = {name: torch.zeros_like(tensor) for name, tensor in versions[0].items()}
        with pytest.raises(WeightCorrupt, match=r"full-00000\.safetensors"):
            apply.apply(where, engine, None)
        assert not any(t.any() for t in engine.values())


def test_plans_that_do_not_fit_together_are_refused(tmp_path: Path) -> None:
    where = stage(tmp_path, chain(4), [delta(1), delta(3)])
    with pytest.raises(WeightCorrupt, match="changes version 2, the step before it ends at 1"):
        apply.prepare(where)
    restage(tmp_path, [delta(1), "v000000/manifest.full.json"])
    with pytest.raises(WeightCorrupt, match="a full version behind other steps"):
        apply.prepare(where)
    (where / "next.json").unlink()
    with pytest.raises(WeightCorrupt, match=r"cannot read staged `next\.json`"):
        apply.prepare(where)
