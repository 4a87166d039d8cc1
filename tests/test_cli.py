"""The command line: what it prints and where, its exit codes, and that nothing heavy is imported to say hello."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import Ran
from run_cases import TINY, make_run

MAIN = "from astracli.__main__ import main; main()"
Astra = Callable[..., Ran]


def spawn(*args: str, code: str = MAIN, **options: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code, *args], capture_output=True, text=True, timeout=60, **options)


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
    assert listed == ["train", "sft", "rollout", "eval", "doctor", "agent", "recipes", "adapters", "runs"]
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
        (["rollout", TINY, "--keep", "wrong"], "--keep `wrong` is not known"),
        (["eval", "--compare", "a", "b"], "`a` holds no evaluation: there is no such directory"),
        (["recipes", "copy", TINY, "sub/"], "`sub` is no name for a recipe"),
        (["recipes", "check", "qwen3.5-small-m2po-delta"], "model.path = `./small-warm`: nothing at that path"),
        (["train", TINY, "--set", "eval.pass_k=9"], f"recipe `{TINY}`: eval.pass_k = 9, and `arithmetic-heldout` is "
         "asked 8 samples an item: pass@k needs at least k"),
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


@pytest.mark.parametrize(
    ("args", "page"),
    [
        (["runs", "logs", "--lines"], "runs logs"),
        (["runs", "clean", "--older-than", "-1"], "runs clean"),
        (["runs", "list", "--bogus"], "runs list"),
        (["runs", "bogus"], "runs"),
        (["doctor", "--bogus"], "doctor"),
    ],
)
def test_a_command_line_that_does_not_parse_names_its_own_help(astra: Astra, args: list[str], page: str) -> None:
    ran = astra(*args)
    assert ran.code == 2 and ran.err.endswith(f"\nhint: `astra {page} --help` shows what it takes\n")


def test_a_directory_that_has_been_removed(astra: Astra, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    ran = astra("train", "--recipe", "qwen3.5-tiny-m2po-delta")
    assert ran.code == 2 and ran.err.startswith("error: the current directory has been removed\n")


def test_a_second_setting_behind_one_set_is_told_how_to_say_it(astra: Astra) -> None:
    for recipe in ([], ["--recipe", "qwen3.5-tiny-m2po-delta"]):
        ran = astra("train", *recipe, "--set", "train.steps=2", "eval.every=0")
        assert ran.code == 2 and "eval.every=0" in ran.err.partition("hint:")[0]
        assert ran.err.endswith("\n\nhint: every setting takes its own `--set`: `--set a.b=1 --set c.d=2`\n")


def test_a_machine_description_that_is_none(astra: Astra, runs: Path) -> None:
    Path("m.json").write_text('{"gpus": []}')
    ran = astra("doctor", "--facts", "m.json")
    assert ran.code == 2 and "facts file `m.json`: not a machine description: `system`: field required" in ran.err


def test_what_an_ascii_terminal_cannot_show_is_escaped(tmp_path: Path) -> None:
    recipe = tmp_path / "r.toml"
    recipe.write_text(f'extends = "{TINY}"\ndescription = "± 1"\n', encoding="utf-8")
    ran = spawn("recipes", "show", str(recipe), env={**os.environ, "PYTHONIOENCODING": "ascii"})
    assert ran.returncode == 0 and 'description = "\\xb1 1"' in ran.stdout


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


def test_ctrl_c_while_the_command_is_imported() -> None:
    code = "import builtins, sys\nbefore = builtins.__import__\n"
    code += "def hook(name, *rest):\n    if name == 'typer': raise KeyboardInterrupt\n    return before(name, *rest)\n"
    ran = spawn("recipes", "list", code=f"{code}builtins.__import__ = hook\n{MAIN}")
    assert (ran.returncode, ran.stdout, ran.stderr) == (130, "", "")


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
    assert (launch.asked["run_dir"], launch.asked["resume"]) == (Path("x"), None)


def test_resume_takes_the_runs_own_recipe(astra: Astra, launch: Launch, runs: Path) -> None:
    run = make_run(runs / "a", state="interrupted")
    astra("train", "--resume", str(run.path), "--set", "train.steps=200")
    assert (launch.asked["recipe"].seed, launch.asked["recipe"].train.steps) == (5, 200)
    assert launch.asked["resume"] == run.path
    astra("train", "--resume", "a")
    assert launch.asked["resume"] == Path("runs/a")
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
    ran = astra("eval", "--engine", "tgi")
    assert ran.code == 2 and "rollout.engine" in ran.err


def test_eval_of_a_run_without_export(astra: Astra, launch: Launch, runs: Path) -> None:
    make_run(runs / "killed", state="failed")
    ran = astra("eval")
    assert ran.code == 2 and "nothing to evaluate: 1 run under `runs`, none with an export" in ran.err
    ran = astra("eval", "--run-dir", "runs/killed")
    assert "error: run `runs/killed` has no export (state: failed)" in ran.err
    assert "hint: finish it with `astra train --resume runs/killed`" in ran.err
    make_run(runs / "busy", state="running")
    ran = astra("eval", "--run-dir", "busy")
    assert "has no export (state: running)" in ran.err and "hint: it is made at the end" in ran.err


# -- recipes and adapters ----------------------------------------------------------------------------------------------


def test_recipes_list_and_show_json(astra: Astra) -> None:
    listed = json.loads(astra("recipes", "list", "--json").out)
    files = (Path(__file__).parents[1] / "recipes").glob("[!_]*.toml")
    assert TINY in {entry["name"] for entry in listed} == {file.stem for file in files}
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
