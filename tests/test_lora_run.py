"""A trainer with LoRA from its start to its end: versions that engines take, kills, deterministic bytes, exports."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from trainer_job import STEPS, Job, model_dir
from transfer_tools import Server, same_files, subscriber

from astracli.adapters.qwen3_5 import ADAPTER
from astracli.config import recipe_io
from astracli.config.recipe_lora import LoraTable
from astracli.data import fetch
from astracli.engines.embedded.process import loader
from astracli.engines.embedded.weights import EngineWeights
from astracli.errors import UserError
from astracli.launch import from_run, inputs
from astracli.runs.run_dir import RunDir
from astracli.training import checkpoint, export_run
from astracli.training.loop import TrainLoop

__all__ = ["model_dir"]

LORA: dict[str, Any] = {"rank": 4, "alpha": 8.0}
RATE = {"learning_rate": 1e-2}


def with_lora(directory: Path, model: Path, transfer: str, **tables: dict[str, Any]) -> Job:
    made = Job(directory, model)
    made.learning = RATE
    made.tables = {"lora": LORA, "weights": {"transfer": transfer, "background": "off", "full_interval": 3}} | tables
    return made


@pytest.fixture
def job(tmp_path: Path, model_dir: Path) -> Iterator[Job]:
    made = with_lora(tmp_path, model_dir, "adapter")
    yield made
    made.server.thread.stop()


@pytest.fixture(scope="module")
def expected(model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    """Weights of a run that nothing interrupted, with which merged deltas travelled."""
    whole = with_lora(tmp_path_factory.mktemp("whole"), model_dir, "delta")
    loop = whole.loop()
    loop.start()
    whole.train(loop)
    whole.server.thread.stop()
    return loop.trainer.masters.wire_full()


def engine_of(model: Path) -> EngineWeights:
    return EngineWeights(*loader(ADAPTER, "cpu")(model), verify_interval=1)


def holds(engine: EngineWeights, loop: TrainLoop) -> bool:
    full = loop.trainer.masters.wire_full()
    same = (torch.equal(tensor, engine.copies[name]) for name, tensor in full.items())
    return all(same) and all(torch.equal(engine.parameters[n].float(), t.float()) for n, t in full.items())


def test_engines_follow_by_adapters_and_one_that_starts_late_takes_the_newest(
    job: Job, model_dir: Path, expected: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    loop = job.loop()
    loop.start()
    server, engine = Server(job.run_dir / "weights"), engine_of(model_dir)
    receiver = subscriber(server, tmp_path, model_path=model_dir)
    kinds = []
    for version in range(1, STEPS + 1):
        job.train(loop, until=version)
        kinds.append(receiver.fetch(version, engine.have).kind)
        reply = engine.apply_staged(tmp_path / "stage", version)
        assert reply.success, reply.message
        receiver.readback(version)
        assert holds(engine, loop)
    assert set(kinds) == {"adapter"}
    late = engine_of(model_dir)
    assert receiver.fetch(STEPS, late.have).kind == "adapter"
    assert late.apply_staged(tmp_path / "stage", STEPS).success and holds(late, loop)
    receiver.readback(STEPS)
    late.copies["model.layers.0.mlp.up_proj.weight"].view(-1)[5] += 1  # memory that was damaged
    assert receiver.fetch(3, STEPS).kind == "adapter"
    assert late.apply_staged(tmp_path / "stage", 3).success, "its matrices are made anew"
    receiver.readback(3)
    late.copies["model.norm.weight"].view(-1)[5] += 1  # what no adapter brings
    receiver.fetch(STEPS, 3)
    assert "wrong digest" in late.apply_staged(tmp_path / "stage", STEPS).message
    assert receiver.fetch(STEPS, None).kind == "full", "the newest full version, then the adapter"
    assert late.apply_staged(tmp_path / "stage", STEPS).success and holds(late, loop)
    receiver.close()
    server.stop()
    # what travels changes nothing of what is trained
    full = loop.trainer.masters.wire_full()
    assert all(torch.equal(full[name], tensor) for name, tensor in expected.items())


@pytest.mark.parametrize("where", ["train", "publish"])
def test_a_kill_changes_nothing(
    job: Job, expected: dict[str, torch.Tensor], where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    loop = job.loop()
    loop.start()
    job.train(loop, until=3)
    job.roll(3)
    target: tuple[Any, str] = (loop.trainer, "train") if where == "train" else (loop.publisher, "publish_now")

    def die(*arguments: Any, **options: Any) -> Any:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(*target, die)
        with pytest.raises(KeyboardInterrupt):
            loop.advance()
    loop.saver.wait()
    again = job.resume()
    job.train(again)
    full = again.trainer.masters.wire_full()
    assert all(torch.equal(full[name], tensor) for name, tensor in expected.items())
    assert job.store.finished and job.store.state().counts.consumed_steps == STEPS


def test_deterministic_runs_give_the_same_bytes(model_dir: Path, tmp_path: Path) -> None:
    made = []
    for name in ("one", "two"):
        torch.manual_seed(0)  # as every process does at its start
        job = with_lora(tmp_path / name, model_dir, "adapter", launch={"deterministic": True})
        loop = job.loop()
        loop.start()
        job.train(loop)
        loop.finish()
        job.server.thread.stop()
        made.append(job.run_dir)
    torch.use_deterministic_algorithms(False)
    assert same_files(made[0] / "weights", made[1] / "weights") > 2 * STEPS
    assert same_files(made[0] / "checkpoints", made[1] / "checkpoints") >= 4


def test_an_export_is_merged_or_the_adapter_alone(job: Job, model_dir: Path, tmp_path: Path) -> None:
    loop = job.loop()
    loop.start()
    job.train(loop)
    loop.finish()
    recipe, checkpoints = job.config().recipe, job.run_dir / "checkpoints"
    export_run.export_checkpoint(checkpoints, recipe, model_dir, tmp_path / "whole")
    places = (tmp_path / "whole", job.run_dir / "export")
    merged, of_the_run = (load_file(place / "model.safetensors") for place in places)
    full = loop.trainer.masters.wire_full()
    assert merged.keys() == of_the_run.keys() and all(torch.equal(merged[n], t) for n, t in of_the_run.items())
    assert all(torch.equal(merged[name].bfloat16(), t.bfloat16()) for name, t in full.items())
    assert export_run.export_checkpoint(checkpoints, recipe, model_dir, tmp_path / "a", step=2, adapter_only=True) == 2
    assert json.loads((tmp_path / "a" / "adapter_config.json").read_text())["r"] == 4
    assert (tmp_path / "a" / "adapter_model.safetensors").stat().st_size < 100_000
    whole = recipe.model_copy(update={"lora": None})
    with pytest.raises(UserError, match="it has no adapter"):
        export_run.export_checkpoint(checkpoints, whole, model_dir, tmp_path / "b", adapter_only=True)


def test_a_new_run_goes_on_with_adapters_and_moments(job: Job, model_dir: Path, tmp_path: Path) -> None:
    """They belong to the weights without adapters, so these come along, not merged ones."""
    first = job.loop()
    first.start()
    job.train(first, until=2)
    first.saver.wait()
    recipe, place = job.config().recipe, checkpoint.place(job.run_dir / "checkpoints", 2)
    source = from_run.Source("run@2", RunDir(job.run_dir), recipe, 2, "checkpoint", place, model_dir)
    (new := RunDir(tmp_path / "new")).path.mkdir()
    taken = from_run.take(recipe, source, new, keep_optimizer=True)
    initial = from_run.initial_model(new)
    assert taken.model.path == str(initial)
    assert (initial / "model.safetensors").read_bytes() == (model_dir / "model.safetensors").read_bytes()
    other = with_lora(tmp_path / "other", initial, "adapter")
    second = other.loop(initial=from_run.initial_checkpoint(new))
    second.start()
    full = second.trainer.masters.wire_full()
    assert all(torch.equal(full[name], tensor) for name, tensor in first.trainer.masters.wire_full().items())
    other.server.thread.stop()
    for lora, words in ((None, "train \\[lora\\] of rank 4 and all weights"), ({"rank": 2}, "rank 4 and .* rank 2")):
        table = LoraTable.model_validate(lora) if lora else None
        with pytest.raises(UserError, match=words):
            from_run.checked(recipe.model_copy(update={"lora": table}), source, keep_optimizer=True)


# ---- before a start --------------------------------------------------------------------------------------------------


def in_fp64(folder: Path) -> None:
    from safetensors.torch import save_file

    tensors = load_file(folder / "model.safetensors")
    save_file({name: t.double() for name, t in tensors.items()}, folder / "model.safetensors")


@pytest.mark.parametrize(
    ("overrides", "damage", "message"),
    [
        (["lora.targets=q_proj,query"], None, "no linear layer of this model's blocks is named `query`"),
        (["weights.transfer=adapter"], in_fp64, r"is in F64"),
        (["weights.transfer=adapter"], None, ""),
    ],
)
def test_what_lora_asks_of_a_checkpoint(
    tmp_path: Path, overrides: list[str], damage: Callable[[Path], None] | None, message: str
) -> None:
    folder = Path(shutil.copytree(fetch.bundled("astra:tiny"), tmp_path / "model"))
    if damage is not None:
        damage(folder)
    recipe = recipe_io.load("tiny-lora-m2po-delta", [*overrides, f"model.path={folder}"])
    if message:
        with pytest.raises(UserError, match=message):
            inputs.check_checkpoint(folder, recipe)
    else:
        inputs.check_checkpoint(folder, recipe)
