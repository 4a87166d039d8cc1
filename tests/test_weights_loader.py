"""The engine's side: apply and prove, refuse what is not right, and find fused parameters through `load_weights`."""

from __future__ import annotations

import json
import shutil
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from astracli.errors import RunFailed
from astracli.weights import WeightCorrupt, WeightMismatch, codec, resident, sglang_loader, staged, watcher
from astracli.weights.digest import bits_of, digest_tensor, to_hex
from astracli.weights.manifest import Manifest, TensorEntry, seal, version_name
from astracli.weights.publisher import Publisher
from astracli.weights.staged import Placement
from astracli.weights.subscriber import Subscriber

sys.path.append(str(Path(__file__).parents[1] / "bench"))
from weights_damage import SHAPES

Weights = dict[str, torch.Tensor]


def first_weights() -> Weights:
    """HF tensors of a model that the fake engine below holds fused."""
    draw = torch.Generator().manual_seed(0)
    return {
        name: torch.randn(shape, generator=draw).to(torch.float32 if "A_log" in name else torch.bfloat16)
        for name, shape in SHAPES.items()
    }


def step(weights: Weights, seed: int) -> Weights:
    draw = torch.Generator().manual_seed(seed)
    return {
        name: torch.where(torch.rand(tensor.shape, generator=draw) < 0.1, tensor * 1.02, tensor)
        for name, tensor in weights.items()
    }


def chain(count: int) -> list[Weights]:
    found = [first_weights()]
    while len(found) < count:
        found.append(step(found[-1], len(found)))
    return found


def same(one: Weights, two: Weights) -> bool:
    return one.keys() == two.keys() and all(digest_tensor(one[n]) == digest_tensor(two[n]) for n in one)


def copies(weights: Weights) -> Weights:
    return {name: tensor.clone() for name, tensor in weights.items()}


def stage(directory: Path, versions: list[Weights], steps: list[str], **options: Any) -> Path:
    """Publish `versions` and stage `steps` of them, as a subscriber on the same disk would."""
    publisher = Publisher(directory / "weights", model_name="fake", keep=100, **options)
    for version, weights in enumerate(versions):
        publisher.publish(version, weights)
    publisher.close()
    return restage(directory, steps)


def restage(directory: Path, steps: list[str]) -> Path:
    target = directory / "stage"
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir(exist_ok=True)  # a watcher may have written to it meanwhile
    for name in {s.split("/")[0] for s in steps}:
        shutil.copytree(directory / "weights" / name, target / name)
    full = steps[0].endswith("full.json")
    base = Manifest.from_bytes((target / steps[0]).read_bytes()).base_version
    version = int(steps[-1][1:7])
    kind = "full" if full else "delta"
    plan = {"version": version, "kind": kind, "base_version": base, "steps": steps, "model_path": None}
    (target / "next.json").write_bytes(seal(plan))
    return target


def delta(version: int) -> str:
    return f"{version_name(version)}/manifest.json"


# ---- apply ----------------------------------------------------------------------------------------------------------


def test_a_delta_lands_in_place_bit_for_bit_and_says_so(tmp_path: Path) -> None:
    versions = chain(3)
    where = stage(tmp_path, versions, [delta(1), delta(2)])
    engine = copies(versions[0])
    memory = {name: tensor.data_ptr() for name, tensor in engine.items()}
    result = staged.apply(where, engine, 0)
    assert same(engine, versions[2]) and memory == {name: tensor.data_ptr() for name, tensor in engine.items()}
    files = [where / version_name(v) / "delta-00000.bin" for v in (1, 2)]
    assert (result.version, result.kind, result.steps) == (2, "delta", 2)
    assert result.bytes == sum(f.stat().st_size for f in files)
    written = json.loads((where / "result.json").read_text())
    assert written["ok"] and written["version"] == 2 and written["changed"] == result.changed > 0
    assert staged.read_back_digests(engine) == {n: to_hex(digest_tensor(t)) for n, t in versions[2].items()}


def test_a_full_version_needs_no_base(tmp_path: Path) -> None:
    versions = chain(2)
    where = stage(tmp_path, versions, ["v000001/manifest.full.json"], transfer="full")
    engine = {name: torch.full_like(tensor, float("nan")) for name, tensor in versions[0].items()}
    assert staged.apply(where, engine, None).kind == "full"
    assert same(engine, versions[1])


def test_decoding_beforehand_leaves_only_the_scatter(tmp_path: Path) -> None:
    versions = chain(3)
    where = stage(tmp_path, versions, [delta(1)])
    prepared = staged.prepare(where)
    shutil.rmtree(where / "v000001")
    engine = copies(versions[0])
    staged.apply(where, engine, 0, prepared)
    assert same(engine, versions[1])
    restage(tmp_path, [delta(2)])  # a plan that was prepared is not used for another one
    assert staged.apply(where, engine, 1, prepared).version == 2
    assert same(engine, versions[2])


def test_a_wrong_base_is_refused_untouched(tmp_path: Path) -> None:
    versions = chain(3)
    where = stage(tmp_path, versions, [delta(2)])
    for have in (0, None, 2):
        engine = copies(versions[0])
        with pytest.raises(WeightMismatch, match=f"changes version 1, the engine holds {have}"):
            staged.apply(where, engine, have)
        assert same(engine, versions[0])
        written = json.loads((where / "result.json").read_text())
        assert not written["ok"] and written["error"] == "WeightMismatch"


def test_a_base_that_lies_about_its_version_is_found_by_the_digests(tmp_path: Path) -> None:
    versions = chain(3)
    where = stage(tmp_path, versions, [delta(2)])
    with pytest.raises(WeightMismatch, match=r"9 tensors have the wrong digest: model\.embed_tokens\.weight, "):
        staged.apply(where, copies(versions[0]), 1)


def test_missing_unknown_and_misshapen_tensors_are_named(tmp_path: Path) -> None:
    versions = chain(2)
    where = stage(tmp_path, versions, [delta(1)])

    def refused(change: Callable[[Weights], object], message: str) -> None:
        engine = copies(versions[0])
        change(engine)
        with pytest.raises(WeightMismatch, match=message):
            staged.apply(where, engine, 0)

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
    assert staged.apply(where, engine, 0).version == 1
    engine = copies(versions[0]) | {"visual.weight": torch.zeros(4, 4).bfloat16()}
    with pytest.raises(WeightMismatch, match=r"frozen tensors differ from the trainer's: visual\.weight"):
        staged.apply(where, engine, 0)


@pytest.mark.parametrize("encoding", list(codec.ENCODINGS))
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_torch_scatter_is_the_numpy_one(encoding: str, dtype: torch.dtype) -> None:
    """What runs on a GPU gives the same bits; the operations are the same ones on any device."""
    draw = np.random.default_rng(2)
    kind, top = ("<u2", 1 << 16) if dtype == torch.bfloat16 else ("<u4", 1 << 32)
    base, new = (draw.integers(0, top, 3000, dtype=np.uint64).astype(kind) for _ in range(2))
    new[::3] = base[::3]
    at = codec.changed_indices(base, new)
    blob = codec._pack(codec._difference(encoding, base, new, at), len(at), 1)
    update = codec.decode(blob, encoding, len(at), 3000, base.itemsize)
    view = torch.from_numpy(base.view(kind.replace("u", "i")).copy()).view(dtype)
    prepared = staged.Prepared(b"", 1, "delta", 0, None, steps=[[("a", 0, update)]])
    resident.Resident({"a": [Placement(view[:1000], 0), Placement(view[1000:], 1000)]}).apply(prepared)
    assert np.array_equal(bits_of(view), new)


def test_an_update_falls_into_the_placements_that_hold_it(tmp_path: Path) -> None:
    versions = chain(2)
    where = stage(tmp_path, versions, [delta(1)])
    name = "model.embed_tokens.weight"
    flat = versions[0][name].reshape(-1)
    parts = [flat[:100].clone(), flat[100:333].clone(), flat[333:].clone()]
    engine: dict[str, Any] = copies(versions[0])
    engine[name] = [Placement(parts[0], 0), Placement(parts[1], 100), Placement(parts[2], 333)]
    staged.apply(where, engine, 0)
    assert torch.equal(torch.cat(parts), versions[1][name].reshape(-1))
    engine[name] = engine[name][:2]
    with pytest.raises(WeightMismatch, match="holds 333 elements"):
        staged.apply(where, engine, 0)


# ---- damage ---------------------------------------------------------------------------------------------------------


def damage(draw: np.random.Generator, blob: bytes) -> bytes:
    """One flipped bit, one changed byte, a truncation, or two blocks that changed places."""
    kind, size = draw.integers(4), len(blob)
    out = bytearray(blob)
    if kind == 0:
        out[draw.integers(size)] ^= 1 << draw.integers(8)
    elif kind == 1:
        out[draw.integers(size)] = draw.integers(256)
    elif kind == 2:
        del out[draw.integers(size) :]
    else:
        width = int(draw.integers(1, max(2, size // 4)))
        one, two = sorted(draw.integers(0, size - width, size=2).tolist())
        if one + width <= two:
            out[one : one + width], out[two : two + width] = out[two : two + width], out[one : one + width]
    return bytes(out)


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
    while sum(trials.values()) < 600:  # bench/weights_damage.py does ten thousand
        engine, have = copies(versions[0]), 0
        kind = ("file", "base", "order")[draw.choice(3, p=[0.65, 0.3, 0.05])]
        if kind == "file":
            path = files[draw.integers(len(files))]
            blob = damage(draw, content[path])
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
            blob = damage(draw, view.tobytes())
            blob += bytes(len(view) - len(blob))  # a truncated base reads as zeros
            if blob == view.tobytes():
                continue
            view[:] = np.frombuffer(blob, np.uint8)
        with pytest.raises(RunFailed):
            staged.apply(where, engine, have)
        assert not json.loads((where / "result.json").read_text())["ok"]
        if kind != "base":
            assert same(engine, versions[0])
        for path in files:
            if path.read_bytes() != content[path]:
                path.write_bytes(content[path])
        trials[kind] += 1
    assert min(trials.values()) > 15
    engine = copies(versions[0])
    staged.apply(where, engine, 0)
    assert same(engine, versions[2])
    restage(tmp_path, ["v000000/manifest.full.json"])
    bits_of(engine["model.norm.weight"])[:] = 0
    staged.apply(where, engine, None)
    assert same(engine, versions[0])


def test_damage_of_a_full_version_is_detected(tmp_path: Path) -> None:
    versions = chain(1)
    where = stage(tmp_path, versions, ["v000000/manifest.full.json"])
    path, draw = where / "v000000" / "full-00000.safetensors", np.random.default_rng(8)
    content = path.read_bytes()
    for _ in range(200):
        blob = damage(draw, content)
        if blob == content:
            continue
        path.write_bytes(blob)
        engine = {name: torch.zeros_like(tensor) for name, tensor in versions[0].items()}
        with pytest.raises(WeightCorrupt, match=r"full-00000\.safetensors"):
            staged.apply(where, engine, None)
        assert not any(t.any() for t in engine.values())


def test_plans_that_do_not_fit_together_are_refused(tmp_path: Path) -> None:
    where = stage(tmp_path, chain(4), [delta(1), delta(3)])
    with pytest.raises(WeightCorrupt, match="changes version 2, the step before it ends at 1"):
        staged.prepare(where)
    restage(tmp_path, [delta(1), "v000000/manifest.full.json"])
    with pytest.raises(WeightCorrupt, match="a full version behind other steps"):
        staged.prepare(where)
    (where / "next.json").unlink()
    with pytest.raises(WeightCorrupt, match=r"cannot read staged `next\.json`"):
        staged.prepare(where)


# ---- inside SGLang --------------------------------------------------------------------------------------------------


class FusedModel(nn.Module):
    """Holds weights as SGLang does: q/k/v and gate/up fused, conv1d squeezed and written by slice assignment, names
    it does not know skipped without a word."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Parameter(torch.zeros(40, 16).bfloat16())
        self.qkv = nn.Parameter(torch.zeros(48, 16).bfloat16())
        self.gate_up = nn.Parameter(torch.zeros(48, 16).bfloat16())
        self.conv = nn.Parameter(torch.zeros(20, 4).bfloat16())
        self.a_log = nn.Parameter(torch.zeros(6))
        self.norm = nn.Parameter(torch.zeros(16).bfloat16())

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        rows = {"q_proj": (self.qkv, 0, 32), "k_proj": (self.qkv, 32, 8), "v_proj": (self.qkv, 40, 8)}
        rows |= {"gate_proj": (self.gate_up, 0, 24), "up_proj": (self.gate_up, 24, 24)}
        whole = {"model.embed_tokens.weight": self.embed, "model.norm.weight": self.norm}
        whole |= {"model.layers.0.linear_attn.A_log": self.a_log}
        for name, loaded in weights:
            part = next((p for p in rows if p in name), None)
            if part:
                parameter, start, size = rows[part]
                parameter.data.narrow(0, start, size).copy_(loaded)
            elif "conv1d" in name:  # in three blocks, as a sharded loader does
                for low, high in ((0, 8), (8, 12), (12, 20)):
                    self.conv.data[low:high] = loaded.squeeze(1)[low:high]
            elif name in whole:
                assert whole[name].shape == loaded.shape
                whole[name].data.copy_(loaded)

    def hf(self) -> Weights:
        """What it holds, under HF names, by hand."""
        prefix = "model.layers.0."
        return {
            "model.embed_tokens.weight": self.embed.data,
            prefix + "self_attn.q_proj.weight": self.qkv.data[:32],
            prefix + "self_attn.k_proj.weight": self.qkv.data[32:40],
            prefix + "self_attn.v_proj.weight": self.qkv.data[40:],
            prefix + "mlp.gate_proj.weight": self.gate_up.data[:24],
            prefix + "mlp.up_proj.weight": self.gate_up.data[24:],
            prefix + "linear_attn.conv1d.weight": self.conv.data.unsqueeze(1),
            prefix + "linear_attn.A_log": self.a_log.data,
            "model.norm.weight": self.norm.data,
        }


def entries(weights: Weights) -> list[TensorEntry]:
    return [
        TensorEntry(name, str(t.dtype).removeprefix("torch."), tuple(t.shape), "none", 0, to_hex(digest_tensor(t)), ())
        for name, t in weights.items()
    ]


def test_placements_are_found_through_load_weights_without_changing_a_weight(tmp_path: Path) -> None:
    model, weights = FusedModel(), first_weights()
    model.load_weights(weights.items())
    before = {name: tensor.clone() for name, tensor in model.hf().items()}
    found = sglang_loader.PlacementRecorder().record(model, entries(weights))
    assert same(model.hf(), before)
    for name, tensor in model.hf().items():
        assert [(p.offset, p.view.numel(), p.view.data_ptr()) for p in found[name]] == [
            (0, tensor.numel(), tensor.data_ptr())
        ], name
    assert sglang_loader.read_back_digests(model, entries(weights)) == {e.name: e.digest for e in entries(weights)}


def test_read_back_goes_through_the_engines_own_mapping() -> None:
    model, weights = FusedModel(), first_weights()
    model.load_weights(weights.items())
    with torch.no_grad():
        model.conv[7, 2] += 1
    found = sglang_loader.read_back_digests(model, entries(weights))
    assert [e.name for e in entries(weights) if found[e.name] != e.digest] == [
        "model.layers.0.linear_attn.conv1d.weight"
    ]


def test_names_that_load_weights_skips_are_an_error() -> None:
    weights = {n.replace("model.", "model.language_model."): t for n, t in first_weights().items() if "norm" in n}
    with pytest.raises(
        WeightMismatch, match=r"does not place 1 tensors: model\.language_model\.norm\.weight \(0 of 16"
    ):
        sglang_loader.PlacementRecorder().record(FusedModel(), entries(weights))
    other = {"model.layers.0.linear_attn.A_log": torch.zeros(6).bfloat16()}
    with pytest.raises(WeightMismatch, match=r"A_log`: torch\.bfloat16.* is loaded into torch\.float32"):
        sglang_loader.PlacementRecorder().record(FusedModel(), entries(other))


def test_versions_follow_each_other_inside_the_engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    versions, model = chain(4), FusedModel()
    model.load_weights(versions[0].items())
    where = stage(tmp_path, versions, [delta(1)])
    monkeypatch.setenv("ASTRA_STAGE_DIR", str(where))
    monkeypatch.setenv("ASTRA_VERIFY_INTERVAL", "2")
    calls: list[str] = []
    original = FusedModel.load_weights

    def counted(self: FusedModel, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        calls.append("load")
        original(self, weights)

    monkeypatch.setattr(FusedModel, "load_weights", counted)
    for version in (1, 2, 3):
        restage(tmp_path, [delta(version)])
        sglang_loader.apply_staged(model, [])
        assert json.loads((where / "result.json").read_text())["ok"], (where / "result.json").read_text()
        assert same(model.hf(), versions[version])
        proof = json.loads(wait_for(where / "proof.json")) if version == 2 else None
        assert proof is None or (proof["ok"] and proof["version"] == 2)
    assert len(calls) == 2  # recorded once, read back at version 2


def wait_for(path: Path) -> str:
    deadline = time.monotonic() + 10
    while not path.exists() and time.monotonic() < deadline:
        time.sleep(0.005)
    return path.read_text()


def test_a_version_is_decoded_and_loaded_before_the_call_and_only_scattered_in_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    versions, model = chain(3), FusedModel()
    model.load_weights(versions[0].items())
    where = stage(tmp_path, versions, [delta(1)])
    monkeypatch.setenv("ASTRA_STAGE_DIR", str(where))
    sglang_loader.apply_staged(model)
    restage(tmp_path, [delta(2)])
    plan = (where / "next.json").read_bytes()
    deadline = time.monotonic() + 10
    while watcher.decoded(where, plan) in (None, 0.0) and time.monotonic() < deadline:
        time.sleep(0.005)
    shutil.rmtree(where / "v000002")  # nothing of it is read again
    prepared = sglang_loader._engines[model].watcher._prepared
    assert prepared is not None and prepared.loaded is not None and prepared.steps == []
    sglang_loader.apply_staged(model)
    result = json.loads((where / "result.json").read_text())
    assert result["ok"] and same(model.hf(), versions[2]), result
    assert not result["proof"] and result["loader_s"] >= result["apply_s"] + result["verify_s"]


def test_the_thread_that_decodes_ahead_outlives_an_error_of_any_kind(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    where = stage(tmp_path, chain(3), [delta(1)])
    errors: list[Exception] = [MemoryError("no room for an array")]

    def prepare(directory: Path) -> staged.Prepared:
        if errors:
            raise errors.pop()
        return staged.prepare(directory)

    def awaited() -> bool:
        plan, deadline = (where / "next.json").read_bytes(), time.monotonic() + 5
        while watcher.decoded(where, plan) in (None, 0.0) and time.monotonic() < deadline:
            time.sleep(0.005)
        return watcher.decoded(where, plan) not in (None, 0.0)

    thread = watcher.StageWatcher(where, prepare=prepare)
    assert awaited() and thread.take() is None
    assert "no room for an array" in capsys.readouterr().err
    restage(tmp_path, [delta(2)])
    assert awaited() and thread.take() is not None
    thread.close()


def test_a_plan_that_changes_nothing_wakes_the_thread_that_decodes_ahead(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    versions, model = chain(2), FusedModel()
    model.load_weights(versions[0].items())
    receiver = Subscriber("http://127.0.0.1:9", "", tmp_path / "stage")
    monkeypatch.setenv("ASTRA_STAGE_DIR", str(receiver.stage_dir))
    assert not receiver.watched
    receiver.wake(0)
    sglang_loader.apply_staged(model)
    assert receiver.outcome(0)["steps"] == 0 and same(model.hf(), versions[0])
    wait_for(receiver.stage_dir / "watching.json")
    assert receiver.watched
    stage(tmp_path, versions, [delta(1)])
    with pytest.raises(RunFailed, match="wrote no outcome of version 1"):
        receiver.outcome(1)
    sglang_loader.apply_staged(model)
    assert receiver.outcome(1)["version"] == 1 and same(model.hf(), versions[1])
    unproven = FusedModel()
    monkeypatch.setenv("ASTRA_START_VERSION", "")
    receiver.wake(-1)
    sglang_loader.apply_staged(unproven)
    with pytest.raises(RunFailed, match="the engine holds None"):
        receiver.outcome(-1)
    assert sglang_loader._engines[unproven].version is None
    receiver.close()


def test_a_read_back_that_differs_is_reported_and_takes_the_version_away(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    versions, model = chain(3), FusedModel()
    model.load_weights(versions[0].items())
    where = stage(tmp_path, versions, [delta(1)])
    monkeypatch.setenv("ASTRA_STAGE_DIR", str(where))
    monkeypatch.setenv("ASTRA_VERIFY_INTERVAL", "1")
    original = FusedModel.load_weights

    def moved(self: FusedModel, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        """After the first call, a row of another tensor is taken for the norm: what the digests cannot see."""
        if json.loads((where / "result.json").read_text())["ok"] if (where / "result.json").exists() else False:
            self.norm = nn.Parameter(self.norm.data + 1)
        original(self, weights)

    monkeypatch.setattr(FusedModel, "load_weights", moved)
    sglang_loader.apply_staged(model)
    proof = json.loads(wait_for(where / "proof.json"))
    assert not proof["ok"] and proof["version"] == 1 and "1 tensors differ: model.norm.weight" in proof["message"]
    restage(tmp_path, [delta(2)])
    for refusal in ("moved its parameters", "the engine holds None"):
        sglang_loader.apply_staged(model)
        assert refusal in json.loads((where / "result.json").read_text())["message"]


def test_anything_that_load_weights_raises_is_an_outcome_and_no_exception(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    versions, model = chain(2), FusedModel()
    where = stage(tmp_path, versions, [delta(1)])
    monkeypatch.setenv("ASTRA_STAGE_DIR", str(where))

    def broken(self: FusedModel, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        raise KeyError("model.layers.0.mlp.experts")

    monkeypatch.setattr(FusedModel, "load_weights", broken)
    sglang_loader.apply_staged(model)
    result = json.loads((where / "result.json").read_text())
    assert not result["ok"] and "KeyError: 'model.layers.0.mlp.experts'" in result["message"]


def test_a_failed_version_is_reported_and_only_a_full_one_mends_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    versions, model = chain(3), FusedModel()
    model.load_weights(versions[0].items())
    with torch.no_grad():
        model.qkv[33, 3] += 1  # an engine that is not what it says it is
    where = stage(tmp_path, versions, [delta(1)])
    monkeypatch.setenv("ASTRA_STAGE_DIR", str(where))

    def outcome() -> dict[str, Any]:
        sglang_loader.apply_staged(model)
        return dict(json.loads((where / "result.json").read_text()))

    first = outcome()
    assert not first["ok"] and "model.layers.0.self_attn.k_proj.weight" in first["message"]
    restage(tmp_path, [delta(2)])
    assert "the engine holds None" in outcome()["message"]
    restage(tmp_path, ["v000000/manifest.full.json", delta(1), delta(2)])
    last = outcome()
    assert last["ok"] and last["version"] == 2 and same(model.hf(), versions[2])


def test_parameters_that_the_engine_has_moved_are_found_again_by_a_full_version(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else a version would land, and be proved, in memory that nothing serves from."""
    versions, model = chain(4), FusedModel()
    model.load_weights(versions[0].items())
    where = stage(tmp_path, versions, [delta(1)])
    monkeypatch.setenv("ASTRA_STAGE_DIR", str(where))

    def outcome() -> dict[str, Any]:
        sglang_loader.apply_staged(model)
        return dict(json.loads((where / "result.json").read_text()))

    assert outcome()["ok"]
    model.qkv = nn.Parameter(model.qkv.data.clone())
    restage(tmp_path, [delta(2)])
    refused = outcome()
    assert not refused["ok"] and "moved its parameters" in refused["message"]
    assert same(model.hf(), versions[1])
    restage(tmp_path, ["v000000/manifest.full.json", delta(1), delta(2)])
    assert outcome()["ok"] and same(model.hf(), versions[2])
    model.norm.data = model.norm.data.clone()
    restage(tmp_path, [delta(3)])
    assert "moved its parameters" in outcome()["message"]


def test_the_loader_module_imports_nothing_of_sglang() -> None:
    source = Path(sglang_loader.__file__).read_text()
    assert "import sglang" not in source and "from sglang" not in source
