"""Whole jobs whose workers are small stand-ins: how they end, and who is told."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import warm
from children import children
from family import wait_for
from launch_tools import INPUTS, plan_of, tiny
from rich.console import Console
from typer.testing import CliRunner

from astracli.cli.main import app
from astracli.config import recipe_io
from astracli.errors import RunFailed
from astracli.launch import configs, summary, watch
from astracli.launch.configs import RunContext
from astracli.launch.job import Job
from astracli.process.config import EngineConfig, load_config
from astracli.report.live import LiveView, RunProgress
from astracli.report.summary_table import summary_rows
from astracli.runs import find as runs
from astracli.runs import metrics
from astracli.runs.run_dir import RunDir

REPOSITORY = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def forked(monkeypatch: pytest.MonkeyPatch) -> None:
    """The stand-ins of a job that runs in this process need not import what they need, each of them."""
    monkeypatch.setattr("astracli.launch.job.Forks", lambda *_: warm.WarmForks())


WORKER = """
import json, sys, time
from astracli.errors import RunFailed
from astracli.process.config import EngineConfig, RolloutConfig, TrainerConfig
from astracli.process.worker import worker_main

def run(config, reporter):
    reporter.ready()
    if isinstance(config, TrainerConfig):
        from astracli.hub.client import HubClient
        with_hub(config, reporter, HubClient(config.hub_url, config.token))
    while not reporter.stop_requested.wait(0.05):
        pass

def with_hub(config, reporter, hub):
    TRAINER

role = json.load(open(sys.argv[1]))["role"]
worker_main(run, {"engine": EngineConfig, "rollout": RolloutConfig, "trainer": TrainerConfig}[role])
"""
DONE = """hub.announce(0, 0); time.sleep(1.5)
    hub.metrics([{"step": 0, "process": "trainer", "train_s": 1.0, "step_s": 1.0, "wait_s": 0.25, "reward_mean": 0.5}])
    sys.exit(0)"""


def job_with(tmp_path: Path, trainer: str, **recipe_changes: Any) -> Job:
    """A job like `astra train` makes it, every worker replaced by WORKER with this trainer."""
    (tmp_path / "stand_in.py").write_text(WORKER.replace("TRAINER", trainer))
    recipe = tiny(eval__every=0, train__steps=1, **recipe_changes)
    plan = plan_of(recipe)
    search = {"PYTHONPATH": os.pathsep.join([str(tmp_path), str(REPOSITORY)])}
    plan = replace(
        plan, processes=tuple(replace(p, module="stand_in", env={**p.env, **search}) for p in plan.processes)
    )
    run_path = runs.create("t", tmp_path / "run")
    run_path.next_attempt()
    return Job(RunContext(recipe, plan, run_path, 1, INPUTS))


def files(path: Path) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
    """(status.json, summary.json)"""
    return json.loads((path / "status.json").read_text()), json.loads((path / "summary.json").read_text())


def test_job_runs_to_its_end(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    job = job_with(tmp_path, DONE)
    assert job.run() == 0
    status, found = files(tmp_path / "run")
    assert (status["state"], status["exit_code"], found["state"]) == ("done", 0, "done")
    assert found["training"]["wait_share"] == 0.25 and found["phases_s"]["training"] > 0
    assert found["memory"]["peak_bytes"] > 20e6 and set(found["memory"]["peak_bytes_by_process"]) >= {
        "trainer",
        "engine0",
    }
    console = capfd.readouterr().err
    assert "starting" in console and "all processes are ready" in console and "stopping" in console
    assert not children()


def test_a_job_that_is_interrupted_before_its_first_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def ctrl_c(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    job = job_with(tmp_path, DONE)
    monkeypatch.setattr(configs, "build", ctrl_c)
    assert job.run() == 130 and job.summary == {}
    assert RunDir(tmp_path / "run").shown_state() == "interrupted"
    assert not (tmp_path / "run" / "summary.json").exists()


def test_ctrl_c_while_the_hub_is_set_up_starts_no_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build = configs.build

    def slowly(*words: Any) -> Any:
        os.kill(os.getpid(), signal.SIGINT)
        return build(*words)

    job = job_with(tmp_path, DONE)
    monkeypatch.setattr(configs, "build", slowly)
    assert job.run() == 130
    assert (job.summary["state"], job.summary["steps"]) == ("interrupted", 0)
    assert not list((tmp_path / "run" / "logs").rglob("*.log"))


def test_a_job_whose_reader_has_gone_goes_on(tmp_path: Path) -> None:
    code = (
        f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
        "from pathlib import Path\nimport test_jobs as t\n"
        f"sys.exit(t.job_with(Path({str(tmp_path)!r}), t.DONE).run())\n"
    )
    there, here = os.pipe()
    os.close(there)
    assert subprocess.run([sys.executable, "-c", code], stderr=here, timeout=60).returncode == 0
    os.close(here)
    assert RunDir(tmp_path / "run").shown_state() == "done"


def test_job_that_fails_says_so_everywhere(tmp_path: Path) -> None:
    job = job_with(tmp_path, 'raise RunFailed("the gradient is not finite", "lower rollout.temperature")')
    (tmp_path / "run" / "recipe.json").write_text(recipe_io.to_json(job.context.recipe))
    with pytest.raises(RunFailed) as failure:
        job.run()
    assert "`trainer` ended with exit code 1" in failure.value.message
    assert "error: the gradient is not finite" in failure.value.message
    path = tmp_path / "run"
    assert failure.value.hint == (
        f"when that is mended, go on with `astra train --resume {path}`; "
        "another value of `rollout.temperature` takes a new run, --resume refuses it: "
        f"`astra train --recipe {path}/recipe.json --set rollout.temperature=...`"
    )
    status, found = files(tmp_path / "run")
    assert (status["state"], status["exit_code"], found["state"]) == ("failed", 1, "failed")
    assert status["cause"].startswith("`trainer` ended with exit code 1")
    assert status["hint"] == failure.value.hint and not status["waits"]
    for said in (status["last_lines"], found["last_lines"]):
        assert said[:2] == ["  error: the gradient is not finite", "  hint: lower rollout.temperature"]
    assert "the gradient is not finite" in (tmp_path / "run" / "report.html").read_text()
    for command in ("status", "report"):
        shown = CliRunner().invoke(app, ["runs", command, str(tmp_path / "run")])
        assert "  error: the gradient is not finite" in shown.stdout.splitlines()
    assert not children()


ONCE = """if not config.start:
        hub.announce(0, 0)
        reporter.progress(step=0)
        time.sleep(1.2)
        raise RuntimeError("CUDA error: unspecified launch failure")
    assert (config.resume_step, config.start, hub.state().latest_version) == (0, 1, None)
    """


def test_a_trainer_that_met_a_cuda_error_goes_on_by_itself(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Its hub is rewound, everyone is started anew as on a resume, and summary and summary table say so."""
    job = job_with(tmp_path, ONCE + DONE, launch__max_resumes=1)
    assert job.run() == 0
    status, found = files(tmp_path / "run")
    assert (status["state"], status["attempt"], found["steps"]) == ("done", 1, 1)
    (resume,) = found["resumes"]
    assert (resume["at_step"], resume["from_step"]) == (0, 0) and resume["seconds"] > 0
    assert found["phases_s"]["resuming"] > 0
    rows = dict(summary_rows(found))
    assert rows["resumes"].startswith("1: at step 0 from step 0 (the GPU reported an error: CUDA error: unspecified")
    assert load_config(["w", str(tmp_path / "run" / "config" / "engine0.json")], EngineConfig).await_weights
    assert "the run goes on from the beginning, there is no checkpoint yet, time 1 of 1" in capfd.readouterr().err


def test_a_cpu_run_goes_on_only_when_asked_to(tmp_path: Path) -> None:
    with pytest.raises(RunFailed, match="`trainer` ended with exit code 75"):
        job_with(tmp_path, ONCE + DONE).run()


class BrokenSink:
    def __init__(self, *names: str):
        self.names, self.calls = names, ["made"]

    def write(self, records: Sequence[Mapping[str, Any]]) -> None:
        self._call("write")

    def close(self) -> None:
        self._call("close")

    def _call(self, name: str) -> None:
        self.calls.append(name)
        if name in self.names:
            raise ConnectionError(f"no network for {name}")


def test_what_only_shows_a_run_cannot_end_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    sinks = [BrokenSink("write", "close"), BrokenSink()]
    monkeypatch.setattr(metrics, "open_sinks", lambda *_: sinks)
    monkeypatch.setattr(summary, "build", lambda *_, **__: int(None))  # type: ignore[call-overload]
    twice = DONE.replace("sys.exit", "time.sleep(1.2); hub.metrics([{'step': 1}]); sys.exit")
    job = job_with(tmp_path, twice)
    assert job.run() == 0 and job.summary == {}
    assert RunDir(tmp_path / "run").shown_state() == "done"
    assert sinks[0].calls == ["made", "write", "close"], "not asked again"
    assert sinks[1].calls[0] == "made" and sinks[1].calls[-1] == "close"
    assert set(sinks[1].calls[1:-1]) == {"write"} and len(sinks[1].calls) >= 4
    console = capfd.readouterr().err
    assert "warning: `BrokenSink` gets no more figures, metrics.jsonl has all: ConnectionError: no network" in console
    assert "warning: no summary table: TypeError: int() argument" in console


def test_a_terminal_that_is_gone_takes_no_run_with_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Gone:
        def update(self, *_: RunProgress) -> None:
            raise OSError(5, "Input/output error")

        close = update

    monkeypatch.setattr(watch, "open_view", Gone)
    assert job_with(tmp_path, DONE).run() == 0


NAN = """steps = [(0, 0.5, 1.25, 2.0), (1, 0.1, 900.0, 0.01)]
    names = ("step", "arrived_reward_mean", "grad_norm", "entropy")
    hub.metrics([{"process": "trainer", "lr": 0.5, **dict(zip(names, step))} for step in steps])
    raise RunFailed("the model produces NaN at weight version 2", "see grad_norm in the metrics")"""


def test_weights_that_are_no_numbers_end_a_run_with_its_last_steps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Said by whoever notices; in these words too when the end cannot be shown."""
    monkeypatch.setattr(summary, "build", lambda *_, **__: int(None))  # type: ignore[call-overload]
    monkeypatch.setattr(metrics, "open_sinks", lambda *_: [BrokenSink("close")])
    with pytest.raises(RunFailed) as failure:
        job_with(tmp_path, NAN, train__learning_rate=0.5).run()
    first, *rest = failure.value.message.splitlines()
    assert first.startswith("`trainer` ended with exit code 1")
    assert "error: the model produces NaN at weight version 2" in rest[0]
    assert rest[-4:] == [
        "  reward: step 0 0.5, step 1 0.1",
        "  entropy: step 0 2, step 1 0.01",
        "  gradient norm: step 0 1.25, step 1 900",
        "  learning rate: step 0 0.5, step 1 0.5",
    ]
    assert str(failure.value.hint).startswith("lower train.learning_rate (0.5) in a new run; ")


def test_the_terminal_is_given_back_when_no_process_could_be_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    views: list[LiveView] = []
    console = Console(file=io.StringIO(), force_terminal=True)
    monkeypatch.setattr(watch, "open_view", lambda: views.append(LiveView(console)) or views[-1])
    monkeypatch.setattr("astracli.launch.local.LocalLauncher.start", full)
    with pytest.raises(RunFailed, match="No space left"):
        job_with(tmp_path, DONE).run()
    hidden, shown = (console.file.getvalue().count(f"\x1b[?25{end}") for end in "lh")  # type: ignore[attr-defined]
    assert len(views) == 1 and hidden == shown > 0, "the cursor is back"


def test_usr1_has_the_trainer_make_a_checkpoint_and_ends_the_job(tmp_path: Path) -> None:
    saved = tmp_path / "saved"
    job = job_with(tmp_path, f"""assert reporter.save_requested.wait(60); open({str(saved)!r}, "w"); sys.exit(0)""")

    def when_it_runs() -> None:
        def running() -> bool:
            status = job.context.run_dir.status()
            return status is not None and status.phase == "running"

        wait_for(running)
        os.kill(os.getpid(), signal.SIGUSR1)

    before = signal.getsignal(signal.SIGUSR1)
    thread = threading.Thread(target=when_it_runs)
    thread.start()
    assert job.run() == 130 and saved.exists() and job.save.is_set()
    thread.join()
    status, _ = files(tmp_path / "run")
    assert (status["state"], status["cause"]) == ("interrupted", "it was told to make a checkpoint and end")
    assert signal.getsignal(signal.SIGUSR1) is before and not children()
