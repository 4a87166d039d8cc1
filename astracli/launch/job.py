"""One supervised job from the first process to the summary: hub, children, what people see, what is recorded."""

from __future__ import annotations

import contextlib
import json
import secrets
import shutil
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from astracli.config.recipe import Recipe
from astracli.launch import children, recipe_changes, summary
from astracli.launch.restarts import Resumes, Start
from astracli.launch.supervise import Supervisor
from astracli.launch.watch import Watch, unharmed
from astracli.plan import build as planning
from astracli.plan.build import LaunchPlan
from astracli.process import ports
from astracli.process.children import MemorySampler
from astracli.process.console import say
from astracli.process.signals import signals
from astracli.report.page import data as report_data
from astracli.runs import metrics
from astracli.runs.run_dir import RunDir, State, write_atomic

if TYPE_CHECKING:
    from astracli.hub.curriculum import Curriculum
    from astracli.hub.server import ServerThread
    from astracli.hub.store import HubStore

MAIN_ROLE = {"train": "trainer", "rollout": "rollout", "eval": "eval"}


@dataclass(frozen=True)
class HubHandle:
    """The hub as the supervisor knows it (`supervise.Hub`)."""

    store: HubStore
    server: ServerThread
    engines: frozenset[str]

    def alive(self) -> bool:
        return self.server.alive

    def request_stop(self) -> None:
        self.store.request_stop()

    def release_worker(self, name: str) -> None:
        self.store.release_worker(name)
        if name in self.engines:
            self.store.engine_state(name, None, "down")

    def pending_evals(self) -> int:
        return self.store.pending_evals()


@dataclass
class Job:
    """A command's run on this machine. `run()` returns the exit code; afterwards `summary` says what it came to."""

    recipe: Recipe
    plan: LaunchPlan
    run_dir: RunDir
    attempt: int
    paths: Mapping[str, Any]
    """Local model, data and benchmarks."""
    extra: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """Role -> what only that role is told."""
    prompts: int | None = None
    """Groups to generate, for a job without a trainer."""
    resume_step: int | None = None
    """Steps that the checkpoint to go on from has trained; None for a new run."""
    phases: dict[str, float] = field(default_factory=dict)
    """Seconds of wall time that came before the job, by name; the job adds its own."""
    summary: dict[str, Any] = field(default_factory=dict)
    """Empty when the job ended before its first process."""
    _started: float = field(default_factory=time.time)

    @property
    def training(self) -> bool:
        return self.plan.command == "train"

    def run(self) -> int:
        """0 done, 130 interrupted. Raises RunFailed; whatever happens is recorded in status.json and summary.json."""
        step, steps = self.resume_step or 0, self.recipe.train.steps if self.training else None
        self.run_dir.start(
            recipe=self.recipe.name, command=self.plan.command, attempt=self.attempt, steps=steps, step=step
        )
        state: State = "failed"
        cause: str | None = None
        code = 1
        try:
            if self._supervise():
                state, code, cause = "interrupted", 130, "interrupted"
            else:
                state, code = "done", 0
        except KeyboardInterrupt:
            state, code, cause = "interrupted", 130, "interrupted"
        except Exception as error:
            cause = str(error).partition("\n")[0]
            raise
        finally:
            self.run_dir.end(state, exit_code=code, cause=cause)
            if self.summary:
                self.summary["state"] = state
                write_atomic(self.run_dir.summary_json, json.dumps(self.summary, indent=2) + "\n")
                self._write_report()
        return code

    def _write_report(self) -> None:
        """The page of the run, and its place in the summary."""
        from astracli.report.page import html as report_html

        with unharmed("no report.html"):
            self.summary["paths"]["report"] = str(report_html.write(self.run_dir))
            write_atomic(self.run_dir.summary_json, json.dumps(self.summary, indent=2) + "\n")

    def _supervise(self) -> bool:
        """True when it was interrupted."""
        run = self.run_dir
        sinks = metrics.open_sinks(self.recipe.metrics.sinks, run.path)
        metrics.mend(run.metrics_jsonl)
        engines = [process.name for process in self.plan.processes if process.role == "engine"]
        token = secrets.token_urlsafe(32)
        memory = MemorySampler()
        with signals() as interrupted, self._hub(engines, token) as (hub, connect):
            setting = children.RunContext(
                self.recipe,
                self.plan,
                run,
                self.attempt,
                hub.server.url,
                token,
                self.paths,
                self.resume_step is not None,
            )
            specs = children.build(setting, self.extra)
            watch = Watch(run, self.recipe.train.steps if self.training else None, hub.store, sinks)
            supervisor = Supervisor(
                specs,
                hub,
                main_role=MAIN_ROLE[self.plan.command],
                ready_timeout_s=self.recipe.launch.ready_timeout_s,
                heartbeat_timeout_s=self.recipe.launch.heartbeat_timeout_s,
                token=token,
                hint=self._hint,
                tick=watch,
                memory=memory,
                retry=children.retry(setting, specs),
                resumes=self._resumes(setting, hub.store),
                restart_window_s=self.recipe.launch.restart_window_s,
                interrupted=interrupted,
            )
            connect(supervisor)
            try:
                return supervisor.run().interrupted
            finally:
                watch.close(supervisor)
                with unharmed("no summary table"):
                    self._sum_up(supervisor, hub.store, memory, watch.evaluations_s)

    def _resumes(self, setting: children.RunContext, store: HubStore) -> Resumes | None:
        """How the run goes on when its trainer ends of what may pass; None when it does not, because the recipe says so
        or because it makes no checkpoints."""
        limit = self.recipe.launch.max_resumes
        if limit is None:
            limit = 5 if self.plan.choice.device == "cuda" else 0
        if not self.training or not limit or not self.recipe.checkpoint.every:
            return None

        def start(number: int) -> Start:
            """All as `--resume` does it, with the hub that is there."""
            step = recipe_changes.checkpoint_step(self.run_dir)
            store.rewind(step, step)
            shutil.rmtree(self.run_dir.stage, ignore_errors=True)
            again = replace(setting, resume=True)
            more: dict[str, dict[str, Any]] = {
                "trainer": {"step": step, "start": number}, "engine": {"await_weights": True}
            }  # fmt: skip
            told = {role: {**self.extra.get(role, {}), **more.get(role, {})} for role in {*self.extra, *more}}
            specs = children.build(again, told)
            return Start(step, specs, children.retry(again, specs))

        return Resumes(limit, start, step=self.resume_step or 0)

    def _curriculum(self) -> Curriculum | None:
        """What chooses prompts by their solve rate; None when they are asked in their order."""
        from astracli.data.prompts import PromptSource
        from astracli.hub.curriculum import Curriculum

        recipe = self.recipe
        if recipe.data.curriculum is None:
            return None
        source = PromptSource(recipe.data, recipe.seed, self.paths.get("data"))
        return Curriculum(recipe.data.curriculum, recipe.seed, source.kind)

    @contextlib.contextmanager
    def _hub(self, engines: list[str], token: str) -> Iterator[tuple[HubHandle, Any]]:
        """The hub serving on a port of its own; `connect(supervisor)` sends it the heartbeats."""
        from astracli.evaluation import files as eval_files
        from astracli.hub.api import build_app, serve
        from astracli.hub.store import HubStore
        from astracli.weights.publish.server import weights_app

        recipe, training = self.recipe, self.training
        store = HubStore(
            self.run_dir.hub_sqlite,
            batch_groups=recipe.train.batch_groups if training else self.prompts or 1,
            max_staleness=recipe.effective_staleness if training else 0,
            drop_equal_groups=recipe.algorithm.drop_equal_groups and training,
            lease_timeout_s=recipe.launch.lease_timeout_s,
            steps=recipe.train.steps if training else 1,
            eval_every=recipe.eval.every if training and recipe.eval.benchmarks else 0,
            engines=engines,
            deterministic=recipe.launch.deterministic,
            consume=recipe.train.consume,
            replay_ratio=recipe.train.replay_ratio if training else 0,
            curriculum=self._curriculum() if training else None,
            history_steps=recipe.launch.hub_history_steps,
            max_dropped_batches=recipe.rollout.max_dropped_batches,
            checkpoints=recipe.checkpoint.every > 0,
            gpu_leases=self.plan.gpu_leases,
        )
        listeners: list[Supervisor] = []

        def on_status(body: dict[str, Any]) -> None:
            for supervisor in listeners:
                supervisor.on_status(body)

        self.run_dir.weights.mkdir(exist_ok=True)
        app = build_app(
            store,
            token,
            weights_app=weights_app(self.run_dir.weights),
            metrics_path=self.run_dir.metrics_jsonl,
            on_status=on_status,
        )
        server: ServerThread | None = None
        try:
            if self.resume_step is not None:
                store.rewind(self.resume_step, self.resume_step)
                eval_files.forget_after(self.run_dir.eval, self.resume_step)
            server = serve(app, ports.bind(recipe.launch.host)).start()
            yield HubHandle(store, server, frozenset(engines)), listeners.append
        finally:
            if server is not None:
                server.stop()
            store.close()

    def _hint(self) -> str:
        if not self.training:
            return f"the logs are in {self.run_dir.attempt_logs(self.attempt)}"
        return f"when that is mended, go on with `astra train --resume {self.run_dir.path}`"

    def _sum_up(
        self, supervisor: Supervisor, store: HubStore, memory: MemorySampler, evaluations_s: Mapping[str, float]
    ) -> None:
        self.phases |= supervisor.phases()
        self.summary |= summary.build(
            self.recipe,
            run_dir=self.run_dir.path,
            state="",
            attempt=self.attempt,
            first_step=self.resume_step or 0,
            since=self._started,
            phases=self.phases,
            evaluations_s=evaluations_s,
            records=metrics.read(self.run_dir.metrics_jsonl),
            store=store.state(),
            memory=memory,
            restarts={name: status.restarts for name, status in supervisor.status.items()},
            resumes=[resume.document() for resume in supervisor.resumes.taken] if supervisor.resumes else [],
            notes=supervisor.notes,
            plan=planning.to_json(self.plan),
        )


def open_run(run: RunDir, recipe_text: str, plan: Mapping[str, Any]) -> int:
    """Write recipe.json and plan.json, clear what an earlier attempt staged; returns the attempt's number."""
    write_atomic(run.recipe_json, recipe_text)
    write_atomic(run.plan_json, json.dumps(plan, indent=2, default=str) + "\n")
    report_data.write_machine(run)
    shutil.rmtree(run.stage, ignore_errors=True)
    return run.next_attempt()


def say_start(run: RunDir, plan: LaunchPlan, attempt: int, resumed_at: int | None) -> None:
    for warning in plan.warnings:
        say(f"warning: {warning}")
    names = ", ".join(process.name for process in plan.processes)
    where = f" from step {resumed_at}, attempt {attempt}" if resumed_at is not None else ""
    say(f"run {run.path}{where}: {names}; logs in {run.attempt_logs(attempt)}")


def discard(run: RunDir, path_was_there: bool) -> None:
    """Take back a run directory in which nothing has happened."""
    run.unlock()
    with contextlib.suppress(OSError):
        Path(run.path / ".lock").unlink()
        if not path_was_there:
            run.path.rmdir()
