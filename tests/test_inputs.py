"""Bad input that used to show itself only in a child's log: now it ends the command before anything is started."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import warm_child

from astracli.cli.main import run as astra
from astracli.config import recipe_io
from astracli.data import fetch
from astracli.errors import UserError
from astracli.launch import inputs, run
from astracli.launch.first_prompt import FirstPrompt
from astracli.models.adapter import SHARD_INDEX
from astracli.runs import find as runs

TINY = "qwen3.5-tiny-m2po-delta"


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return Path(shutil.copytree(fetch.bundled("astra:tiny"), tmp_path / "model"))


def cut(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])


def empty(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"")


def no_second_shard(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
    (folder / SHARD_INDEX).write_text(json.dumps(index))


def wrong_index(folder: Path) -> None:
    (folder / SHARD_INDEX).write_text(json.dumps({"weight_map": {"model.nothing": "model.safetensors"}}))


def torn_index(folder: Path) -> None:
    (folder / SHARD_INDEX).write_text('{"weight_map": ')


def no_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (cut, r"model\.safetensors` is not a whole safetensors file: its header promises \d+ bytes of tensors"),
        (empty, "is not a whole safetensors file: header length"),
        (no_second_shard, "lacks `model-00002-of-00002.safetensors`"),
        (wrong_index, "1 tensors of its index are in no shard, for example `model.nothing`"),
        (torn_index, "is not an index of shards"),
        (no_tokenizer, "no tokenizer in"),
    ],
)
def test_a_damaged_checkpoint_is_refused(checkpoint: Path, damage: Callable[[Path], None], message: str) -> None:
    inputs.check_checkpoint(checkpoint, recipe_io.load(TINY))
    damage(checkpoint)
    with pytest.raises(UserError, match=message) as caught:
        inputs.check_checkpoint(checkpoint, recipe_io.load(TINY))
    assert caught.value.hint


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("data.reward=nolib.rewards:fn", "importing `nolib.rewards` failed"),
        ("data.reward=maths", "there is no reward `maths`"),
        ("launch.network=private launch.host=192.0.2.1", "cannot bind 192.0.2.1"),
        ('metrics.sinks=["wandbb"]', "no sink `wandbb`"),
        ("resources.engine.python=/no/python", 'resources.engine.python = "/no/python" is no program'),
        ("resources.rollout_gpus=4", "resources.rollout_gpus = 4 asks for GPUs, but resources.device = cpu"),
        ("resources.train_gpus=64", "resources.train_gpus = 64 asks for GPUs"),
        ("model.path=./broken", "is not a whole safetensors file"),
    ],
)
def test_bad_input_starts_nothing_and_leaves_no_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, checkpoint: Path, change: str, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    cut(checkpoint)
    checkpoint.rename("broken")
    with pytest.raises(UserError, match=message) as caught:
        run.train(recipe_io.load(TINY, change.split(" ")), run_dir=Path("here"))
    assert caught.value.hint and not Path("here").exists() and not Path("runs").exists()


def test_only_training_is_resumed(tmp_path: Path) -> None:
    recipe = recipe_io.load(TINY)
    there = runs.create("x", tmp_path / "samples")
    there.recipe_json.write_text(recipe_io.to_json(recipe))
    there.start(recipe=TINY, command="rollout")
    there.end("done", exit_code=0)
    there.unlock()
    with pytest.raises(UserError, match="holds an `astra rollout`, only a training run can be resumed"):
        run.train(recipe, resume=tmp_path / "samples")


def test_the_first_prompt_is_shown_as_the_model_gets_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A system turn that the tiny model's vocabulary does not have; a row too long to show; an escape in it."""
    monkeypatch.chdir(tmp_path)
    turns = [{"role": "system", "content": "So."}, {"role": "user", "content": "1+2\x1b"}]
    Path("rows.jsonl").write_text(json.dumps({"turns": turns, "answer": "3"}) + "\n")
    own = ["--set", "data.source=rows.jsonl", "--set", "data.question_field=turns"]
    command = ["train", "--recipe", "qwen3.5-tiny-m2po-delta", *own, "--dry-run"]
    assert astra(command) == 0
    said = capsys.readouterr().out
    assert "first training prompt, as the model gets it (" in said and " of them not in its vocabulary)" in said
    assert "\x1b" not in said and "1+2" in said.split("first training prompt")[1]
    assert astra([*command, "--json"]) == 0
    first = json.loads(capsys.readouterr().out)["first_prompt"]
    assert first["text"].endswith("=") and first["unknown"] > 0 and first["source"] == ""
    long = FirstPrompt("", "a" * 2000 + "b", 2001, 0).shown()
    assert long.startswith("a" * 800 + "\n[... 401 characters left out ...]\n") and long.endswith("b")


def test_the_first_example_is_shown_with_what_is_trained_of_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """By hand: the tiny model has a token a character. The first of two rows does not fit and is not the one shown."""
    monkeypatch.chdir(tmp_path)
    rows = [{"problem": "1+2", "completion": "3" * 100}, {"problem": "4+5", "completion": "9"}]
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    own = ["data.source=rows.jsonl", "data.question_field=problem", "data.template={question}", "eval.every=0"]
    sets = [word for each in own for word in ("--set", each)]
    assert astra(["sft", "tiny-sft", *sets, "--dry-run", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    first = told["first_example"]
    assert "first_prompt" not in told
    asked, answer = first["pieces"]
    assert "4+5" in asked["text"] and not asked["trained"]
    assert answer["text"].startswith("9") and answer["trained"] and answer["tokens"] == 2, "with the token that ends it"
    assert (first["trained"], first["tokens"], first["unknown"]) == (2, asked["tokens"] + 2, 0)
    for command in (["sft", "tiny-sft", *sets, "--dry-run"], ["doctor", "tiny-sft", *sets]):
        astra(command)
        said = capsys.readouterr().out
        shown = said.split("first training example, as the model gets it (")[1]
        assert shown.startswith(f"{first['tokens']} tokens; 2 are trained)")
        assert f"[trained, 2 tokens]\n  {answer['text']}" in shown


def test_the_first_prompt_of_an_environment_has_its_tools(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("astracli.envs.registry.subprocess", warm_child.ENVIRONMENTS_HERE)
    assert astra(["train", "--recipe", "tiny-tool-m2po-delta", "--dry-run", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["first_prompt"]["text"].startswith("<tools>calculator</tools>")


def test_a_checkpoint_without_a_chat_template_is_said_once(
    tmp_path: Path, checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = recipe_io.load("qwen3.5-tiny-m2po-delta", [f"model.path={checkpoint}"])
    inputs.fetched(recipe, data=False, benchmarks=[])
    assert "chat template" not in capsys.readouterr().err
    (checkpoint / "chat_template.jinja").unlink()
    inputs.fetched(recipe, data=False, benchmarks=[])
    said = capsys.readouterr().err
    assert said.count("warning: no chat template in") == 1 and "bare text" in said
    (checkpoint / "tokenizer_config.json").write_text('{"chat_template": "{{ messages }}"}')
    inputs.fetched(recipe, data=False, benchmarks=[])
    assert "chat template" not in capsys.readouterr().err
