"""What runs on a GPU: Triton kernels against their torch and numpy forms, publishing and applying device tensors."""

from __future__ import annotations

import contextlib
import json
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transfer_tools import same_files

from astracli.engines import loader as engine_loader
from astracli.process.atomic import write_atomic
from astracli.weights.device import host
from astracli.weights.device.difference import bits_torch
from astracli.weights.format import codec, container, digest
from astracli.weights.format.digest import bits_of
from astracli.weights.format.flat import flatten
from astracli.weights.format.manifest import Manifest, seal, version_name
from astracli.weights.publish import payload
from astracli.weights.publish.publisher import Publisher
from astracli.weights.publish.snapshot import Shard, copies
from astracli.weights.receive import apply, resident, staging
from astracli.weights.receive.decoder import DecoderProcess
from astracli.weights.receive.placement import EngineSlice

pytestmark = pytest.mark.gpu

Weights = dict[str, torch.Tensor]


def random_weights(size: int, dtype: torch.dtype, seed: int) -> torch.Tensor:
    draw = np.random.default_rng(seed)
    kind = "<i2" if dtype == torch.bfloat16 else "<i4"
    top = np.iinfo(kind)
    return torch.from_numpy(draw.integers(top.min, top.max, size, kind, endpoint=True)).view(dtype)


RANGES = [
    (5, 0), (16384, 0), (40_000, 8), (33_000, 16381), (3 << 14, 2 << 14), (1, 16383), (1_000_003, 7), (0, 3),
    (2_500_000, 1 << 22),
]  # fmt: skip
"""(elements, start): aligned and not, inside a row, across many."""


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_one_pass_gives_the_digests_of_numpy(dtype: torch.dtype) -> None:
    from astracli.weights.device.scatter_kernels import DigestPlan

    host = [random_weights(size, dtype, k) for k, (size, _) in enumerate(RANGES)]
    starts = [start for _, start in RANGES]
    there = [tensor.cuda() for tensor in host]
    found = DigestPlan(list(zip(there, starts, strict=True)), range(len(RANGES))).lanes()
    assert found == [digest.digest_bits(bits_of(t), s) for t, s in zip(host, starts, strict=True)]
    odd = there[6][3:]  # an address that no vector load may use
    assert DigestPlan([(odd, 10)], [0]).lanes() == [digest.digest_bits(bits_of(host[6][3:]), 10)]


def test_ranges_of_one_slot_are_added_up_and_a_plan_sees_new_values() -> None:
    from astracli.weights.device.scatter_kernels import DigestPlan

    whole = random_weights(100_000, torch.bfloat16, 0).cuda()
    plan = DigestPlan([(whole[60_000:], 60_000), (whole[:60_000], 0), (whole[:7], 0)], [1, 1, 0])
    assert plan.lanes()[1] == digest.digest_tensor(whole)
    whole[70_000] += 1
    assert plan.lanes()[1] == digest.digest_tensor(whole)


@pytest.mark.parametrize("encoding", list(container.ENCODINGS))
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_scatter_kernel_is_the_numpy_update(encoding: str, dtype: torch.dtype) -> None:
    base, new = (bits_of(random_weights(50_000, dtype, seed)).copy() for seed in (1, 2))
    new[::3] = base[::3]
    at = codec.changed_indices(base, new)
    blob = codec.encode_as(encoding, base, new, at).payload
    update = codec.decode(blob, encoding, len(at), len(base), base.itemsize)
    view = torch.from_numpy(base.view(f"<i{base.itemsize}")).view(dtype).cuda()
    prepared = apply.Prepared(b"", 1, "delta", 0, None, flat=[flatten([("a", 0, update)])])
    hands = resident.Resident({"a": [EngineSlice(view[:1001], 0), EngineSlice(view[1001:], 1001)]})
    assert hands._triton
    hands.apply(prepared)
    assert np.array_equal(bits_of(view.cpu()), new)


def test_every_variant_is_compiled_before_it_is_needed() -> None:
    from astracli.weights.device import scatter_kernels

    scatter_kernels.warm(torch.device("cuda"))


def model_weights(seed: int = 0) -> Weights:
    shapes: dict[str, tuple[int, ...]] = {
        "embed.weight": (3000, 160), "conv1d.weight": (96, 1, 4), "up.weight": (640, 320), "norm.weight": (320,),
    }  # fmt: skip
    draw = torch.Generator().manual_seed(seed)
    found = {name: (0.02 * torch.randn(shape, generator=draw)).bfloat16() for name, shape in shapes.items()}
    return found | {"A_log": torch.randn(32, generator=draw)}


def later(weights: Weights, seed: int) -> Weights:
    draw = torch.Generator().manual_seed(seed)
    changed = {}
    for name, tensor in weights.items():
        share = 1.0 if name == "A_log" else 0.3 if name == "up.weight" else 0.03
        changed[name] = torch.where(torch.rand(tensor.shape, generator=draw) < share, tensor * 1.01, tensor)
    return changed


def model_versions(count: int) -> list[dict[str, torch.Tensor]]:
    found = [model_weights()]
    while len(found) < count:
        found.append(later(found[-1], len(found)))
    return found


def test_a_publisher_writes_the_same_files_from_device_tensors(tmp_path: Path) -> None:
    versions = model_versions(5)
    for where in ("cpu", "cuda"):
        publisher = Publisher(tmp_path / where, full_interval=2, threads=4)
        for version, weights in enumerate(versions):
            publisher.publish(version, {name: tensor.to(where) for name, tensor in weights.items()})
            assert {t.flat.device.type for t in publisher.base.values()} == {where if version else "cpu"}
        publisher.close()
    assert same_files(tmp_path / "cpu", tmp_path / "cuda") == 3 * 2 + 4 * 2


def test_what_leaves_its_gpu_waits_on_the_host(tmp_path: Path) -> None:
    """The parameters themselves are published, trained on, and compared with what was there: the same files."""
    versions = model_versions(5)
    plain, leaving = Publisher(tmp_path / "cpu"), Publisher(tmp_path / "cuda", threads=4, leaves=True)
    live = {name: tensor.cuda() for name, tensor in versions[0].items()}
    for version, weights in enumerate(versions):
        plain.publish(version, weights)
        for name, tensor in live.items():
            tensor.copy_(weights[name])
        before = torch.cuda.memory_allocated()
        leaving.publish(version, live, owned=True)
        assert torch.cuda.memory_allocated() == before
        kept = [t.flat for t in leaving.base.values()]
        assert all(flat.device.type == "cpu" and flat.is_pinned() for flat in kept if len(flat))
    plain.close()
    leaving.close()
    assert same_files(tmp_path / "cpu", tmp_path / "cuda", "delta-0*") == 4
    assert same_files(tmp_path / "cpu", tmp_path / "cuda") > 4


def test_many_passes_beside_a_stream_that_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Published in the background while the main stream overwrites what was published and takes new memory."""
    monkeypatch.setattr(payload, "PIECE", 1 << 10)
    versions = model_versions(6)
    plain, beside = Publisher(tmp_path / "cpu"), Publisher(tmp_path / "cuda", threads=4)
    live = {name: tensor.cuda() for name, tensor in versions[0].items()}
    for version, weights in enumerate(versions):
        plain.publish(version, weights)
        for name, tensor in live.items():
            tensor.copy_(weights[name])
        beside.publish_async(version, copies(live, {name: tensor.dtype for name, tensor in live.items()}), owned=True)
        for _ in range(20):
            taken = [torch.randn(1 << 20, device="cuda") for _ in range(4)]
            for tensor in live.values():
                tensor.normal_()
        del taken
    plain.close()
    beside.close()
    assert same_files(tmp_path / "cpu", tmp_path / "cuda", "delta-*") == 5


def test_shards_on_a_device(tmp_path: Path) -> None:
    weights = {name: tensor.cuda() for name, tensor in model_weights().items()}
    parts: dict[str, Any] = {n: Shard(t.reshape(-1), 0, tuple(t.shape)) for n, t in weights.items()}
    publisher = Publisher(tmp_path)
    publisher.publish(0, parts)
    weights["norm.weight"][3] += 1
    assert publisher.publish(1, parts).changed == 1
    publisher.close()


def test_large_tensors_move_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "CHUNK", 4096)
    host.pinned_buffers.cache_clear()
    there = {"a": random_weights(50_001, torch.bfloat16, 0).cuda(), "b": random_weights(7_777, torch.float32, 1).cuda()}
    with ThreadPoolExecutor(3) as pool:
        copies = host.to_host(there, pool.map)
    for name, tensor in there.items():
        parts = []
        for bits, free in host.chunks_of(tensor):
            parts.append(bits.copy())
            free()
        assert np.array_equal(np.concatenate(parts), bits_of(tensor.cpu())) and len(parts) > 3
        assert np.array_equal(bits_of(copies[name]), bits_of(tensor.cpu()))
    back = {name: torch.zeros_like(tensor) for name, tensor in there.items()}
    host.to_device((bits_torch(back[name]), bits_of(copies[name])) for name in there)
    torch.cuda.synchronize()
    assert all(torch.equal(bits_torch(back[name]), bits_torch(there[name])) for name in there)
    assert host.pinned_buffers().qsize() == host.BUFFERS
    host.pinned_buffers.cache_clear()


@pytest.mark.parametrize("spare", [0, 1 << 60])
def test_what_a_child_decoded_is_applied_on_the_device(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spare: int
) -> None:
    monkeypatch.setattr(resident, "SPARE_BYTES", spare)
    old, new = model_weights(), later(model_weights(), 1)
    publisher = Publisher(tmp_path, full_interval=1)
    publisher.publish(0, old)
    publisher.publish(1, new)
    publisher.close()
    engine = {name: tensor.cuda() for name, tensor in old.items()}
    hands = resident.Resident({name: apply.placements(tensor) for name, tensor in engine.items()})
    with contextlib.closing(DecoderProcess()) as child:
        for step, base in (("v000001/manifest.json", 0), ("v000000/manifest.full.json", None)):
            plan = {"version": 1 if base == 0 else 0, "kind": "full" if base is None else "delta", "base_version": base}
            (tmp_path / "next.json").write_bytes(seal({**plan, "steps": [step], "model_path": None}))
            apply.apply(tmp_path, hands.placed, base, child.prepare(tmp_path), hands)
            wanted = old if base is None else new
            assert all(np.array_equal(bits_of(engine[n].cpu()), bits_of(wanted[n])) for n in wanted)


class Model(torch.nn.Module):
    """Loads by copy_ and by slice assignment, as SGLang's layers do."""

    def __init__(self, weights: Weights):
        super().__init__()
        self.held = torch.nn.ParameterDict(
            {n.replace(".", "_"): torch.nn.Parameter(torch.zeros_like(t).cuda()) for n, t in weights.items()}
        )

    def load_weights(self, weights: Any) -> None:
        for name, loaded in weights:
            target = self.held[name.replace(".", "_")].data
            if "conv1d" in name:
                for low, high in ((0, 32), (32, 96)):
                    target[low:high] = loaded[low:high]
            else:
                target.copy_(loaded)


@pytest.mark.parametrize("spare", [0, 1 << 60])
def test_versions_follow_each_other_inside_an_engine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spare: int
) -> None:
    """With room for what is staged on the device, and without."""
    monkeypatch.setattr(resident, "SPARE_BYTES", spare)
    versions = [model_weights()]
    publisher = Publisher(tmp_path / "weights", full_interval=100)
    publisher.publish(0, versions[0])
    model, stage = Model(versions[0]), tmp_path / "weights"
    model.load_weights(versions[0].items())
    monkeypatch.setenv("ASTRA_STAGE_DIR", str(stage))
    monkeypatch.setenv("ASTRA_VERIFY_INTERVAL", "1")
    for version in (1, 2, 3):
        versions.append(later(versions[-1], version))
        publisher.publish(version, versions[-1])
        step = f"{version_name(version)}/manifest.json"
        plan = {"version": version, "kind": "delta", "base_version": version - 1, "steps": [step], "model_path": None}
        (stage / "next.json").write_bytes(seal(plan))
        engine_loader.apply_staged(model)
        assert '"ok": true' in (stage / "result.json").read_text(), (stage / "result.json").read_text()
        manifest = Manifest.from_bytes((stage / step).read_bytes())
        for entry in manifest.tensors:
            held = model.held[entry.name.replace(".", "_")].data
            assert digest.to_hex(digest.digest_tensor(held)) == entry.digest
    publisher.close()


@pytest.mark.parametrize("where", ["gpu", "host"])
@pytest.mark.parametrize("kept", ["1", ""])
def test_full_versions_wait_beside_an_engine_and_are_copied_in_its_pause(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str, kept: str
) -> None:
    monkeypatch.setattr(staging, "CHUNK", 1 << 16)  # some tensors span several
    versions = model_versions(4)
    publisher = Publisher(tmp_path / "weights", transfer="full", keep=10)
    for version, weights in enumerate(versions):
        publisher.publish(version, weights)
    publisher.close()
    stage = tmp_path / "weights"
    model = Model(versions[0])
    for name, value in {"STAGE_DIR": str(stage), "START_VERSION": "", "VERIFY_INTERVAL": "1"}.items():
        monkeypatch.setenv(f"ASTRA_{name}", value)
    monkeypatch.setenv("ASTRA_STAGING", where)
    monkeypatch.setenv("ASTRA_STAGING_KEPT", kept)
    places = set()
    for version in range(4):
        step = f"{version_name(version)}/manifest.full.json"
        plan = {"version": version, "kind": "full", "base_version": None, "steps": [step], "model_path": None}
        write_atomic(stage / "next.json", seal(plan))  # a thread may look at any moment
        if version:
            watching, deadline = engine_loader.loaded_models[model].watcher, time.monotonic() + 60
            while (watching.prepared is None or watching.prepared.version != version) and time.monotonic() < deadline:
                time.sleep(0.01)
            (held,) = [one.held for one in watching.prepared.loaded]  # type: ignore[union-attr]
            assert {s.is_cuda for _, s in held.pairs} == {where == "gpu"}
            assert len(held.pairs) > len(versions[0]) and (where == "gpu" or held.pairs[0][1].is_pinned())
            places.add(engine_loader.loaded_models[model].staging.memory.data_ptr())  # type: ignore[union-attr]
            for file in (stage / version_name(version)).glob("full-*"):
                file.unlink()
        engine_loader.apply_staged(model)
        known = engine_loader.loaded_models[model]
        known.settle()
        result = json.loads((stage / "result.json").read_text())
        assert result["ok"] and (not version or result["staging"] == where), result
        assert json.loads((stage / "readback.json").read_text())["ok"]
        for name, tensor in versions[version].items():
            assert np.array_equal(bits_of(model.held[name.replace(".", "_")].data.cpu()), bits_of(tensor))
        deadline = time.monotonic() + 60
        while not kept and known.staging.memory is not None and time.monotonic() < deadline:
            time.sleep(0.01)
        assert (known.staging.memory is None) == (not kept or not version)
    assert len(places) == 1 or not kept
    before = torch.cuda.memory_reserved()
    engine_loader.settle(model)
    gone = known.staging.memory is None
    assert gone == (where == "gpu" or not kept) and (
        not kept or where == "host" or torch.cuda.memory_reserved() < before
    )
    known.staging.free()
    known.watcher.close()
    known.decoder.close()
