"""Our loader inside an engine: fused parameters found through `load_weights`, versions, read-backs, errors."""

from __future__ import annotations

import gc
import json
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from staged_tools import FusedModel, chain, delta, entries, first_weights, restage, stage, wait_for
from torch import nn
from transfer_tools import same

from astracli.engines import loader as engine_loader
from astracli.weights import WeightMismatch
from astracli.weights.receive import apply, watcher
from astracli.weights.receive.placement import PlacementRecorder
from astracli.weights.receive.resident import Resident
from astracli.weights.receive.subscriber import Subscriber


@pytest.fixture(autouse=True)
def engines(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[engine_loader.LoadedModel]]:
    """All that a test makes. SGLang's live as long as their process; here threads and decoders end with the test."""
    made: list[engine_loader.LoadedModel] = []

    class Kept(engine_loader.LoadedModel):
        def __init__(self, *given: Any):
            super().__init__(*given)
            made.append(self)

    monkeypatch.setattr(engine_loader, "LoadedModel", Kept)
    yield made
    for engine in made:
        engine.watcher.close()
        engine.decoder.close()


def test_placements_are_found_through_load_weights_without_changing_a_weight(tmp_path: Path) -> None:
    model, weights = FusedModel(), first_weights()
    model.load_weights(weights.items())
    before = {name: tensor.clone() for name, tensor in model.hf().items()}
    found = PlacementRecorder().record(model, entries(weights))
    assert same(model.hf(), before)
    for name, tensor in model.hf().items():
        assert [(p.offset, p.view.numel(), p.view.data_ptr()) for p in found[name]] == [
            (0, tensor.numel(), tensor.data_ptr())
        ], name
    assert Resident(found).digests(weights) == {e.name: e.digest for e in entries(weights)}


def test_digests_under_hf_names_see_one_changed_bit_of_a_fused_parameter() -> None:
    model, weights = FusedModel(), first_weights()
    model.load_weights(weights.items())
    with torch.no_grad():
        model.conv[7, 2] += 1
    found = Resident(PlacementRecorder().record(model, entries(weights))).digests(weights)
    assert [e.name for e in entries(weights) if found[e.name] != e.digest] == [
        "model.layers.0.linear_attn.conv1d.weight"
    ]


def test_names_that_load_weights_skips_are_an_error() -> None:
    weights = {n.replace("model.", "model.language_model."): t for n, t in first_weights().items() if "norm" in n}
    with pytest.raises(
        WeightMismatch, match=r"does not place 1 tensors: model\.language_model\.norm\.weight \(0 of 16"
    ):
        PlacementRecorder().record(FusedModel(), entries(weights))
    other = {"model.layers.0.linear_attn.A_log": torch.zeros(6).bfloat16()}
    with pytest.raises(WeightMismatch, match=r"A_log`: torch\.bfloat16.* is loaded into torch\.float32"):
        PlacementRecorder().record(FusedModel(), entries(other))


def test_versions_follow_each_other_inside_the_engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    versions, model = chain(5), FusedModel()
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
        engine_loader.apply_staged(model, [])
        assert json.loads((where / "result.json").read_text())["ok"], (where / "result.json").read_text()
        assert same(model.hf(), versions[version])
        readback = json.loads(wait_for(where / "readback.json")) if version == 2 else None
        assert readback is None or (readback["ok"] and readback["version"] == 2)
        parts = ("wait_s", "place_s", "tables_s", "launch_s", "device_s")
        assert readback is None or 0 < sum(readback[part] for part in parts) <= readback["readback_s"]
    assert len(calls) == 1, "recorded once: the read-back at version 2 found every parameter where it was"
    before = model.qkv
    model.qkv = nn.Parameter(before.data.clone())  # the same values elsewhere
    restage(tmp_path, [delta(4)])
    engine_loader.apply_staged(model, [])
    assert json.loads((where / "result.json").read_text())["ok"] and same(model.hf(), versions[4])
    assert len(calls) == 2


def decoded_ahead(where: Path) -> bool:
    """Whether the thread has an answer to the plan that lies there, within ten seconds."""
    plan, deadline = (where / "next.json").read_bytes(), time.monotonic() + 60
    while watcher.decoded(where, plan) in (None, 0.0) and time.monotonic() < deadline:
        time.sleep(0.005)
    return watcher.decoded(where, plan) not in (None, 0.0)


def test_a_version_is_decoded_and_loaded_before_the_call_and_only_scattered_in_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    versions, model = chain(3), FusedModel()
    model.load_weights(versions[0].items())
    where = stage(tmp_path, versions, [delta(1)])
    monkeypatch.setenv("ASTRA_STAGE_DIR", str(where))
    engine_loader.apply_staged(model)
    restage(tmp_path, [delta(2)])
    assert decoded_ahead(where)
    shutil.rmtree(where / "v000002")  # nothing of it is read again
    prepared = engine_loader.loaded_models[model].watcher.prepared
    assert prepared is not None and prepared.loaded is not None and prepared.flat == []
    engine_loader.apply_staged(model)
    result = json.loads((where / "result.json").read_text())
    assert result["ok"] and same(model.hf(), versions[2]), result
    assert not result["readback"] and result["loader_s"] >= result["apply_s"] + result["verify_s"]


def test_the_thread_that_decodes_ahead_outlives_an_error_of_any_kind(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    where = stage(tmp_path, chain(3), [delta(1)])
    errors: list[Exception] = [MemoryError("no room for an array")]

    def prepare(directory: Path) -> apply.Prepared:
        if errors:
            raise errors.pop()
        return apply.prepare(directory)

    thread = watcher.StageWatcher(where, prepare=prepare)
    assert decoded_ahead(where) and thread.take() is None
    assert "no room for an array" in capsys.readouterr().err
    restage(tmp_path, [delta(2)])
    assert decoded_ahead(where) and thread.take() is not None
    thread.close()


def test_the_thread_says_nothing_of_a_model_that_has_gone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    versions, model = chain(3), FusedModel()
    model.load_weights(versions[0].items())
    where = stage(tmp_path, versions, [delta(1)])
    monkeypatch.setenv("ASTRA_STAGE_DIR", str(where))
    engine_loader.apply_staged(model)
    assert json.loads((where / "result.json").read_text())["ok"]
    del model
    gc.collect()
    restage(tmp_path, [delta(2)])
    assert decoded_ahead(where)
    assert not json.loads((where / "watching.json").read_text())["ok"] and capsys.readouterr().err == ""


def outcome(receiver: Subscriber) -> dict[str, Any]:
    return dict(json.loads((receiver.stage_dir / "result.json").read_text()))


def test_a_plan_that_changes_nothing_wakes_the_thread_that_decodes_ahead(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    versions, model = chain(2), FusedModel()
    model.load_weights(versions[0].items())
    receiver = Subscriber("http://127.0.0.1:9", "", tmp_path / "stage")
    monkeypatch.setenv("ASTRA_STAGE_DIR", str(receiver.stage_dir))
    assert not receiver.watched
    receiver.wake(0)
    engine_loader.apply_staged(model)
    assert outcome(receiver)["steps"] == 0 and same(model.hf(), versions[0])
    wait_for(receiver.stage_dir / "watching.json")
    assert receiver.watched
    stage(tmp_path, versions, [delta(1)])
    engine_loader.apply_staged(model)
    assert outcome(receiver)["version"] == 1 and same(model.hf(), versions[1])
    unproven = FusedModel()
    monkeypatch.setenv("ASTRA_START_VERSION", "")
    receiver.wake(-1)
    engine_loader.apply_staged(unproven)
    assert not outcome(receiver)["ok"] and "the engine holds None" in outcome(receiver)["message"]
    assert engine_loader.loaded_models[unproven].version is None
    receiver.close()


def test_a_read_back_that_differs_is_reported_and_takes_the_version_away(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    versions, model = chain(3), FusedModel()
    model.load_weights(versions[0].items())
    where = stage(tmp_path, versions, [delta(1)])
    monkeypatch.setenv("ASTRA_STAGE_DIR", str(where))
    monkeypatch.setenv("ASTRA_VERIFY_INTERVAL", "1")
    succeed = apply.succeed

    def moved(*told: Any) -> None:
        """Behind the pause's own check a parameter is replaced: what digests of the old memory cannot see."""
        model.norm = nn.Parameter(model.norm.data + 1)
        succeed(*told)

    monkeypatch.setattr(apply, "succeed", moved)
    engine_loader.apply_staged(model)
    readback = json.loads(wait_for(where / "readback.json"))
    assert (
        not readback["ok"] and readback["version"] == 1 and "1 tensors differ: model.norm.weight" in readback["message"]
    )
    restage(tmp_path, [delta(2)])
    engine_loader.apply_staged(model)
    assert "the engine holds None" in json.loads((where / "result.json").read_text())["message"]


def test_what_was_loaded_for_a_parameter_that_has_moved_since_is_not_applied_to_where_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    versions, model = chain(3), FusedModel()
    model.load_weights(versions[0].items())
    where = stage(tmp_path, versions, [delta(1)])
    monkeypatch.setenv("ASTRA_STAGE_DIR", str(where))
    engine_loader.apply_staged(model)
    restage(tmp_path, [delta(2)])
    watching, deadline = engine_loader.loaded_models[model].watcher, time.monotonic() + 60
    while (watching.prepared is None or watching.prepared.loaded is None) and time.monotonic() < deadline:
        time.sleep(0.005)
    before = model.qkv
    model.qkv = nn.Parameter(before.data.clone())
    kept = before.detach().clone()
    engine_loader.apply_staged(model)
    assert json.loads((where / "result.json").read_text())["ok"] and same(model.hf(), versions[2])
    assert torch.equal(before, kept), "freed memory, in a real engine"


def test_nobody_takes_the_weights_away_under_a_read_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever waited for it has given up: releasing memory must wait (`settle`), and so must the next version."""
    versions, model = chain(3), FusedModel()
    model.load_weights(versions[0].items())
    where = stage(tmp_path, versions, [delta(1)])
    monkeypatch.setenv("ASTRA_STAGE_DIR", str(where))
    monkeypatch.setenv("ASTRA_VERIFY_INTERVAL", "1")
    engine_loader.settle(model)  # of an engine in which nothing of ours ever ran
    reads, go_on = threading.Semaphore(0), threading.Semaphore(0)
    original = Resident.digests

    def slow(self: Resident, names: Iterable[str]) -> dict[str, str]:
        if threading.current_thread().name == "read-back":
            reads.release()
            assert go_on.acquire(timeout=60)
        return original(self, names)

    def waits(call: Callable[[Any], None]) -> None:
        done = threading.Event()
        thread = threading.Thread(target=lambda: (call(model), done.set()))
        thread.start()
        assert not done.wait(0.1) and not (where / "readback.json").exists()
        go_on.release()
        assert done.wait(60)
        thread.join()

    monkeypatch.setattr(Resident, "digests", slow)
    engine_loader.apply_staged(model)
    assert reads.acquire(timeout=60)
    waits(engine_loader.settle)
    assert json.loads((where / "readback.json").read_text())["ok"], "its result is there when settle returns"
    restage(tmp_path, [delta(2)])
    engine_loader.apply_staged(model)
    assert reads.acquire(timeout=60)
    restage(tmp_path, ["v000000/manifest.full.json", delta(1), delta(2)])  # the same version in full
    waits(engine_loader.apply_staged)
    assert reads.acquire(timeout=60) and not (where / "readback.json").exists(), "that read-back was of other weights"
    go_on.release()
    assert json.loads(wait_for(where / "readback.json"))["version"] == 2 and same(model.hf(), versions[2])


def test_the_interpreter_changes_hands_quickly_only_while_one_of_ours_wants_it() -> None:
    before = sys.getswitchinterval()
    with engine_loader.quickly:
        with engine_loader.quickly:
            assert sys.getswitchinterval() == pytest.approx(2e-4)
        assert sys.getswitchinterval() == pytest.approx(2e-4)
    assert sys.getswitchinterval() == before


def test_anything_that_load_weights_raises_is_an_outcome_and_no_exception(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    versions, model = chain(2), FusedModel()
    where = stage(tmp_path, versions, [delta(1)])
    monkeypatch.setenv("ASTRA_STAGE_DIR", str(where))

    def broken(self: FusedModel, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        raise KeyError("model.layers.0.mlp.experts")

    monkeypatch.setattr(FusedModel, "load_weights", broken)
    engine_loader.apply_staged(model)
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
        engine_loader.apply_staged(model)
        return dict(json.loads((where / "result.json").read_text()))

    first = outcome()
    assert not first["ok"] and "model.layers.0.self_attn.k_proj.weight" in first["message"]
    restage(tmp_path, [delta(2)])
    assert "the engine holds None" in outcome()["message"]
    restage(tmp_path, ["v000000/manifest.full.json", delta(1), delta(2)])
    last = outcome()
    assert last["ok"] and last["version"] == 2 and same(model.hf(), versions[2])


def test_parameters_that_were_moved_and_changed_are_refused_and_found_again_by_a_full_version(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As SGLang's own work after loading may do."""
    versions, model = chain(4), FusedModel()
    model.load_weights(versions[0].items())
    where = stage(tmp_path, versions, [delta(1)])
    monkeypatch.setenv("ASTRA_STAGE_DIR", str(where))

    def outcome() -> dict[str, Any]:
        engine_loader.apply_staged(model)
        return dict(json.loads((where / "result.json").read_text()))

    assert outcome()["ok"]
    model.qkv = nn.Parameter(model.qkv.data.flip(0))
    restage(tmp_path, [delta(2)])
    refused = outcome()
    assert not refused["ok"] and "wrong digest" in refused["message"]
    restage(tmp_path, ["v000000/manifest.full.json", delta(1), delta(2)])
    assert outcome()["ok"] and same(model.hf(), versions[2])
    model.norm.data = model.norm.data.clone()  # the same parameter in other memory
    restage(tmp_path, [delta(3)])
    assert outcome()["ok"] and same(model.hf(), versions[3])


def test_the_loader_module_imports_nothing_of_sglang() -> None:
    source = Path(engine_loader.__file__).read_text()
    assert "import sglang" not in source and "from sglang" not in source
