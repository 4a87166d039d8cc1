"""Versions of which only an adapter travels: merged by the receiver, bit for bit what the trainer holds."""

from __future__ import annotations

import contextlib
import json
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from staged_tools import FusedModel, first_weights, wait_for
from test_weights_publisher import shards
from transfer_tools import Server, Weights, copies, same, server, subscriber

from astracli.adapters.generic import ADAPTER
from astracli.engines import loader as engine_loader
from astracli.errors import RunFailed
from astracli.models import checkpoint_files
from astracli.weights import WeightCorrupt, WeightMismatch
from astracli.weights.device.merging import merge
from astracli.weights.format import low_rank
from astracli.weights.format.digest import bits_of
from astracli.weights.format.manifest import BaseFile, Manifest, read_stable, version_name
from astracli.weights.publish.publisher import Publisher
from astracli.weights.receive import apply
from astracli.weights.receive.decoder import DecoderProcess
from astracli.weights.receive.subscriber import Subscriber, choose_route

__all__ = ["server"]

TARGETS = ("self_attn.q_proj", "self_attn.v_proj", "mlp.up_proj")
RANK = 3
Factors = dict[str, tuple[torch.Tensor, torch.Tensor]]


# ---- the arithmetic --------------------------------------------------------------------------------------------------


def by_hand(base: np.ndarray, a_RI: np.ndarray, b_OR: np.ndarray) -> np.ndarray:
    """One number after the other, each operation rounded to fp32 by itself."""
    result = np.empty(base.shape, np.float32)
    for i, j in np.ndindex(base.shape):
        total = np.float32(b_OR[i, 0] * a_RI[0, j])
        for k in range(1, len(a_RI)):
            total = np.float32(total + np.float32(b_OR[i, k] * a_RI[k, j]))
        result[i, j] = np.float32(base[i, j] + total)
    return result


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_merging_is_the_same_by_hand_with_numpy_and_with_torch(dtype: torch.dtype, monkeypatch: Any) -> None:
    draw = torch.Generator().manual_seed(1)
    base = (0.02 * torch.randn(9, 11, generator=draw)).to(dtype)
    a_RI, b_OR = 0.1 * torch.randn(5, 11, generator=draw), 0.1 * torch.randn(9, 5, generator=draw)
    monkeypatch.setattr(low_rank, "BLOCK", 40)  # three rows at a time
    expected = torch.from_numpy(by_hand(base.float().numpy(), a_RI.numpy(), b_OR.numpy())).to(dtype)
    by_torch = torch.empty_like(base)
    merge(base, a_RI, b_OR, by_torch)
    bits = low_rank.merged_bits(bits_of(base), a_RI.numpy(), b_OR.numpy())
    assert torch.equal(by_torch, expected) and (bits == bits_of(expected)).all()
    wide = torch.empty(9, 11)
    merge(base, a_RI, b_OR, wide)
    assert torch.equal(wide, expected.float()), "into a wider tensor, rounded all the same"


def test_rounding_is_to_nearest_and_ties_go_to_even() -> None:
    values = np.array([0x3F808000, 0x3F818000, 0x3F808001, 0xBF807FFF, 0x7F800000, 0x80000000], np.uint32)
    expected = torch.from_numpy(values.view(np.float32)).bfloat16()
    assert low_rank.rounded(values.view(np.float32), 2).tolist() == bits_of(expected).tolist()
    assert low_rank.rounded(values.view(np.float32), 2)[:2].tolist() == [0x3F80, 0x3F82]


# ---- a run's versions ------------------------------------------------------------------------------------------------


def factors_of(version: int) -> Factors:
    draw, found = torch.Generator().manual_seed(version), {}
    for name, tensor in first_weights().items():
        if any(target in name for target in TARGETS):
            outputs, inputs = tensor.shape
            b_OR = 0.05 * version * torch.randn(outputs, RANK, generator=draw)
            found[name] = (torch.randn(RANK, inputs, generator=draw), b_OR)
    return found


def merged(version: int) -> Weights:
    weights = first_weights()
    for name, (a_RI, b_OR) in factors_of(version).items():
        out = torch.empty_like(weights[name])
        merge(weights[name], a_RI, b_OR, out)
        weights[name] = out
    return weights


def model_at(directory: Path, *, wide: bool = False) -> Path:
    """The model that the run started from; `wide`: its file holds fp32."""
    directory.mkdir()
    weights = {name: tensor.float() if wide else tensor for name, tensor in first_weights().items()}
    save_file(weights, directory / "model.safetensors")
    return directory


def places_in(model: Path) -> dict[str, BaseFile]:
    found = checkpoint_files.places(model, ADAPTER)
    return {name: BaseFile(place.file, place.offset, place.dtype) for name, place in found.items()}


def publisher_of(tmp_path: Path, model: Path, **options: Any) -> Publisher:
    settings: dict[str, Any] = {"transfer": "adapter", "full_interval": 10, "keep": 100, "base": places_in(model)}
    return Publisher(tmp_path / "weights", **(settings | options))


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return model_at(tmp_path / "model")


def receiver_of(server: Server, tmp_path: Path, model: Path) -> Subscriber:
    return subscriber(server, tmp_path, model_path=model)


def publish(publisher: Publisher, last: int) -> None:
    for version in range(last + 1):
        publisher.publish(version, merged(version), factors=factors_of(version))
    publisher.close()


@pytest.mark.parametrize("wide", [False, True])
def test_an_adapter_takes_any_version_to_its_own(tmp_path: Path, server: Server, wide: bool) -> None:
    model = model_at(tmp_path / "model", wide=wide)
    publish(publisher_of(tmp_path, model), 4)
    receiver, engine = receiver_of(server, tmp_path, model), copies(first_weights())
    have = 0
    for version in (1, 2, 4):  # 4 from 2: an adapter is no difference from the version before
        plan = receiver.fetch(version, have)
        numbers = sum(RANK * sum(b.shape[:1] + a.shape[1:]) for a, b in factors_of(version).values())
        assert (plan.kind, plan.bytes) == ("adapter", 4 * numbers)
        result = apply.apply(tmp_path / "stage", engine, have)
        assert (result.version, result.kind) == (version, "adapter")
        assert same(engine, merged(version))
        have = version
    receiver.close()


def test_an_engine_that_holds_nothing_takes_a_full_version_first(tmp_path: Path, server: Server, model: Path) -> None:
    publish(publisher_of(tmp_path, model, full_interval=3), 5)
    kinds = [set(read_stable(tmp_path / "weights", v)["manifests"]) for v in range(6)]
    assert kinds == [{"full"}, {"adapter"}, {"adapter"}, {"adapter", "full"}, {"adapter"}, {"adapter"}]
    engine: Weights = {name: torch.full_like(tensor, 7.0) for name, tensor in first_weights().items()}
    receiver = receiver_of(server, tmp_path, model)
    plan = receiver.fetch(5, None)
    assert (plan.kind, [step[:7] for step in plan.steps]) == ("full", [version_name(3), version_name(5)])
    assert apply.apply(tmp_path / "stage", engine, None).version == 5
    assert same(engine, merged(5))
    receiver.fetch(4, 5)
    with pytest.raises(WeightMismatch, match="not known which weights"):
        apply.apply(tmp_path / "stage", engine, None)
    assert same(engine, merged(5)), "nothing was touched"
    receiver.close()


def test_what_a_receiver_needs_is_kept(tmp_path: Path, model: Path) -> None:
    publish(publisher_of(tmp_path, model, full_interval=4, keep=2), 7)
    assert sorted(path.name for path in (tmp_path / "weights").glob("v*")) == [version_name(v) for v in (4, 6, 7)]


def test_routes() -> None:
    full, adapter = ({"file": name, "base_version": None, "bytes": size} for name, size in (("f", 1000), ("a", 5)))
    detail = {4: {"full": full, "adapter": adapter}, 6: {"adapter": adapter}}
    assert choose_route(detail, 6, 1).steps == ((6, "a"),)
    assert (choose_route(detail, 6, None).steps, choose_route(detail, 6, None).bytes) == (((4, "f"), (6, "a")), 1005)
    assert choose_route(detail, 4, None).steps == ((4, "f"),)
    assert choose_route(detail, 4, 6).kind == "adapter"
    with pytest.raises(RunFailed, match="nothing leads"):
        choose_route({6: {"adapter": adapter}}, 6, None)


def test_another_base_is_seen_by_the_digests(tmp_path: Path, server: Server, model: Path) -> None:
    publish(publisher_of(tmp_path, model), 1)
    place = places_in(model)["model.layers.0.mlp.up_proj.weight"]
    file = bytearray((model / place.file).read_bytes())
    file[place.offset + 6] ^= 1
    (model / place.file).write_bytes(file)
    receiver, engine = receiver_of(server, tmp_path, model), copies(first_weights())
    receiver.fetch(1, 0)
    with pytest.raises(WeightMismatch, match=r"1 of 9 tensors have the wrong digest: model\.layers\.0\.mlp\.up_proj"):
        apply.apply(tmp_path / "stage", engine, 0)
    (model / place.file).unlink()
    with pytest.raises(WeightCorrupt, match=r"cannot read `model\.layers\.0"):
        apply.apply(tmp_path / "stage", engine, 0)
    receiver.close()


def test_the_decoding_child_merges_alike(tmp_path: Path, server: Server, model: Path) -> None:
    publish(publisher_of(tmp_path, model, full_interval=3), 4)
    receiver = receiver_of(server, tmp_path, model)
    with contextlib.closing(DecoderProcess()) as child:
        for target, have in ((2, 0), (4, None)):
            receiver.fetch(target, have)
            engine = copies(first_weights())
            prepared = child.prepare(tmp_path / "stage")
            assert apply.apply(tmp_path / "stage", engine, have, prepared).version == target
            assert same(engine, merged(target))
        (model / "model.safetensors").unlink()
        receiver.fetch(1, 4)
        with pytest.raises(WeightCorrupt, match="cannot read"):
            child.prepare(tmp_path / "stage")
    receiver.close()


def test_sglangs_loader_merges_stages_and_reads_back(
    tmp_path: Path, server: Server, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish(publisher_of(tmp_path, model, full_interval=3), 4)
    engine, receiver, stage = FusedModel(), receiver_of(server, tmp_path, model), tmp_path / "stage"
    for key, value in (
        ("STAGE_DIR", str(stage)), ("VERIFY_INTERVAL", "1"), ("START_VERSION", ""), ("STAGING", "host"),
        ("STAGING_KEPT", "1"),
    ):  # fmt: skip
        monkeypatch.setenv(f"ASTRA_{key}", value)
    made: list[Any] = []
    try:
        for target, have in ((0, None), (1, 0), (2, 1), (4, None)):
            receiver.fetch(target, have)
            engine_loader.apply_staged(engine, [])
            made = list(engine_loader.loaded_models.values())
            outcome = json.loads((stage / "result.json").read_text())
            assert outcome["ok"], outcome["message"]
            assert same(engine.hf(), merged(target))
            assert json.loads(wait_for(stage / "readback.json"))["ok"]
            if target == 2:
                assert outcome["staging"] == "host", "as a full version waits"
    finally:
        for loaded in made:
            loaded.watcher.close()
            loaded.decoder.close()
        receiver.close()


def test_two_ranks_say_what_they_hold_and_the_first_writes(tmp_path: Path, server: Server, model: Path) -> None:
    def run(rank: int) -> None:
        own = publisher_of(tmp_path, model, rank=rank, world_size=2, session="a", rank_timeout_s=20)
        for version in (0, 1):
            own.publish(version, shards(merged(version), rank, 2), factors=factors_of(version))
        own.close()

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    receiver, engine = receiver_of(server, tmp_path, model), copies(first_weights())
    receiver.fetch(1, 0)
    apply.apply(tmp_path / "stage", engine, 0)
    assert same(engine, merged(1))
    manifest = Manifest.from_bytes((tmp_path / "weights" / version_name(1) / "manifest.adapter.json").read_bytes())
    assert list(manifest.files) == ["adapter-00000.bin"]
    receiver.close()


def test_a_manifest_that_makes_no_sense_is_refused(tmp_path: Path, model: Path) -> None:
    publish(publisher_of(tmp_path, model), 1)
    whole = Manifest.from_bytes((tmp_path / "weights" / version_name(1) / "manifest.adapter.json").read_bytes())
    name, place = next(iter(whole.base.items()))
    tensor = next(t for t in whole.tensors if t.name == name)
    (piece,) = tensor.pieces

    def with_piece(**changes: Any) -> Manifest:
        other = replace(tensor, pieces=(replace(piece, **changes),))
        return replace(whole, tensors=tuple(other if t.name == name else t for t in whole.tensors))

    for wrong in (
        replace(whole, base={}),
        replace(whole, base=whole.base | {name: replace(place, file="../x")}),
        replace(whole, base=whole.base | {name: replace(place, dtype="I8")}),
        replace(whole, base_version=0),
        with_piece(bytes=piece.bytes - 4),
        with_piece(encoding="raw"),
        with_piece(start=1, length=piece.length - 1),
    ):
        with pytest.raises(WeightCorrupt):
            Manifest.from_bytes(wrong.to_bytes())
    assert Manifest.from_bytes(whole.to_bytes()) == whole
