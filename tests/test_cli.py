"""The command line: what it prints and where, its exit codes, and that nothing heavy is imported to say hello."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import time
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import Ran

from astracli import run_view
from astracli.cli.output import sections, table_lines
from astracli.run_dir import RunDir

TINY = "qwen3.5-tiny-m2po-delta"
MAIN = "from astracli.cli.main import main; main()"
Astra = Callable[..., Ran]


def spawn(*args: str, code: str = MAIN, **options: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code, *args], capture_output=True, text=True, timeout=60, **options)


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory; the folder `runs` in it."""
    monkeypatch.chdir(tmp_path)
    return tmp_path / "runs"


def make_run(path: Path, *, state: str = "done", started: float = 1000.0, export: bool = False) -> RunDir:
    from astracli import recipe_io

    path.mkdir(parents=True)
    run = RunDir(path)
    run.recipe_json.write_text(recipe_io.to_json(recipe_io.load(TINY, ["seed=5"])))
    run.start(recipe=TINY, steps=100, step=40)
    run.end(state, exit_code=0) if state != "running" else None  # type: ignore[arg-type,func-returns-value]
    run.update(started=started, ended=None if state == "running" else started + 60)
    if export:
        run.export.mkdir()
        (run.export / "config.json").write_text("{}")
    return run


class Launch(types.ModuleType):
    """Stands in for `astracli.launch.run`: remembers what it was asked."""

    def __init__(self) -> None:
        super().__init__("astracli.launch.run")
        self.asked: dict[str, Any] = {}

    def train(self, recipe: Any, **options: Any) -> int:
        self.asked = {"recipe": recipe, **options}
        return 1

    def rollout(self, recipe: Any, **options: Any) -> int:
        self.asked = {"recipe": recipe, **options}
        return 0

    evaluate = rollout


@pytest.fixture
def launch(monkeypatch: pytest.MonkeyPatch) -> Launch:
    import astracli.launch

    fake = Launch()
    monkeypatch.setitem(sys.modules, "astracli.launch.run", fake)
    monkeypatch.setattr(astracli.launch, "run", fake, raising=False)
    return fake


# -- start-up ----------------------------------------------------------------------------------------------------------


def test_help_imports_nothing_heavy_and_is_quick() -> None:
    code = (
        "import sys\nfrom astracli.cli.main import run\nassert run(sys.argv[1:]) == 0\n"
        "heavy = {'torch', 'transformers', 'httpx', 'datasets', 'numpy', 'starlette', 'uvicorn', 'rich'}\n"
        "print(sorted(heavy & set(sys.modules)), file=sys.stderr)"
    )
    for page in (["--help"], ["train", "--help"], ["runs", "--help"]):
        ran = spawn(*page, code=code)
        assert ran.stderr == "[]\n"
        assert ran.stdout.startswith("Usage: astra")
    used = []
    for _ in range(5):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        assert spawn("--help").returncode == 0
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        used.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    assert min(used) < 0.3


def test_reading_commands_do_not_import_torch() -> None:
    code = (
        "import sys\nfrom astracli.cli.main import run\nassert run(sys.argv[1:]) == 0\n"
        "print({'torch', 'transformers', 'datasets'} & set(sys.modules) or 'light', file=sys.stderr)"
    )
    for command in (["recipes", "list"], ["recipes", "show", TINY], ["adapters", "list"], ["runs", "list", "--json"]):
        assert spawn(*command, code=code).stderr.endswith("light\n")


@pytest.mark.parametrize("words", [(), ("runs",)])
def test_a_group_without_a_command_shows_its_help(astra: Astra, words: tuple[str, ...]) -> None:
    said = astra(*words)
    assert said.code == 2 and said.err.startswith("Usage: astra") and "error" not in said.err and "hint" not in said.err


def test_commands_are_the_documented_ones(astra: Astra) -> None:
    said = astra("--help").out
    listed = [line.split()[0] for line in said.partition("Commands:\n")[2].splitlines() if line.strip()]
    assert listed == ["train", "rollout", "eval", "doctor", "recipes", "adapters", "runs"]
    assert "..." not in said.partition("Commands:\n")[2]


def test_version(astra: Astra) -> None:
    from importlib.metadata import version

    assert astra("--version").out == f"astra {version('astracli')}\n"


# -- errors ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("args", "error"),
    [
        (["train"], "no recipe given"),
        (["train", "nope"], "there is no recipe `nope`"),
        (["train", TINY, "--recipe", "other"], f"two recipes given: `{TINY}` and `--recipe other`"),
        (["train", TINY, "--json"], "--json prints a plan: it goes with --dry-run"),
        (["train", "--resume", "nope"], "`nope` is no run: it does not exist"),
        (["train", TINY, "--bogus"], "no such option: --bogus"),
        (["eval"], "nothing to evaluate: no runs under `runs`"),
        (["runs", "status"], "no runs under `runs`"),
        (["runs", "status", "nope"], "`nope` is no run: it does not exist"),
        (["recipes", "copy", "nope"], "there is no recipe `nope`"),
        (["doctor", "--facts", "nope.json"], "cannot read facts file `nope.json`: no such file or directory"),
        (["rollout", TINY, "--n", "0"], "invalid value for '--n'"),
        (["train", TINY, "--set", "train.steps=0"], f"recipe `{TINY}`: `train.steps` = 0 is not allowed: "
         "it takes a whole number greater than 0"),
    ],
)  # fmt: skip
def test_bad_input_ends_with_2_a_message_and_a_hint(
    astra: Astra, runs: Path, launch: Launch, args: list[str], error: str
) -> None:
    ran = astra(*args)
    assert ran.code == 2
    first, blank, hint = ran.err.splitlines()
    assert first.startswith(f"error: {error}")
    assert blank == "" and hint.startswith("hint: ")
    assert ran.out == "" and launch.asked == {}


def test_samples_are_never_overwritten(astra: Astra, runs: Path, launch: Launch) -> None:
    assert astra("rollout", TINY, "--out", "mine.jsonl").code == 0
    assert launch.asked["out"] == Path("mine.jsonl") and not Path("mine.jsonl").exists()
    launch.asked = {}
    Path("mine.jsonl").write_text("precious\n")
    for out, words in (
        ("mine.jsonl", "is there already"),
        ("a/b.jsonl", "there is no directory `a`"),
        (".", "is a dir"),
    ):
        ran = astra("rollout", TINY, "--out", out)
        assert ran.code == 2 and words in ran.err and "hint:" in ran.err
    assert launch.asked == {} and Path("mine.jsonl").read_text() == "precious\n"


def test_unexpected_errors_are_one_line(astra: Astra, launch: Launch, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(recipe: Any, **options: Any) -> int:
        raise ZeroDivisionError("one\ntwo")

    monkeypatch.setattr(launch, "train", broken)
    monkeypatch.delenv("ASTRA_DEBUG", raising=False)
    ran = astra("train", TINY)
    assert ran.code == 1
    assert ran.err.splitlines()[0] == "error: unexpected ZeroDivisionError: one"
    assert "Traceback" not in ran.err
    monkeypatch.setenv("ASTRA_DEBUG", "1")
    assert "Traceback" in astra("train", TINY).err


def test_ctrl_c_is_130(astra: Astra, launch: Launch, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(recipe: Any, **options: Any) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(launch, "train", interrupted)
    assert astra("train", TINY).code == 130


def test_a_closed_pipe_is_quiet() -> None:
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "w") as pipe:
        ran = subprocess.run(
            [sys.executable, "-c", MAIN, "recipes", "show", TINY], stdout=pipe, stderr=subprocess.PIPE, text=True
        )
    assert (ran.returncode, ran.stderr) == (0, "")


# -- what commands hand on ---------------------------------------------------------------------------------------------


def test_train_passes_the_recipe_and_returns_the_runs_exit_code(astra: Astra, launch: Launch) -> None:
    ran = astra("train", "--recipe", TINY, "--set", "train.steps=3", "--set", "seed=9", "--run-dir", "x")
    assert ran.code == 1
    assert (launch.asked["recipe"].train.steps, launch.asked["recipe"].seed) == (3, 9)
    assert (launch.asked["run_dir"], launch.asked["resume"], launch.asked["dry_run"]) == (Path("x"), None, False)


def test_resume_takes_the_runs_own_recipe(astra: Astra, launch: Launch, runs: Path) -> None:
    run = make_run(runs / "a", state="interrupted")
    astra("train", "--resume", str(run.path), "--set", "train.steps=200")
    assert (launch.asked["recipe"].seed, launch.asked["recipe"].train.steps) == (5, 200)
    assert launch.asked["resume"] == run.path
    ran = astra("train", TINY, "--resume", str(run.path))
    assert ran.code == 2 and ran.err.startswith(f"error: both a recipe (`{TINY}`) and --resume {run.path} given")


@pytest.mark.parametrize("command", ["train", "rollout", "eval"])
def test_dry_run_prints_the_plan_and_starts_nothing(astra: Astra, runs: Path, command: str) -> None:
    ran = astra(command, "qwen3.5-4b-m2po-delta", "--dry-run", "--json")
    document = json.loads(ran.out)
    assert (ran.code, document["command"], document["recipe"]) == (0, command, "qwen3.5-4b-m2po-delta")
    assert [p["name"] for p in document["processes"]][:4] == [f"engine{i}" for i in range(4)]
    assert document["expected"]["avg_at_n_last"] == 0.574
    text = astra(command, "qwen3.5-4b-m2po-delta", "--dry-run").out
    assert max(map(len, text.splitlines())) <= 100
    assert "AstraFlow 0.1.2, published run" in text and text.splitlines()[-1].startswith("nothing was started")
    assert not runs.exists()


def test_eval_alone_takes_the_newest_run_with_an_export(astra: Astra, launch: Launch, runs: Path) -> None:
    make_run(runs / "old", started=10, export=True)
    good = make_run(runs / "good", started=20, export=True)
    make_run(runs / "killed", started=30, state="failed")
    ran = astra("eval", "--json", "--samples", "4", "--out", "here")
    assert ran.code == 0 and launch.asked["out"] == Path("here")
    assert launch.asked["recipe"].seed == 5
    assert launch.asked["weights"] == str(good.export.relative_to(Path.cwd()))
    assert (launch.asked["samples"], launch.asked["as_json"]) == (4, True)
    assert ran.err == f"evaluating {launch.asked['weights']} by the recipe of runs/good\n"
    for words in (("eval", "--engine", "sglang"), ("eval", TINY, "--engine", "sglang")):
        astra(*words)
        assert launch.asked["recipe"].rollout.engine == "sglang"
    ran = astra("eval", "--engine", "vllm")
    assert ran.code == 2 and "rollout.engine" in ran.err


def test_eval_of_a_run_without_export(astra: Astra, launch: Launch, runs: Path) -> None:
    make_run(runs / "killed", state="failed")
    ran = astra("eval")
    assert ran.code == 2 and "nothing to evaluate: 1 runs under `runs`, none with an export" in ran.err
    ran = astra("eval", "--run-dir", "runs/killed")
    assert "error: run `runs/killed` has no export (state: failed)" in ran.err
    assert "hint: finish it with `astra train --resume runs/killed`" in ran.err


# -- recipes and adapters ----------------------------------------------------------------------------------------------


def test_recipes_list_and_show_json(astra: Astra) -> None:
    listed = json.loads(astra("recipes", "list", "--json").out)
    assert TINY in [entry["name"] for entry in listed] and len(listed) == 9
    shown = json.loads(astra("recipes", "show", TINY, "--json", "--set", "seed=4").out)
    assert (shown["seed"], shown["weights"]["transfer"]) == (4, "delta")
    assert max(len(line) for line in astra("recipes", "list").out.splitlines()) <= 100


def test_recipes_copy_keeps_comments_and_refuses_to_overwrite(astra: Astra, runs: Path) -> None:
    ran = astra("recipes", "copy", TINY)
    assert ran.out == f"{TINY}.toml\n"
    assert Path(f"{TINY}.toml").read_text().startswith("# As qwen3.5-tiny-m2po-full")
    again = astra("recipes", "copy", TINY)
    assert again.code == 2 and again.err.startswith(f"error: `{TINY}.toml` is there already")
    shown = [json.loads(astra("recipes", "show", name, "--json").out) for name in (TINY, f"{TINY}.toml")]
    assert shown[0] == shown[1]


def test_recipes_check(astra: Astra) -> None:
    ran = astra("recipes", "check", "llama3-8b-instruct-m2po-delta", "--json")
    assert json.loads(ran.out) == {
        "recipe": "llama3-8b-instruct-m2po-delta",
        "model": "meta-llama/Meta-Llama-3-8B-Instruct",
        "adapter": "llama",
        "steps": 800,
        "sequences_per_step": 256,
        "max_staleness": 8,
        "transfer": "delta",
        "ok": True,
    }


def test_adapters_list_and_show(astra: Astra) -> None:
    listed = {entry["name"]: entry["model_types"] for entry in json.loads(astra("adapters", "list", "--json").out)}
    assert listed["qwen3_5"] == ["qwen3_5", "qwen3_5_text"] and set(listed) >= {"qwen3", "llama", "generic"}
    assert json.loads(astra("adapters", "show", "qwen3_5", "--json").out)["hybrid"] is True
    assert "did you mean `qwen3_5`?" in astra("adapters", "show", "qwen35").err


def test_completion_offers_recipe_names() -> None:
    from astracli.cli.options import complete_recipe

    offered = dict(complete_recipe("qwen3.5-tiny"))
    assert sorted(offered) == [TINY, "qwen3.5-tiny-m2po-full"]


# -- doctor ------------------------------------------------------------------------------------------------------------


def test_doctor_shows_failures_first_and_exits_1(astra: Astra, capsys: pytest.CaptureFixture[str]) -> None:
    from astracli.cli.doctor import show
    from astracli.cli.output import Output

    def check(name: str, status: str, **more: Any) -> dict[str, Any]:
        return {"name": name, "group": "g", "status": status, "value": "v", "why": "because", "fix": "do", **more}

    report = {
        "ok": False,
        "checks": [check("a", "ok"), check("b", "warn"), check("c", "fail", why="x" * 150)],
        "backends": [{"what": "attention", "choice": "sdpa", "reason": "cpu"}],
        "facts": {},
    }
    show(report, Output())
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "fail  g/c: v"
    assert [line.split()[0] for line in lines if line.startswith(("ok", "warn", "fail"))] == ["fail", "warn", "ok"]
    assert lines[lines.index("warn  g/b: v") + 1 :][:2] == ["      because", "      fix: do"]
    assert lines[-1] == "a run would not work: 1 ok, 1 to look at, 1 failed"
    assert max(map(len, lines)) <= 100


# -- runs --------------------------------------------------------------------------------------------------------------


def test_runs_list(astra: Astra, runs: Path) -> None:
    make_run(runs / "old", started=10)
    make_run(runs / "new", started=20, state="failed")
    rows = json.loads(astra("runs", "list", "--json").out)
    assert [(r["run"], r["state"], r["step"], r["wall_s"]) for r in rows] == [
        ("new", "failed", 40, 60.0),
        ("old", "done", 40, 60.0),
    ]
    assert "40/100" in astra("runs", "list").out


def test_runs_status_joins_the_newest_figures_of_each_process(astra: Astra, runs: Path) -> None:
    run = make_run(runs / "a")
    records = [
        {"time": 1, "step": 1, "process": "trainer", "grad_norm": 0.5, "lr": 1e-4},
        {"time": 2, "step": 2, "process": "trainer", "grad_norm": 0.25},
        {"time": 2, "step": 2, "process": "rollout", "reward_mean": 0.75},
    ]
    run.metrics_jsonl.write_text("".join(json.dumps(r) + "\n" for r in records) + '{"torn')
    found = json.loads(astra("runs", "status", "a", "--json").out)
    assert found["figures"] == {
        "trainer": {"step": 2, "grad_norm": 0.25, "lr": 1e-4},
        "rollout": {"step": 2, "reward_mean": 0.75},
    }
    assert found["status"]["state"] == "done"


def test_runs_logs(astra: Astra, runs: Path) -> None:
    run = make_run(runs / "a")
    for attempt, text in ((1, "old\n"), (2, "one\ntwo\nthree\n")):
        assert run.next_attempt() == attempt
        (run.attempt_logs(attempt) / "trainer.log").write_text(text)
    assert astra("runs", "logs", "a", "trainer", "-n", "2").out == "two\nthree\n"
    lines = astra("runs", "logs", "a", "-n", "2", "--json").out.splitlines()
    assert [json.loads(line) for line in lines] == [{"process": "trainer", "line": word} for word in ("two", "three")]
    ran = astra("runs", "logs", "a", "nope")
    assert ran.code == 2 and "hint: there are: trainer" in ran.err


def test_following_a_log_ends_with_the_run(tmp_path: Path) -> None:
    log = tmp_path / "trainer.log"
    log.write_text("before\n")
    turns = iter([True, True, False])

    def going() -> bool:
        with log.open("a") as file:
            file.write("half")
        return next(turns)

    assert [line for _, line in run_view.follow([log], going, interval_s=0)] == ["halfhalfhalf"]


def test_runs_stop_terms_the_recorded_supervisor_only(astra: Astra, runs: Path) -> None:
    import psutil

    run = make_run(runs / "a", state="running")
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    try:
        run.update(pid=child.pid, create_time=1.0)  # not ours: another process has the pid now
        ran = astra("runs", "stop", "a")
        assert ran.code == 2 and "is not running (state: dead (resumable))" in ran.err
        assert child.poll() is None
        run.update(create_time=psutil.Process(child.pid).create_time())
        ran = astra("runs", "stop", "a")
        assert ran.code == 0 and not psutil.pid_exists(child.pid)
        assert ran.err.splitlines()[0] == f"stopped `runs/a` (supervisor {child.pid})"
        other = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
        run.update(pid=other.pid, create_time=psutil.Process(other.pid).create_time())
        stopped = json.loads(astra("runs", "stop", "a", "--json").out)
        assert (stopped["run"], stopped["pid"], stopped["state"]) == ("runs/a", other.pid, "dead (resumable)")
        other.wait()
    finally:
        child.kill()
        child.wait()


def test_runs_samples_filter(astra: Astra, runs: Path) -> None:
    run = make_run(runs / "a")
    run.samples.mkdir()

    def sample(step: int, verdict: str, finish: str) -> str:
        record = {"step": step, "version": step, "problem_id": f"p{step}", "problem": "1+1", "answer": "2"}
        record |= {"completion": "2", "tokens": [1, 2], "reward": float(verdict == "right"), "verdict": verdict}
        return json.dumps(record | {"finish_reason": finish}) + "\n"

    (run.samples / "000001.jsonl").write_text(sample(1, "right", "stop") + sample(1, "wrong", "length"))
    (run.samples / "000002.jsonl").write_text(sample(2, "timeout", "stop"))

    def shown(*options: str) -> list[tuple[int, str]]:
        return [(s["step"], s["verdict"]) for s in json.loads(astra("runs", "samples", "a", "--json", *options).out)]

    assert shown() == [(1, "right"), (1, "wrong"), (2, "timeout")]
    assert shown("--wrong") == [(1, "wrong"), (2, "timeout")]
    assert shown("--right", "--truncated") == [(1, "right"), (1, "wrong")]
    assert shown("--wrong", "--step", "1") == [(1, "wrong")]
    assert shown("-n", "1") == [(2, "timeout")]
    assert "problem: 1+1" in astra("runs", "samples", "a").out


def test_runs_report_shows_first_last_and_difference(astra: Astra, runs: Path) -> None:
    run = make_run(runs / "a")
    run.eval.mkdir()
    run.eval_csv.write_text(
        "step,version,benchmark,items,n,avg_at_n,stderr,k,pass_at_k\n"
        "0,0,arithmetic-heldout,256,8,0.375,0.02,4,0.6\n"
        "100,100,arithmetic-heldout,256,8,0.875,0.01,4,0.9\n"
        "25,25,arithmetic-heldout,256,8,0.5,0.01,4,0.7\n"
    )
    run.metrics_jsonl.write_text(
        "".join(json.dumps({"step": s, "process": "trainer", "step_s": float(s)}) + "\n" for s in range(1, 21))
    )
    document = json.loads(astra("runs", "report", "a", "--json").out)
    (trend,) = document["evaluation"]
    assert (trend["first_step"], trend["first"], trend["last_step"], trend["last"]) == (0, 0.375, 100, 0.875)
    assert (trend["difference"], trend["pass_first"], trend["pass_last"]) == (0.5, 0.6, 0.9)
    assert document["figures"] == [{"figure": "seconds a step", "metric": "step_s", "first": 1.0, "last_tenth": 19.5}]
    assert "0.875" in astra("runs", "report", "a").out


def test_an_evaluation_shows_its_results_and_answers(astra: Astra, runs: Path) -> None:
    run = make_run(runs / "e")
    run.update(command="eval")
    (run.eval / "items").mkdir(parents=True)
    row = {"step": 0, "version": 0, "benchmark": "b", "problem_id": "p", "problem": "1+1", "answer": "2"}
    row |= {"completion": "3", "tokens": [1], "reward": 0.0, "verdict": "wrong", "finish_reason": "stop"}
    (run.eval / "items" / "step_000000_b.jsonl").write_text(json.dumps(row) + "\n")
    figures = {"items": 1, "n": 1, "avg_at_n": 0.0, "stderr": 0.0, "k": 1, "pass_at_k": 0.0, "prompts_too_long": 1}
    (run.eval / "results.json").write_text(json.dumps({"results": {"b": figures, "overall": figures}}))
    said = astra("runs", "report", "e").out
    assert "b          1      avg@1 0.000 ± 0.000" in said
    assert "b: 1 samples count as wrong: their prompt leaves no room in rollout.context_length" in said
    assert json.loads(astra("runs", "report", "e", "--json").out)["results"]["results"]["b"] == figures
    assert "completion: 3" in astra("runs", "samples", "e", "--wrong").out
    ran = astra("eval", TINY, "--out", str(run.path))
    assert ran.code == 2 and "holds an evaluation already (state: done)" in ran.err


def test_runs_clean_frees_what_it_says_and_keeps_results(astra: Astra, runs: Path) -> None:
    done = make_run(runs / "done")
    failed = make_run(runs / "failed", state="failed")
    recent = make_run(runs / "recent", started=time.time() - 120)
    for run in (done, failed, recent):
        for folder in (run.weights / "v000001", run.config, run.checkpoints, run.export):
            folder.mkdir(parents=True)
            (folder / "x").write_bytes(b"0" * 1000)
    assert json.loads(astra("runs", "clean", "--dry-run", "--json").out) == {
        "runs": [{"run": "runs/done", "bytes": 2000}],
        "bytes": 2000,
        "removed": False,
    }
    assert done.weights.is_dir()
    assert astra("runs", "clean").out.splitlines()[-1] == "freed 2000 bytes in 1 run"
    assert not done.weights.exists() and not done.config.exists()
    assert (done.checkpoints / "x").is_file() and (done.export / "x").is_file()
    assert failed.weights.is_dir() and recent.weights.is_dir()
    assert (
        astra("runs", "clean", "--resumable", "--older-than", "0").out.splitlines()[-1] == "freed 4000 bytes in 2 runs"
    )


def test_runs_clean_keeps_weights_that_an_evaluation_waits_for(astra: Astra, runs: Path) -> None:
    from astracli.hub.store import HubStore

    run = make_run(runs / "a", state="interrupted")
    (run.weights / "v000000").mkdir(parents=True)
    (run.weights / "v000000" / "x").write_bytes(b"0" * 1000)
    limits = {"batch_groups": 1, "max_staleness": 0, "lease_timeout_s": 1.0, "steps": 4, "eval_every": 2}
    store = HubStore(run.hub_sqlite, drop_equal_groups=False, engines=["engine0"], **limits)  # type: ignore[arg-type]
    store.announce(0, 0)
    assert astra("runs", "clean", "a").out == "freed 0 bytes in 0 runs\n" and run.weights.is_dir()
    store.eval_done(0, 0, {})
    store.close()
    assert astra("runs", "clean", "a").out.endswith("freed 1000 bytes in 1 run\n") and not run.weights.exists()


def test_runs_clean_refuses_a_running_run(astra: Astra, runs: Path) -> None:
    run = make_run(runs / "a", state="running")
    run.weights.mkdir()
    ran = astra("runs", "clean", "a")
    assert ran.code == 2 and ran.err.startswith("error: run `runs/a` is running")
    assert astra("runs", "clean", "--resumable", "--older-than", "0").out == "freed 0 bytes in 0 runs\n"
    assert run.weights.is_dir()


# -- tables ------------------------------------------------------------------------------------------------------------


def test_tables_align_wrap_and_put_numbers_right() -> None:
    lines = table_lines(["name", "n", "words"], [["a", 5, "one two three four five six"], ["bb", 10, None]], width=32)
    assert lines == [
        "name   n  words",
        "a      5  one two three four",
        "          five six",
        "bb    10  -",
    ]


def test_a_nested_document_becomes_titled_tables() -> None:
    found = sections({"a": 1, "b": {"c": [1, 2], "d": []}, "e": [{"x": 1}, {"x": 2, "y": True}]})
    assert found == [
        (None, [], [["a", 1]]),
        ("b", [], [["c", "1, 2"], ["d", "-"]]),
        ("e", ["x", "y"], [[1, None], [2, True]]),
    ]
