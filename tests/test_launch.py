"""From a recipe to processes: configs, environment, resume rules; and whole jobs whose workers are small stand-ins."""

from __future__ import annotations

import io
import json
import os
import signal
import stat
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
from children import children
from rich.console import Console

from astracli.config import recipe_io
from astracli.config.recipe import Recipe
from astracli.errors import RunFailed, UserError
from astracli.launch import configs, recipe_changes, run, summary, watch
from astracli.launch.configs import RunContext
from astracli.launch.inputs import Inputs
from astracli.launch.job import Job
from astracli.launch.launcher import Process
from astracli.launch.local import child_spec
from astracli.plan.types import LaunchPlan
from astracli.plan.view import to_json
from astracli.process.children import ChildSpec
from astracli.process.config import EngineConfig, EvalConfig, Role, RolloutConfig, TrainerConfig, load_config
from astracli.report.live import LiveView, RunProgress
from astracli.report.summary_table import summary_rows
from astracli.runs import find as runs
from astracli.runs import metrics
from astracli.runs.run_dir import RunDir

REPOSITORY = Path(__file__).parents[1]


def tiny(**recipe_changes: Any) -> Recipe:
    """The shipped tiny recipe with dotted keys changed (`train__steps=3`)."""
    sets = [f"{key.replace('__', '.')}={json.dumps(value)}" for key, value in recipe_changes.items()]
    return recipe_io.load("qwen3.5-tiny-m2po-delta", sets)


def plan_of(recipe: Recipe) -> LaunchPlan:
    return run.planned(recipe, "train")


INPUTS = Inputs(Path("/m"), {"": None}, {})


def context_of(recipe: Recipe, path: Path, **more: Any) -> RunContext:
    return RunContext(recipe, plan_of(recipe), RunDir(path), 1, INPUTS, token="secret", **more)


def build(context: RunContext) -> list[Process]:
    return configs.build(context, "http://127.0.0.1:1")


def specs_of(context: RunContext) -> dict[str, ChildSpec]:
    """How each process would be started here; its config is written."""
    return {process.name: child_spec(process) for process in build(context)}


def test_every_process_gets_its_config_and_only_its_owner_reads_it(tmp_path: Path) -> None:
    recipe = tiny(resources__engines=2, resources__train_ranks=2)
    specs = specs_of(context_of(recipe, tmp_path, resume_step=4))
    assert list(specs) == ["engine0", "engine1", "rollout", "trainer", "trainer1", "eval"]
    kinds = [EngineConfig, EngineConfig, RolloutConfig, TrainerConfig, TrainerConfig, EvalConfig]
    told: dict[str, Any] = {
        name: load_config(["w", spec.argv[-1]], kind) for (name, spec), kind in zip(specs.items(), kinds, strict=True)
    }
    for name, spec in specs.items():
        file = tmp_path / "config" / f"{name}.json"
        assert spec.argv[1:] == ("-P", "-m", spec.argv[3], str(file))
        assert stat.S_IMODE(file.stat().st_mode) == 0o600
        assert told[name].recipe == recipe and told[name].token == "secret" and told[name].name == name
        assert spec.log == tmp_path / "logs" / "attempt_1" / f"{name}.log"
        assert "secret" not in " ".join([*spec.argv, *spec.env.values()])
    urls = [engine.url for engine in told["rollout"].engines]
    ports = [told[name].port for name in ("engine0", "engine1")]
    assert len({*ports}) == 2 and urls == [f"http://127.0.0.1:{port}" for port in ports]
    assert told["engine0"].stage_dir == told["eval"].engines[0].stage_dir == tmp_path / "stage" / "engine0"
    assert told["engine0"].stage_dir.is_dir() and told["engine0"].await_weights
    assert told["engine0"].mem_fraction_static == 0.8, "the engine's own, where the plan derives none"
    trainer = told["trainer1"]
    assert (trainer.resume_step, trainer.role, trainer.attention) == (4, Role.TRAINER, "sdpa")


def test_children_are_offline_threaded_and_past_any_proxy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_PROXY", "intranet")
    recipe = tiny(resources__train_ranks=2, resources__threads__trainer=3)
    specs = specs_of(context_of(recipe, tmp_path))
    for spec in specs.values():
        assert (spec.env["HF_HUB_OFFLINE"], spec.env["CUDA_VISIBLE_DEVICES"]) == ("1", "")
        assert spec.env["NO_PROXY"].split(",") == ["intranet", "127.0.0.1", "localhost", "127.0.0.1"]
    assert (specs["trainer"].env["OMP_NUM_THREADS"], specs["engine0"].env["OMP_NUM_THREADS"]) == ("3", "1")
    ranks = [specs[name].env for name in ("trainer", "trainer1")]
    assert [env["RANK"] for env in ranks] == ["0", "1"] and {env["WORLD_SIZE"] for env in ranks} == {"2"}
    assert ranks[0]["MASTER_PORT"] == ranks[1]["MASTER_PORT"] and "RANK" not in specs["eval"].env
    assert (specs["engine0"].nice, specs["rollout"].nice, specs["eval"].nice) == (0, 5, 5)


def test_files_in_the_working_directory_are_not_imported(tmp_path: Path) -> None:
    for name in ("logging", "random", "queue", "types", "datasets"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('imported from the working directory')")
    spec = specs_of(context_of(tiny(), tmp_path / "run"))["rollout"]
    command = [*spec.argv[:-1], "nothing.json"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and done.stderr.startswith("error: cannot read worker config `nothing.json`")


def test_an_engine_that_is_started_again_waits_for_weights(tmp_path: Path) -> None:
    recipe = tiny(launch__max_restarts=2)
    processes = {process.name: process for process in build(context_of(recipe, tmp_path))}
    engine = processes["engine0"]
    assert (engine.plan.restarts, processes["trainer"].plan.restarts) == (2, 0)
    told = [load_config(["w", child_spec(p).argv[-1]], EngineConfig) for p in (engine, engine.again())]
    assert [config.await_weights for config in told] == [False, True]
    assert processes["rollout"].again() == processes["rollout"]


def test_an_engine_without_a_trainer_is_started_again_with_the_models_own_weights(tmp_path: Path) -> None:
    recipe = tiny(launch__max_restarts=2)
    alone = replace(context_of(recipe, tmp_path), plan=run.planned(recipe, "rollout"))
    engine = next(process for process in build(alone) if process.plan.role is Role.ENGINE)
    assert engine.plan.restarts == 2 and engine.again() == engine, "nobody would give it any"


def stored_run(tmp_path: Path, recipe: Recipe) -> RunDir:
    (tmp_path / "recipe.json").write_text(recipe_io.to_json(recipe))
    return RunDir(tmp_path)


def test_resume_keeps_what_is_learned_and_lets_the_rest_change(tmp_path: Path) -> None:
    stored = stored_run(tmp_path, tiny())
    allowed = tiny(train__steps=200, launch__heartbeat_timeout_s=5, resources__train_ranks=2, checkpoint__keep=3)
    assert recipe_changes.resumed_recipe(allowed, stored) == allowed
    less_memory = tiny(
        train__tokens_per_microbatch=512, train__activation_checkpointing="full", train__optimizer_device="host"
    )
    assert recipe_changes.resumed_recipe(less_memory, stored) == less_memory, "a run that ran out of memory goes on"
    for key, value in (("train__learning_rate", 1.0), ("algorithm__name", "grpo"), ("launch__deterministic", True)):
        with pytest.raises(UserError, match=rf"--set {key.replace('__', '.')} on --resume"):
            recipe_changes.resumed_recipe(tiny(**{key: value}), stored)


def test_a_finished_run_is_not_resumed_but_can_train_on(tmp_path: Path) -> None:
    stored = stored_run(tmp_path, tiny())
    stored.start(recipe="t", steps=100, step=100)
    stored.end("done", exit_code=0)
    with pytest.raises(UserError, match="is done: 100 of 100 steps"):
        recipe_changes.resume_step(stored, tiny(train__steps=100))
    assert recipe_changes.resume_step(stored, tiny(train__steps=200)) == 0


def test_a_failed_fetch_leaves_no_run_behind(tmp_path: Path) -> None:
    target = tmp_path / "run"
    recipe = tiny(data__source="./nowhere.jsonl")
    with pytest.raises(UserError, match=r"nowhere\.jsonl"):
        run.train(recipe, run_dir=target)
    assert not target.exists()


def test_a_used_run_directory_is_refused(tmp_path: Path) -> None:
    stored_run(tmp_path, tiny())
    with pytest.raises(UserError, match="was used before"):
        run.train(tiny(), run_dir=tmp_path)


def test_dry_run_of_every_shipped_recipe() -> None:
    for info in recipe_io.shipped():
        recipe = recipe_io.load(info.name)
        if recipe.model.path.startswith("./"):  # its model is made first
            with pytest.raises(UserError, match="nothing at that path") as refused:
                to_json(run.planned(recipe, "train"))
            assert refused.value.hint and "make it: `python scripts/make_" in refused.value.hint
            continue
        document = to_json(run.planned(recipe, "train"))
        assert document["recipe"] == info.name and document["processes"]
        assert json.loads(json.dumps(document, default=str))["processes"][0]["name"] == "engine0"


# -- whole jobs with stand-in workers ----------------------------------------------------------------------------------

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
        "from pathlib import Path\nimport test_launch as t\n"
        f"sys.exit(t.job_with(Path({str(tmp_path)!r}), t.DONE).run())\n"
    )
    there, here = os.pipe()
    os.close(there)
    assert subprocess.run([sys.executable, "-c", code], stderr=here, timeout=60).returncode == 0
    os.close(here)
    assert RunDir(tmp_path / "run").shown_state() == "done"


def test_job_that_fails_says_so_everywhere(tmp_path: Path) -> None:
    job = job_with(tmp_path, 'raise RunFailed("the gradient is not finite", "lower the learning rate")')
    with pytest.raises(RunFailed) as failure:
        job.run()
    assert "`trainer` ended with exit code 1" in failure.value.message
    assert "error: the gradient is not finite" in failure.value.message
    assert failure.value.hint == f"when that is mended, go on with `astra train --resume {tmp_path / 'run'}`"
    status, found = files(tmp_path / "run")
    assert (status["state"], status["exit_code"], found["state"]) == ("failed", 1, "failed")
    assert status["cause"].startswith("`trainer` ended with exit code 1")
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
    assert sinks[1].calls == ["made", "write", "write", "close"]
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


def test_a_failure_keeps_its_words_when_its_end_cannot_be_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(summary, "build", lambda *_, **__: int(None))  # type: ignore[call-overload]
    monkeypatch.setattr(metrics, "open_sinks", lambda *_: [BrokenSink("close")])
    job = job_with(tmp_path, 'raise RunFailed("the gradient is not finite")')
    with pytest.raises(RunFailed, match="`trainer` ended with exit code 1"):
        job.run()


def test_the_terminal_is_given_back_when_no_process_could_be_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    views: list[LiveView] = []
    console = Console(file=io.StringIO(), force_terminal=True)
    monkeypatch.setattr(watch, "open_view", lambda: views.append(LiveView(console)) or views[-1])
    monkeypatch.setattr("astracli.launch.local.LocalLauncher.start", full)
    with pytest.raises(OSError, match="No space left"):
        job_with(tmp_path, DONE).run()
    hidden, shown = (console.file.getvalue().count(f"\x1b[?25{end}") for end in "lh")  # type: ignore[attr-defined]
    assert len(views) == 1 and hidden == shown > 0, "the cursor is back"


def test_children_of_a_killed_supervisor_end_by_themselves(tmp_path: Path) -> None:
    code = (
        f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
        "from pathlib import Path\nimport test_launch as t\n"
        f"t.job_with(Path({str(tmp_path)!r}), 'time.sleep(60)').run()\n"
    )
    supervisor = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True)
    assert supervisor.stderr is not None
    for line in supervisor.stderr:
        if "all processes are ready" in line:
            break
    workers = psutil.Process(supervisor.pid).children(recursive=True)
    assert len(workers) == 3
    supervisor.kill()
    supervisor.wait()
    supervisor.stderr.close()
    psutil.wait_procs(workers, timeout=60)
    assert not [worker for worker in workers if worker.is_running() and worker.status() != psutil.STATUS_ZOMBIE]


def test_fewer_samples_than_pass_k_lower_it() -> None:
    evaluation = recipe_changes.with_evaluation(tiny(), ["gsm8k"], 2).eval
    assert (evaluation.benchmarks, evaluation.samples, evaluation.pass_k) == (["gsm8k"], 2, 2)
    assert recipe_changes.with_evaluation(tiny(), None, 16).eval.pass_k == 4


def test_a_rollout_that_wrote_no_sample_leaves_no_file(tmp_path: Path) -> None:
    """The same command would be refused: `--out` is there already."""
    out = tmp_path / "samples.jsonl"
    out.write_text('{"reward": 1.0}\n{"reward": 0.0}\n')
    assert run.rollout_words(out) == f"2 samples, mean reward 0.500, in {out}"
    out.write_text("")
    assert run.rollout_words(out) == "no samples yet" and not out.exists()
