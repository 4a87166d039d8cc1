"""One supervised job from the first process to the summary: hub, children, what people see, what is recorded."""

from __future__ import annotations

import contextlib
import json
import shutil
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from astracli.errors import AstraError, RunFailed, UserError, machine_failed, refused_by_system
from astracli.launch import configs, from_run, hub, no_signal, recipe_changes, resume_rules, summary
from astracli.launch.clusters import registry as clusters
from astracli.launch.clusters.keeper import Keeper
from astracli.launch.configs import RunContext
from astracli.launch.fleet import Fleet
from astracli.launch.forks import Forks
from astracli.launch.launcher import Launcher
from astracli.launch.local import LocalLauncher, process_env
from astracli.launch.place import Place
from astracli.launch.restarts import Resumes, Start
from astracli.launch.supervise import Supervisor
from astracli.launch.usage import UsageLog
from astracli.launch.watch import Watch, unharmed
from astracli.machine.facts import Machine
from astracli.plan.build import refuse
from astracli.plan.types import LaunchPlan
from astracli.plan.view import to_json
from astracli.process.atomic import write_atomic
from astracli.process.config import Role
from astracli.process.console import say
from astracli.process.open_files import raise_open_files
from astracli.process.signals import signals
from astracli.report.alerts import Alerts
from astracli.report.page import data as report_data
from astracli.runs import changes as run_changes
from astracli.runs import metrics, names
from astracli.runs.run_dir import RunDir
from astracli.runs.status import State
from astracli.training import best

if TYPE_CHECKING:
    from astracli.hub.store import HubStore

HISTORY_STEPS = 8
"""Last steps that the message of a run quotes whose numbers ended it."""
MAIN_ROLE = {"train": Role.TRAINER, "sft": Role.TRAINER, "rollout": Role.ROLLOUT, "eval": Role.EVAL}


@dataclass
class Job:
    """A command's run on this machine. `run()` returns the exit code; afterwards `summary` says what it came to."""

    context: RunContext
    phases: dict[str, float] = field(default_factory=dict)
    """Seconds of wall time that came before the job, by name; the job adds its own."""
    summary: dict[str, Any] = field(default_factory=dict)
    """Empty when the job ended before its first process."""
    save: threading.Event = field(default_factory=threading.Event)
    """Set by SIGUSR1: a checkpoint was asked for, and then the end."""
    replan: Callable[[Mapping[str, Machine]], LaunchPlan] | None = None
    """The plan again, with the facts of the hosts that agents have told; None: it stays."""
    _started: float = field(default_factory=time.time)

    def run(self) -> int:
        """0 done, 130 interrupted. Raises RunFailed; whatever happens is recorded in status.json and summary.json."""
        context, recipe, run = self.context, self.context.recipe, self.context.run_dir
        steps = recipe.train.steps if context.training else None
        run.start(
            recipe=recipe.name,
            command=context.plan.command,
            attempt=context.attempt,
            steps=steps,
            step=context.resume_step or 0,
        )
        state: State = "failed"
        cause: str | None = None
        said: dict[str, Any] = {}
        code = 1
        try:
            if self._supervise():
                state, code = "interrupted", 130
                cause = "it was told to make a checkpoint and end" if self.save.is_set() else "interrupted"
            else:
                state, code = "done", 0
        except KeyboardInterrupt:
            state, code, cause = "interrupted", 130, "interrupted"
        except Exception as error:
            known = isinstance(error, AstraError)
            if isinstance(error, AstraError) and context.training:
                weights = recipe_changes.has_weights(run)
                error.hint = resume_rules.completed(error.hint, error.message, run.path, weights=weights)
            named = (
                None if known else machine_failed(error) or refused_by_system(error)
            )  # after the start, no bad input
            cause, *lines = str(named or error).splitlines() or [type(error).__name__]
            said = {"last_lines": lines, "hint": error.hint if isinstance(error, AstraError) else None}
            if named is not None:
                raise RunFailed(named.message, named.hint) from error
            raise
        finally:
            self._end(state, code, cause, said)
        return code

    def _end(self, state: State, code: int, cause: str | None, said: Mapping[str, Any]) -> None:
        """Record how it ended, as far as the disk takes it: the cause is said in any case."""
        run = self.context.run_dir
        for left in (run.stage, *run.checkpoints.glob(".step_*.tmp")):
            shutil.rmtree(left, ignore_errors=True)  # what nobody needs any more makes room on a full disk
        with unharmed(f"`{run.status_json}` does not say how the run ended"):
            run.end(state, exit_code=code, cause=cause, **said)
        if self.summary:
            self.summary |= {"cause": cause, "last_lines": said.get("last_lines", [])}
            with unharmed("no summary.json"):
                self._record(state)

    def _record(self, state: State) -> None:
        """summary.json, then the page of the run, and its place in the summary."""
        from astracli.report.page import html as report_html

        run, self.summary["state"] = self.context.run_dir, state
        write_atomic(run.summary_json, json.dumps(self.summary, indent=2) + "\n")
        with unharmed("no report.html"):
            self.summary["paths"]["report"] = str(report_html.write(run))
            write_atomic(run.summary_json, json.dumps(self.summary, indent=2) + "\n")

    def _supervise(self) -> bool:
        """True when it was interrupted."""
        context, run = self.context, self.context.run_dir
        raise_open_files()
        sinks = metrics.open_sinks(context.recipe.metrics.sinks, run.path)
        metrics.mend(run.metrics_jsonl)
        with contextlib.ExitStack() as stack:
            interrupted = stack.enter_context(signals(self.save))
            local = LocalLauncher(run.lock_fd, forks=self._forks())
            stack.callback(local.close)
            fleet = Fleet(context, local) if self._hosts else None
            launcher: Launcher = fleet or local
            serving = hub.serving(context, lambda body: supervisor.on_status(body), fleet)
            store, server = stack.enter_context(serving)
            if fleet is not None:
                self._keep_agents(fleet, server.url, stack)
                fleet.gather(server.url, interrupted, lambda: server.alive)
                if interrupted.is_set():
                    return True
                context = self._with_hosts(fleet)
            processes = configs.build(context, server.url, stack, fleet.sites() if fleet else {})
            place = Place(run)
            alerts = Alerts(by_rewards=context.recipe.sft is None)
            watch = Watch(run, context.recipe.train.steps if context.training else None, store, sinks, place, alerts)
            usage = UsageLog(run, launcher, [gpu.index for gpu in context.plan.gpu_map if gpu.host is None])

            def tick(supervisor: Supervisor) -> None:
                watch(supervisor)
                if context.training and supervisor.phase == "running":
                    usage.step(watch.step)

            supervisor = Supervisor(
                processes,
                launcher,
                store,
                main_role=MAIN_ROLE[context.plan.command],
                limits=context.recipe.launch,
                hub_alive=lambda: server.alive,
                hint=self._hint,
                hopeless=lambda: no_signal.failure(store, context),
                tick=tick,
                retry=configs.retry(context, processes, stack),
                resumes=self._resumes(store, server.url, fleet, stack),
                interrupted=interrupted,
                log=run.attempt_logs(context.attempt) / "supervisor.log",
                save=self.save,
                save_s=context.save_s,
            )
            try:
                return supervisor.run()
            except Exception as error:
                # a process that misses its files ends first, and of something else
                if (fault := place.fault()) is not None:
                    raise fault from error
                if isinstance(error, RunFailed):
                    raise self._with_figures(error) from None
                raise
            finally:
                usage.close()
                if place.fault() is None:
                    watch.close(supervisor)
                    with unharmed("no summary table"):
                        self._sum_up(supervisor, store, launcher, watch.evaluations_s)
                else:
                    watch.give_terminal_back()

    @property
    def _hosts(self) -> bool:
        """Whether agents start some of its processes, or may."""
        return self.context.plan.command == "train" and clusters.of(self.context.recipe) is not None

    def _keep_agents(self, fleet: Fleet, url: str, stack: contextlib.ExitStack) -> None:
        """Have agents started on the run's hosts, and ended with it."""
        context, cluster = self.context, clusters.of(self.context.recipe)
        hosts = cluster.open(context.recipe, context.plan) if cluster is not None else None
        if hosts is not None:
            logs = context.run_dir.attempt_logs(context.attempt)
            fleet.keeper = Keeper(
                hosts, context.recipe.agents, fleet.agents, url, logs, newcomers=fleet.takes_newcomers
            )
            stack.callback(fleet.keeper.close)
            fleet.keeper.begin()
        stack.callback(fleet.close)  # before the hub: agents hear from it that all ends
        if fleet.keeper is not None:
            stack.callback(fleet.keeper.hold)

    def _with_hosts(self, fleet: Fleet) -> RunContext:
        """The plan made again now that every host of it has said what it is. Raises RunFailed for what one lacks."""
        context, machines = self.context, fleet.machines()
        if self.replan is None or not machines:
            return context
        plan = self.replan(machines)
        try:
            refuse(plan)
        except UserError as error:
            raise RunFailed(error.message, error.hint) from None
        if plan.gpu_leases != context.plan.gpu_leases:
            raise RunFailed(
                "with the GPUs of the other hosts, engine and trainer would share theirs otherwise than was planned",
                "say how: `--set resources.share_mode=time_sharing` or `side_by_side`",
            )
        for warning in plan.warnings:
            if warning not in context.plan.warnings:
                say(f"warning: {warning}")
        self.context = replace(context, plan=plan)
        fleet.use(self.context)
        write_plan(context.run_dir, plan)
        return self.context

    def _forks(self) -> Forks | None:
        """What forks this run's processes; None where each starts by itself."""
        plan, recipe = self.context.plan, self.context.recipe
        if plan.choice.device != "cpu":
            return None
        here = [process for process in plan.processes if process.host is None]
        return Forks(here, recipe, lambda process: process_env(process, recipe.launch.host))

    def _resumes(
        self, store: HubStore, hub_url: str, fleet: Fleet | None, held: contextlib.ExitStack
    ) -> Resumes | None:
        """How the run goes on when its trainer ends of what may pass; None when it does not, because the recipe says so
        or because it makes no checkpoints."""
        context, recipe = self.context, self.context.recipe
        limit = recipe.launch.max_resumes
        if limit is None:
            limit = 5 if context.plan.choice.device == "cuda" else 0
        if not context.training or not limit or not recipe.checkpoint.every:
            return None

        def start(number: int) -> Start:
            """All as `--resume` does it, with the hub that is there."""
            step = recipe_changes.checkpoint_step(context.run_dir)
            store.rewind(step, step)
            shutil.rmtree(context.run_dir.stage, ignore_errors=True)
            again = replace(context, resume_step=step, start=number)
            processes = configs.build(again, hub_url, held, fleet.sites() if fleet else {})
            return Start(step, processes, configs.retry(again, processes, held))

        return Resumes(limit, start, step=context.resume_step or 0)

    def _with_figures(self, error: RunFailed) -> RunFailed:
        """When an engine ends a training run because its weights are not numbers any more: with the last steps."""
        if not self.context.training or "NaN" not in error.message:
            return error
        records = metrics.read(self.context.run_dir.metrics_jsonl)
        steps = [(r["step"], r) for r in records if r.get("process") == "trainer" and "grad_norm" in r]
        rate = f"lower train.learning_rate ({self.context.recipe.train.learning_rate:g}) in a new run"
        lines = [error.message, *names.recent(steps[-HISTORY_STEPS:])]
        return RunFailed("\n  ".join(lines), "; ".join(filter(None, [rate, error.hint])))

    def _hint(self) -> str:
        run = self.context.run_dir
        if not self.context.training:
            return f"the logs are in {run.attempt_logs(self.context.attempt)}"
        return f"when that is mended, go on with `astra {self.context.plan.command} --resume {run.path}`"

    def _best(self) -> dict[str, Any] | None:
        """The best checkpoint, with `checkpoint.best` and once one was evaluated."""
        benchmark = best.name_in_files(self.context.recipe) if self.context.training else None
        found = best.best(self.context.run_dir, benchmark) if benchmark is not None else None
        return found.document() if found is not None else None

    def _sum_up(
        self, supervisor: Supervisor, store: HubStore, launcher: Launcher, evaluations_s: Mapping[str, float]
    ) -> None:
        context = self.context
        self.phases |= supervisor.phases()
        self.summary |= summary.build(
            context.recipe,
            run_dir=context.run_dir.path,
            state="",
            attempt=context.attempt,
            first_step=context.resume_step or 0,
            since=self._started,
            phases=self.phases,
            evaluations_s=evaluations_s,
            records=metrics.read(context.run_dir.metrics_jsonl),
            hub=store.state(),
            memory=launcher.memory(),
            restarts={name: status.restarts for name, status in supervisor.status.items()},
            resumes=[resume.document() for resume in supervisor.resumes.taken] if supervisor.resumes else [],
            notes=supervisor.notes,
            changes=run_changes.read(context.run_dir),
            source=asdict(found) if (found := from_run.origin(context.run_dir)) else None,
            best=self._best(),
            plan=to_json(context.plan),
        )


def write_plan(run: RunDir, plan: LaunchPlan) -> None:
    write_atomic(run.plan_json, json.dumps(to_json(plan), indent=2, default=str) + "\n")


def open_run(run: RunDir, recipe_text: str, plan: LaunchPlan) -> int:
    """Write recipe.json and plan.json, clear what an earlier attempt staged; returns the attempt's number."""
    write_atomic(run.recipe_json, recipe_text)
    write_plan(run, plan)
    report_data.write_machine(run)
    shutil.rmtree(run.stage, ignore_errors=True)
    return run.next_attempt()


def discard(run: RunDir, path_was_there: bool) -> None:
    """Take back a run directory in which nothing has happened."""
    run.unlock()
    with contextlib.suppress(OSError):
        Path(run.path / ".lock").unlink()
        if not path_was_there:
            run.path.rmdir()
