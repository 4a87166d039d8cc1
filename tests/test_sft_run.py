"""A supervised run: kills change nothing, engines get what is evaluated, and the commands of docs/sft-howto.md."""

from __future__ import annotations

import json
import re
import threading
from pathlib import Path
from typing import Any

import configs
import numpy as np
import pytest
import torch
import warm
from hub_tools import open_store
from launch_tools import tiny
from machines import facts
from test_hub_api import TOKEN, Server
from test_plan import TINY, load, planned
from test_sft import asking
from trainer_job import FakeReporter
from transformers import AutoModelForCausalLM

from astracli.cli.main import run as astra
from astracli.data import arithmetic, fetch
from astracli.errors import RunFailed
from astracli.launch import from_run
from astracli.process.config import SampleFile, TrainerConfig
from astracli.rl.types import Group, Sample, Segment
from astracli.rollout.groups import SampleWriter
from astracli.runs import metrics
from astracli.runs.run_dir import RunDir
from astracli.training import checkpoint
from astracli.training.export_run import export_checkpoint
from astracli.training.fsdp import Ranks
from astracli.training.loop import TrainLoop

STEPS = 5


# ---- the loop --------------------------------------------------------------------------------------------------------


class Job:
    """A hub, a run directory and a trainer in this process, on generated examples."""

    def __init__(self, directory: Path, *, engines: bool, **tables: dict[str, Any]):
        self.run_dir = directory / "run"
        self.run_dir.mkdir(parents=True)
        self.model = fetch.bundled("astra:tiny")
        self.recipe = asking(
            train={"steps": STEPS, "batch_groups": 4, "minibatches": 1, "learning_rate": 1e-3},
            checkpoint={"every": 2},
            weights={"transfer": "delta", "background": "off"},
            eval={"benchmarks": ["arithmetic-heldout"], "every": 2},
            model={"path": "astra:tiny"},
            **({"sft": {"label_smoothing": 0.1}} | tables),
        )
        self.names = ("engine0",) if engines else ()
        settings: dict[str, Any] = {"steps": STEPS, "eval_every": 2 * engines, "engines": self.names}
        self.store = open_store(directory, own_batches=True, batch_groups=4, history_steps=2, **settings)
        self.server, self.reporter = Server(self.store, directory), FakeReporter()

    def config(self, **changes: Any) -> TrainerConfig:
        engines = tuple({"name": name, "url": "http://x", "stage_dir": self.run_dir} for name in self.names)
        return configs.trainer(
            run_dir=self.run_dir, hub_url=self.server.url, token=TOKEN, recipe=self.recipe, model_path=self.model,
            engines=engines, data_paths={"": None}, **changes,
        )  # fmt: skip

    def loop(self, **changes: Any) -> TrainLoop:
        made = TrainLoop(self.config(**changes), self.reporter, Ranks())  # type: ignore[arg-type]
        made.start()
        return made

    def resume(self) -> TrainLoop:
        newest = checkpoint.latest(self.run_dir / "checkpoints")
        step = newest.step if newest else 0
        self.store.rewind(step, step)
        return self.loop(attempt=2, resume_step=step)

    def records(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.server.metrics.read_text().splitlines()]

    def versions(self) -> list[int]:
        return [int(path.name[1:]) for path in sorted((self.run_dir / "weights").glob("v*"))]


def finished(loop: TrainLoop) -> dict[str, torch.Tensor]:
    while loop.step < STEPS:
        assert loop.advance()
    loop.finish()
    return loop.trainer.masters.wire_full()


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    """Weights of a run that nothing interrupted, with nobody to serve."""
    job = Job(tmp_path_factory.mktemp("whole"), engines=False)
    found = finished(job.loop())
    job.server.thread.stop()
    assert job.versions() == [], "nobody is there to evaluate: nothing is published"
    lines = [line for line in job.records() if "loss" in line]
    assert [line["step"] for line in lines] == list(range(STEPS))
    assert {"loss", "tokens", "lr", "grad_norm", "tokens_per_s", "epoch", "too_long", "step_s"} <= lines[0].keys()
    assert (job.run_dir / "export" / "model.safetensors").is_file()
    assert job.store.state().counts.consumed_steps == STEPS
    return found


class Killed(BaseException):
    """The process is gone: nothing after it runs."""


@pytest.mark.parametrize("where", ["train", "save", "ack"])
def test_a_kill_at_any_point_changes_nothing(
    expected: dict[str, torch.Tensor], where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def die(*arguments: Any, **options: Any) -> Any:
        raise Killed

    job = Job(tmp_path, engines=False)
    loop = job.loop()
    while loop.step < 3:
        assert loop.advance()
    assert loop.hub is not None
    targets: dict[str, tuple[Any, str]] = {
        "train": (loop.source, "train"),
        "save": (loop.saver, "begin"),
        "ack": (loop.hub, "ack"),
    }
    with monkeypatch.context() as patch:
        patch.setattr(*targets[where], die)
        with pytest.raises(Killed):
            loop.advance()
    loop.saver.wait()  # a process that is gone writes no more
    again = job.resume()
    assert again.step == (4 if where == "ack" else 2)
    found = finished(again)
    job.server.thread.stop()
    assert found.keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in found.items())
    assert job.store.state().counts.consumed_steps == STEPS


def test_adapters_are_trained_on_examples_through_a_kill_and_peft_merges_what_the_run_exports(tmp_path: Path) -> None:
    """The base stays, the adapters learn; a run that goes on from step 2 ends with the same bits as one without a
    break."""
    lora = {"lora": {"rank": 4, "alpha": 8}}
    whole, broken = (Job(tmp_path / name, engines=False, **lora) for name in ("whole", "broken"))
    expected = finished(whole.loop())
    loop = broken.loop()
    while loop.step < 3:
        assert loop.advance()
    loop.saver.wait()
    again = broken.resume()
    assert again.step == 2
    found = finished(again)
    for job in (whole, broken):
        job.server.thread.stop()
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in found)

    out = tmp_path / "adapter"
    taken = export_checkpoint(broken.run_dir / "checkpoints", broken.recipe, broken.model, out, adapter_only=True)
    assert taken == STEPS
    peft = pytest.importorskip("peft", reason="peft is not installed")
    base, exported = (
        AutoModelForCausalLM.from_pretrained(place, dtype=torch.float32)
        for place in (broken.model, broken.run_dir / "export")
    )
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    merged = peft.PeftModel.from_pretrained(base, out).merge_and_unload().state_dict()
    changed = {name for name in before if not torch.equal(merged[name], before[name])}
    assert changed and all(name.endswith("_proj.weight") or ".in_proj_" in name for name in changed)
    for name, tensor in exported.state_dict().items():
        if name in changed:  # an export is rounded to bf16
            assert torch.allclose(tensor, merged[name], rtol=2**-8, atol=1e-6), name
            assert not torch.equal(tensor, before[name]), name
        else:
            assert torch.equal(tensor, before[name]), name


def test_engines_get_the_versions_that_are_evaluated_and_a_stop_ends_the_loop(tmp_path: Path) -> None:
    job = Job(tmp_path, engines=True)
    loop = job.loop()
    assert job.versions() == [0]
    while loop.step < 4:
        assert loop.advance()
    assert job.versions() == [0, 2, 4]
    assert [one.due_step for one in job.store.state().evals] == [0, 2], "the one that waits stands for step 4 too"
    assert job.store.target("engine0").version == 0, "pinned there by the evaluation of step 0"
    job.reporter.stop_requested.set()
    assert not loop.advance()
    job.server.thread.stop()


def test_in_a_deterministic_run_a_version_waits_for_the_evaluation_before(tmp_path: Path) -> None:
    job = Job(tmp_path, engines=True, launch={"deterministic": True})
    loop = job.loop()
    assert loop.advance()
    done: list[bool] = []
    thread = threading.Thread(target=lambda: done.append(loop.advance()))
    thread.start()
    while "the evaluation before to end" not in job.reporter.said:
        thread.join(0.05)
        assert thread.is_alive()
    assert job.versions() == [0]
    job.store.eval_done(0, 0, {"overall": {}})
    thread.join()
    job.server.thread.stop()
    assert done == [True] and job.versions() == [0, 2]


# ---- commands --------------------------------------------------------------------------------------------------------


def test_without_evaluations_no_engine_is_planned() -> None:
    chosen = asking(eval={"benchmarks": ["arithmetic-heldout"], "every": 2}, model={"path": "astra:tiny"})
    every = planned(chosen, facts(), TINY, command="sft")
    assert [process.name for process in every.processes] == ["engine0", "rollout", "trainer", "eval"]
    assert [process.children for process in every.processes] == [0, 0, 0, 1], "nothing is graded but evaluations"
    alone = planned(asking(model={"path": "astra:tiny"}), facts(), TINY, command="sft")
    assert [process.name for process in alone.processes] == ["trainer"]
    words = (
        "sft.label_smoothing=0.0",
        "algorithm.kl_coef=0.0",
        "eval.every=0",
        "resources.train_gpus=2",
        "resources.rollout_gpus=1",
    )
    on_gpus = planned(load("qwen3.5-4b-m2po-delta", *words), facts("9.0", 3, host_gib=512), command="sft")
    assert [(process.name, process.gpus) for process in on_gpus.processes] == [("trainer", (0,)), ("trainer1", (1,))]
    assert not [problem for problem in on_gpus.problems if problem.kind in ("gpus", "memory")]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["train", "tiny-sft"], "recipe `tiny-sft` has a table [sft]"),
        (["rollout", "tiny-sft"], "recipe `tiny-sft` has a table [sft]"),
        (["sft", "qwen3.5-tiny-m2po-delta"], "recipe `qwen3.5-tiny-m2po-delta` has no table [sft]"),
        (["sft", "tiny-sft", "--set", "algorithm.kl_coef=0.1"], "algorithm.kl_coef is for reinforcement learning"),
        (["sft"], "no recipe given"),
    ],
)
def test_a_recipe_of_the_other_kind_is_refused(words: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert astra(words) == 2
    assert said in capsys.readouterr().err


def test_a_row_that_breaks_later_ends_the_run_with_its_name(tmp_path: Path) -> None:
    """Products have no worked solution."""
    job = Job(tmp_path, engines=False, data={"levels": ["mul2"]})
    loop = job.loop()
    with pytest.raises(RunFailed, match="has no worked solution"):
        loop.advance()
    job.server.thread.stop()


def blocks(kind: str) -> list[str]:
    page = (Path(__file__).parents[1] / "docs" / "sft-howto.md").read_text(encoding="utf-8")
    return re.findall(rf"<!-- test: {kind} -->\n```\w*\n(.*?)```", page, re.S)


def right_and_wrong(path: Path, groups: int) -> None:
    """What `astra rollout --keep right` writes: of each group one right sample and one that is left out."""
    writer = SampleWriter(SampleFile(path=path, groups=groups, keep="right"))
    for index in range(groups):
        problem = arithmetic.draw(index, 0)
        drawn = Segment(0, np.zeros(1, np.int32), np.zeros(1, np.float32))
        right = Sample(0, [drawn], "stop", verdict="right", text=arithmetic.worked_text(problem.question))
        samples = [right, Sample(1, [drawn], "stop", verdict="wrong", text="0")]
        writer.write(Group(index, problem.id, np.zeros(1, np.int32), samples, problem.question, problem.answer))


def test_the_three_commands_of_the_howto(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Supervised training is run as it stands there, but with one thread; what starts engines, to its plan."""
    monkeypatch.chdir(tmp_path)
    (text,), (commands,) = blocks("recipe"), blocks("commands")
    (tmp_path / "warm.toml").write_text(text)
    rollout, sft, train = (line.split()[1:] for line in commands.strip().splitlines())
    assert astra([*rollout, "--dry-run"]) == 0
    right_and_wrong(tmp_path / "solved.jsonl", 16)
    monkeypatch.setattr("astracli.launch.job.Forks", lambda *_: warm.WarmForks())
    assert astra([*sft, "--set", "resources.threads.trainer=1"]) == 0
    said = capsys.readouterr().err
    assert "run warm: trainer;" in said and "loss" in said
    run = RunDir(tmp_path / "warm")
    assert run.shown_state() == "done" and (run.export / "model.safetensors").is_file()
    summary = json.loads(run.summary_json.read_text())
    assert summary["steps"] == 3 and summary["training"]["loss"] is not None and summary["bottleneck"] is None
    assert summary["training"]["tokens"] == sum(
        line["tokens"] for line in metrics.read(run.metrics_jsonl) if "loss" in line
    )
    assert astra([*train, "--dry-run"]) == 0
    source = from_run.find(str(run.path))
    assert (source.step, source.kind) == (3, "export")
    taken = from_run.take(from_run.checked(tiny(), source), source, RunDir(tmp_path / "rl"), keep_optimizer=False)
    assert Path(taken.model.path) == tmp_path / "rl" / "initial"
    for words in (["runs", "status", "warm"], ["runs", "list", "--root", "."], ["runs", "report", "warm"]):
        assert astra(words) == 0
    assert "sft, recipe warm" in capsys.readouterr().out
    assert astra(["train", "--from", "warm", "--dry-run"]) == 2
    assert "has a table [sft]" in capsys.readouterr().err
    assert astra(["sft", "--resume", "warm", "--set", "sft.label_smoothing=0.1", "--dry-run"]) == 2
    assert "trained on other examples" in capsys.readouterr().err
