"""Input that is too long, too deep, too large or no file at all: one message that names it, exit 2, at once."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from astracli.cli.main import run
from astracli.config import reading, recipe_io
from astracli.data.fetch import BUNDLED_PREFIX, bundled
from astracli.errors import UserError, refused_by_system
from astracli.launch.inputs import check_checkpoint, check_tokenizer
from astracli.models import registry
from astracli.models.adapter import SHARD_INDEX, load_tokenizer, read_config
from astracli.models.adapter_tools import checkpoint_tensors

R = "qwen3.5-tiny-m2po-delta"
LONG, DIGITS = "x" * 300, "9" * 5000


def refusal(capsys: pytest.CaptureFixture[str], *args: str, code: int = 2) -> str:
    """What a command line says that is refused. Never a traceback, never `unexpected`, and in bounded time."""
    began = time.monotonic()
    assert run(list(args)) == code
    said = capsys.readouterr().err
    assert said.startswith("error: ") and "unexpected" not in said and "Traceback" not in said
    assert time.monotonic() - began < 30 and len(said) < 4000
    return said


@pytest.mark.parametrize(
    ("command", "named"),
    [
        (["recipes", "show", LONG], "no recipe"),
        (["runs", "status", LONG], "is no run"),
        (["train", "--resume", LONG], "is no run"),
        (["runs", "export", LONG], "is no run"),
        (["eval", "--run-dir", LONG], "is no run"),
        (["recipes", "copy", R, f"{LONG}.toml"], "file name too long"),
        (["recipes", "check", R, "--set", f"seed={DIGITS}"], "`seed`"),
        (["recipes", "check", R, "--set", f"seed={'[' * 2000}"], "`seed`"),
        (["recipes", "check", R, "--set", f"seed=0x{'f' * 6000}"], "`seed`"),
        (["recipes", "check", R, "--set", f"seed={10**30}"], "at most 4294967295"),
        (["recipes", "check", R, "--set", "rollout.temperature=1e308"], "at most 100"),
        (["recipes", "check", R, "--set", "eval.temperature=1e308"], "at most 100"),
        (["recipes", "check", R, "--set", "launch.lease_timeout_s=1e300"], "out of range"),
        (["recipes", "check", R, "--set", "algorithm.kl_coef=1e300"], "out of range"),
        (["recipes", "check", R, "--set", "rollout.sglang.chunked_prefill_size=99999999999"], "out of range"),
        (["train", R, "--dry-run", "--set", f"resources.engines={10**9}"], "at most 1024"),
        (["train", R, "--dry-run", "--set", f"resources.train_ranks={10**9}"], "at most 1024"),
        (["train", R, "--dry-run", "--set", f"resources.rollout_gpus={10**9}"], "at most 1024"),
        (["recipes", "check", R, "--set", f"data.reward_workers={10**9}"], "at most 1024"),
        (["recipes", "check", R, "--set", f"rollout.max_running_requests={10**9}"], "at most 65536"),
    ],
)
def test_arguments(command: list[str], named: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert named in refusal(capsys, *command)


def test_files_that_are_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A named pipe would wait for a writer, and /dev/zero has no end."""
    os.mkfifo(tmp_path / "pipe.toml")
    (tmp_path / "zero.toml").symlink_to("/dev/zero")
    (tmp_path / "folder.toml").mkdir()
    (tmp_path / "big.toml").write_text("#" * (reading.RECIPE_BYTES + 1))
    for name, words in (("pipe", "a pipe or a device"), ("zero", "a pipe"), ("folder", "directory"), ("big", "1 mib")):
        assert words in refusal(capsys, "recipes", "check", str(tmp_path / f"{name}.toml"))
    os.mkfifo(tmp_path / "facts.json")
    assert "a pipe or a device" in refusal(capsys, "doctor", "--facts", str(tmp_path / "facts.json"))


@pytest.mark.parametrize("name", ["metrics.jsonl", "status.json", "recipe.json", "changes.jsonl", "from.json"])
def test_files_of_a_run_that_are_none(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """In a folder that others write to, too. No command waits, or reads without end; the list shows the other runs."""
    for run_name in ("good", "odd"):
        (place := tmp_path / run_name).mkdir()
        (place / "recipe.json").write_text("{}")
    file = tmp_path / "odd" / name
    for make in (os.mkfifo, lambda path: path.symlink_to("/dev/zero")):
        file.unlink(missing_ok=True)
        make(file)
        assert run(["runs", "list", "--root", str(tmp_path)]) == 0
        assert "good" in capsys.readouterr().out
        for command in ("status", "samples", "report"):
            assert run(["runs", command, str(tmp_path / "odd")]) in (0, 2), command
            assert "unexpected" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "text", "named"),
    [
        ("nul.toml", 'extends = "./a\\u0000b.toml"', "no recipe file"),
        ("deep.toml", "a = " + "[" * 100_000, "nested too deeply"),
        ("deep.json", "[" * 100_000, "nested too deeply"),
        ("digits.toml", f"seed = {DIGITS}", "not valid TOML"),
        ("digits.json", f'{{"seed": {DIGITS}}}', "not valid JSON"),
    ],
)
def test_recipe_texts(name: str, text: str, named: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / name).write_text(text)
    assert named in refusal(capsys, "recipes", "check", str(tmp_path / name))


def test_problems_that_are_no_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    os.mkfifo(tmp_path / "problems.jsonl")
    for key in (f"data.source={tmp_path / 'problems.jsonl'}", f'eval.benchmarks=["{tmp_path / "problems.jsonl"}"]'):
        assert "a pipe or a device" in refusal(capsys, "train", R, "--dry-run", "--set", key)


def test_many_unknown_keys_are_answered_at_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "keys.toml").write_text(f'extends = "{R}"\n' + "".join(f"k{i} = 1\n" for i in range(90_000)))
    said = refusal(capsys, "recipes", "check", str(tmp_path / "keys.toml"))
    assert "unknown key `k0`" in said and f"and {90_000 - recipe_io.SHOWN} more" in said


def test_a_long_row_of_extends(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for i in range(1200):
        (tmp_path / f"e{i}.toml").write_text(f'extends = "./e{i + 1}.toml"')
    assert "more than 20" in refusal(capsys, "recipes", "check", str(tmp_path / "e0.toml"))
    (tmp_path / "e12.toml").write_text(f'extends = "{R}"')
    assert run(["recipes", "check", str(tmp_path / "e0.toml")]) == 0, "a dozen, and what the shipped one extends"


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    return Path(shutil.copytree(bundled(f"{BUNDLED_PREFIX}tiny"), tmp_path / "model"))


def change(model: Path, **values: Any) -> Path:
    document = json.loads((model / "config.json").read_text())
    (document.get("text_config") or document).update(values)
    (model / "config.json").write_text(json.dumps(document))
    return model


def test_a_model_of_a_thousand_million_layers(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ("train", R, "--dry-run", "--set", f"model.path={tiny}")
    change(tiny, num_hidden_layers=10**9, layer_types=None)
    assert "`num_hidden_layers` = 1000000000" in refusal(capsys, *command)
    change(tiny, num_hidden_layers="two")
    assert 'a whole number from 1, not "two"' in refusal(capsys, *command)
    (tiny / "config.json").write_text("[" * 100_000)
    with pytest.raises(UserError, match="nested too deeply"):
        read_config(tiny)


@pytest.mark.parametrize(
    ("name", "change", "named"),
    [
        ("config.json", {"text_config": [{}]}, "`text_config` is a table, not a list of 1"),
        ("config.json", {"architectures": [1]}, "`architectures` is a list of short texts"),
        ("config.json", {"vocab_size": 10**13}, "`vocab_size` = 10000000000000: no model has that"),
        ("config.json", {"vocab_size": 10**12}, "do not fit"),
        ("config.json", {"rope_parameters": {"rope_type": []}}, "rope_parameters.`rope_type` is a short text"),
        ("config.json", {"my_factor": float("nan")}, "`my_factor` is not a number"),
        ("config.json", {"layer_types": {"a": 1}}, "`layer_types` is a list"),
        ("generation_config.json", {"eos_token_id": "x"}, 'a token id, or a list of them, not "x"'),
        ("tokenizer_config.json", {"eos_token": "x" * 100_000}, "at most 1000 characters"),
        ("tokenizer_config.json", {"chat_template": 7}, "`chat_template` is a text"),
        (SHARD_INDEX, {"weight_map": {"a": "../../etc/passwd"}}, "is no file's name"),
    ],
)
def test_documents_of_another_structure(name: str, change: dict[str, Any], named: str, tiny: Path) -> None:
    file = tiny / name
    document = json.loads(file.read_text()) if file.is_file() else {}
    file.write_text(json.dumps(document | change))
    with pytest.raises(UserError, match=re.escape(named)):
        check_checkpoint(tiny, recipe_io.load(R, []))


def test_code_beside_a_checkpoint_is_not_run(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Left alone, transformers asks at the terminal whether it may run it; whoever types `y` has lost."""
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("it asks"))
    (tiny / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    classes = {"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M", "AutoTokenizer": ["evil.T", "evil.T"]}
    for name in ("config.json", "tokenizer_config.json"):
        document = json.loads((tiny / name).read_text()) | {"auto_map": classes, "model_type": "nobodys"}
        (tiny / name).write_text(json.dumps(document | {"tokenizer_class": "Nobodys"}))
    with pytest.raises(UserError, match="cannot load the tokenizer"):
        load_tokenizer(tiny)
    with pytest.raises(UserError, match="cannot read the config"):
        registry.get("generic").load_for_training(tiny)
    assert not (tmp_path / "ran").exists()


def shard(model: Path, header: dict[str, Any] | str, size: int) -> None:
    text = (header if isinstance(header, str) else json.dumps(header)).encode()
    (model / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + bytes(size))


@pytest.mark.parametrize(
    ("header", "size", "named"),
    [
        ({"a": ["F32", 0, 8], "b": ["F32", 4, 12]}, 12, "the place of `b`"),  # they overlap
        ({"a": ["F32", 0, 8], "b": ["F32", 2, 6]}, 8, "the place of `b`"),  # one lies inside the other
        ({"a": ["F32", 0, 4], "b": ["F32", 8, 12]}, 12, "the place of `b`"),  # a hole
        ({"a": ["F32", -4, 4]}, 4, "the place of `a`"),
        ({"a": ["F32", 0, 4]}, 8, "promises 4 bytes of tensors, it holds 8"),
        ("[" * 100_000, 0, "nested too deeply"),
        ('{"a": ' + DIGITS + "}", 0, "not a whole"),
        ("{}", 4, "it holds 4"),
    ],
)
def test_headers_of_shards(header: Any, size: int, named: str, tmp_path: Path) -> None:
    if isinstance(header, dict):
        entries = header.items()
        header = {n: {"dtype": d, "shape": [(b - a) // 4], "data_offsets": [a, b]} for n, (d, a, b) in entries}
    shard(tmp_path, header, size)
    with pytest.raises(UserError, match=named):
        checkpoint_tensors(tmp_path)


def test_a_shape_that_is_not_the_tensors_size(tmp_path: Path) -> None:
    shard(tmp_path, {"a": {"dtype": "BF16", "shape": [3, 2], "data_offsets": [0, 16]}}, 16)
    with pytest.raises(UserError, match="the place of `a`"):
        checkpoint_tensors(tmp_path)


@pytest.mark.parametrize(
    "content", ['{"model": 1}', "[" * 100_000, '{"version": "1.0", "model": {"type": "BPE"', "\x00"]
)
def test_a_damaged_tokenizer(content: str, tiny: Path) -> None:
    check_tokenizer(tiny)
    (tiny / "tokenizer.json").write_text(content)
    with pytest.raises(UserError, match="is no tokenizer"):
        check_tokenizer(tiny)


def test_what_the_system_refuses_is_named() -> None:
    found = refused_by_system(OSError(36, "File name too long", "y" * 5000))
    assert found is not None and found.exit_code == 2 and len(found.message) < 200
    assert (refused_by_system(OSError(24, "Too many open files", "x")) or found).exit_code == 1
    assert (refused_by_system(MemoryError()) or found).exit_code == 1
    assert refused_by_system(ValueError("x")) is None and refused_by_system(OSError(104, "reset")) is None


def command(tmp_path: Path, *args: str, **options: Any) -> subprocess.CompletedProcess[bytes]:
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("LC_", "LANG", "PYTHONUTF8"))}
    line = [sys.executable, "-m", "astracli", *args]
    return subprocess.run(line, cwd=tmp_path, env=environment | options.pop("env", {}), timeout=60, **options)


def test_a_locale_that_is_not_utf8(tmp_path: Path) -> None:
    (tmp_path / "dä ta.toml").write_text(f'extends = "{R}"\ndescription = "größer"\n', encoding="utf-8")
    env = {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}
    done = command(tmp_path, "recipes", "show", "./dä ta.toml", env=env, capture_output=True)
    assert done.returncode == 0 and "größer".encode() in done.stdout


def test_closed_streams_are_nowhere(tmp_path: Path) -> None:
    """`<&- >&- 2>&-`: no file that is opened later becomes the output."""
    script = (
        "import os, sys; [os.close(n) for n in (0, 1, 2)]; os.execv(sys.executable, [sys.executable, *sys.argv[1:]])"
    )
    line = [sys.executable, "-c", script, "-m", "astracli", "recipes", "copy", R, str(tmp_path / "mine.toml")]
    assert subprocess.run(line, timeout=60).returncode == 0
    assert (tmp_path / "mine.toml").read_text() == recipe_io.source_text(R)
