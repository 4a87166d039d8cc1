"""The examples of docs/recipes-howto.md, as they stand there: the script in a fresh folder, the commands on its run."""

from __future__ import annotations

import inspect
import json
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import get_type_hints

import pytest
import warm
from conftest import Ran

import astracli
from astracli.config import recipe_io

PAGE = (Path(__file__).parents[1] / "docs" / "recipes-howto.md").read_text(encoding="utf-8")
STARTS = ("train", "eval")
"""Commands that would start processes: run to their plan, which they refuse as they would refuse to start."""


def blocks(kind: str) -> list[str]:
    """The code blocks that are marked `<!-- test: KIND -->`."""
    return re.findall(rf"<!-- test: {kind} -->\n```\w*\n(.*?)```", PAGE, re.S)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the script of the page ran, with the sink of the page: a run of two steps, resumed to a third at another
    learning rate; and `other`, the same run but for its learning rate and the score of its items."""
    place = tmp_path_factory.mktemp("fresh")
    (script,), (sink,) = blocks("script"), blocks("sink")
    (place / "last_figures.py").write_text(sink)
    with_sink = '"train.steps": 2,\n        "metrics.sinks": ["last_figures:LastFigures"],'
    assert '"train.steps": 2,' in script
    (place / "script.py").write_text(script.replace('"train.steps": 2,', with_sink, 1))
    ran = warm.run(["script.py"], cwd=place, timeout=400)
    assert ran.returncode == 0, ran.stderr
    (place / "said").write_text(ran.stdout)
    other = place / "runs" / "other"
    shutil.copytree(place / "runs" / "first", other)
    (other / "recipe.json").write_text(
        recipe_io.to_json(recipe_io.load(other / "recipe.json", ["train.learning_rate=0.5"]))
    )
    for file in (other / "eval" / "items").glob("step_000003_*"):
        file.write_text(file.read_text().replace('"verdict": "wrong"', '"verdict": "right"'))
    return place


@pytest.fixture
def there(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(str(folder))  # where the sink is, as the page says
    return folder


def test_the_script_trains_resumes_and_reads(there: Path) -> None:
    run = astracli.Run(there / "runs" / "first")
    said = (there / "said").read_text().splitlines()
    assert [line.split(":")[0] for line in said[:2]] == ["step 0", "step 1"]
    assert (run.state, run.step) == ("done", 3) and said[2].startswith("done after step 3 score 0.")
    rate = astracli.load("qwen3.5-tiny-m2po-delta").train.learning_rate
    (change,) = run.changes()
    assert (change["step"], change["attempt"]) == (2, 2)
    assert change["changes"] == {"train.steps": [2, 3], "train.learning_rate": [rate, 1e-4]}
    assert run.recipe.train.learning_rate == 1e-4
    scores = {score.step: score.avg_at_n for score in run.scores()}
    best = max((step for step in scores if step), key=lambda step: (scores[step], -step))
    assert said[3] == f"best checkpoint: step {best}" and run.best_step() == best
    kept = {int(path.name.removeprefix("step_")) for path in (run.path / "checkpoints").iterdir()}
    assert {2, 3, best} == kept, "the newest two, and the best"
    summary = run.summary()
    assert summary is not None and summary["best"]["step"] == best and len(summary["changes"]) == 1
    assert len(list(run.samples(step=2))) == run.recipe.metrics.samples_per_step
    newest = json.loads((run.path / "newest.json").read_text())
    assert newest["trainer"]["step"] == 2 and "eval_avg_at_n" in newest["eval"]


@pytest.mark.parametrize("block", blocks("commands"), ids=lambda block: block.split("\n")[0][:50])
def test_the_commands(there: Path, astra: Callable[..., Ran], block: str) -> None:
    if "--weights best" in block and not (there / "best").exists():
        shutil.copytree(there / "runs" / "first" / "export", there / "best")
    lines = [line for line in block.splitlines() if line.startswith("astra ")]
    assert lines and len(lines) == len(block.splitlines())
    for line in lines:
        words = shlex.split(line)[1:]
        starts = words[0] in STARTS and "--compare" not in words
        if "export" in words:
            shutil.rmtree(there / words[-1], ignore_errors=True)
        ran = astra(*words, *(["--dry-run"] if starts else []))
        assert ran.code == 0, (line, ran.err)
        if "--best" in words:
            run = astracli.Run(there / "runs" / "first")
            best, seen = run.best_step(), sum(score.step > 0 for score in run.scores())
            assert seen in (2, 3), "on a busy machine that of step 1 takes the weights of step 2"
            assert f"step {best} of `runs/first`, the best of {seen} evaluated: arithmetic-heldout avg@1 0." in ran.err
            assert json.loads((there / "best" / "astra_export.json").read_text())["step"] == best


def test_what_may_not_change_is_refused_in_these_words(there: Path, astra: Callable[..., Ran]) -> None:
    ran = astra("train", "--resume", "first", "--set", "train.batch_groups=8", "--set", "train.steps=6", "--dry-run")
    assert (ran.code, ran.err) == (2, blocks("refused")[0])


def test_status_and_comparison_show_the_change(there: Path, astra: Callable[..., Ran]) -> None:
    assert "from step 2: train.steps 2 -> 3, train.learning_rate" in astra("runs", "status", "first").out
    found = json.loads(astra("runs", "compare", "first", "other", "--json").out)
    assert found["settings"] == {"train.learning_rate": [1e-4, 0.5]}
    (test,) = found["tests"]
    assert test["verdict"] == "real" and test["b"] > 0.9
    (again,) = astracli.compare("first", "other")
    assert again.difference.p == test["p"]
    assert {run.path.name for run in astracli.list_runs()} == {"first", "other"}, "a plan makes no run"


def test_transformers_loads_the_export_and_generates(there: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (block,) = blocks("transformers")
    exec(compile(block, "howto", "exec"), {})
    said = capsys.readouterr().out.strip()
    assert re.search(r"\d", said) and set(said) <= set("0123456789+-= \\boxed{}"), said


def test_a_new_run_takes_the_weights_of_a_checkpoint(
    there: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The rounded masters of step 2, bit for bit what was published as version 2; a link to an export of step 3."""
    from safetensors.torch import load_file

    from astracli.launch import from_run
    from astracli.runs.run_dir import RunDir

    newest = from_run.find("first")
    assert (newest.step, newest.kind) == (3, "export")
    source = from_run.find("first@2", keep_optimizer=True)
    assert (source.step, source.kind) == (2, "checkpoint")
    new = RunDir(tmp_path / "new")
    monkeypatch.setattr(from_run, "subprocess", SimpleNamespace(run=lambda words, **_: warm.run(words[1:])))
    new.path.mkdir()
    recipe = from_run.checked(astracli.load("qwen3.5-tiny-m2po-full", {"seed": 5}), source)
    recipe = from_run.take(recipe, source, new, keep_optimizer=True)
    assert recipe.model.path == str(tmp_path / "new" / "initial") and recipe.seed == 5
    assert from_run.initial_checkpoint(new) == tmp_path / "new" / "initial_checkpoint" / "step_000002"
    origin = from_run.origin(new)
    assert origin is not None and (origin.step, origin.kind, origin.optimizer) == (2, "checkpoint", True)
    three, two = (load_file(p / "model.safetensors") for p in (there / "runs/first/export", new.path / "initial"))
    assert three.keys() == two.keys() and any(not three[name].equal(two[name]) for name in two)
    from_run.forget(new)
    assert list(new.path.iterdir()) == []


def test_weights_that_do_not_fit_are_refused(there: Path, tmp_path: Path, astra: Callable[..., Ran]) -> None:
    other = tmp_path / "other-model"
    shutil.copytree(there / "runs" / "first" / "export", other)
    words = ("train", "qwen3.5-tiny-m2po-delta", "--dry-run", "--from", "first", "--set")
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    (other / "tokenizer.json").write_text(json.dumps(tokenizer | {"truncation": {"max_length": 3}}))
    ran = astra(*words, f"model.path={other}")
    assert ran.code == 2 and "their tokenizers differ" in ran.err and "--set model.path=astra:tiny" in ran.err
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"vocab_size": 7}))
    ran = astra(*words, f"model.path={other}")
    assert ran.code == 2 and "their config.json differ in vocab_size" in ran.err
    ran = astra(*words, "model.path=Nobody/nothing")
    assert ran.code == 2 and "the first is not on this machine to be compared" in ran.err
    assert astra(*words, "model.path=astra:tiny").code == 0
    ran = astra("train", "--from", "first@9", "--dry-run")
    assert ran.code == 2 and "run `runs/first` has no weights of step 9" in ran.err and "of step" in ran.err
    ran = astra("train", "--from", "first", "--resume", "first")
    assert ran.code == 2 and "--from starts a new one" in ran.err
    ran = astra("train", "qwen3.5-tiny-m2po-delta", "--keep-optimizer", "--dry-run")
    assert ran.code == 2 and "--keep-optimizer without --from" in ran.err


def test_importing_is_cheap_and_every_name_is_typed() -> None:
    code = (
        "import sys, astracli; heavy = {'torch', 'transformers', 'pydantic', 'typer', 'numpy', 'httpx', 'psutil'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)\n"
        "astracli.load('qwen3.5-tiny-m2po-delta'); assert 'torch' not in sys.modules\n"
        "astracli.Run, astracli.train, astracli.RunFailed; assert 'torch' not in sys.modules\n"
        "assert set(astracli.__all__) <= set(dir(astracli))\n"
        "try: astracli.nothing\nexcept AttributeError as error: print(error)"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (ran.returncode, ran.stdout) == (0, "module `astracli` has no attribute `nothing`\n"), ran.stderr
    for name in ("load", "train", "resume", "evaluate", "list_runs"):
        function = getattr(astracli, name)
        assert function.__doc__ and name in PAGE
        annotations = inspect.signature(function).parameters.values()
        assert all(parameter.annotation is not inspect.Parameter.empty for parameter in annotations)
        assert "return" in function.__annotations__


def test_changes_by_dotted_key_are_checked(tmp_path: Path) -> None:
    recipe = astracli.load("qwen3.5-tiny-m2po-delta", {"data.curriculum.low": 0.3, "train.betas": (0.9, 0.95)})
    assert recipe.data.curriculum is not None and recipe.data.curriculum.low == 0.3
    assert recipe.train.betas == (0.9, 0.95)
    with pytest.raises(astracli.UserError, match=r"unknown key `train\.step`"):
        astracli.load("qwen3.5-tiny-m2po-delta", {"train.step": 3})
    with pytest.raises(astracli.UserError, match=r"`train\.steps\.x`: `steps` is a value"):
        astracli.load("qwen3.5-tiny-m2po-delta", {"train.steps.x": 3})
    with pytest.raises(astracli.UserError, match="no recipe given"):
        astracli.train(run_dir=tmp_path / "nothing")
    assert not (tmp_path / "nothing").exists()
    assert get_type_hints(astracli.load)["return"] is astracli.Recipe
