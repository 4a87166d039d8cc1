"""What the doctor finds on this machine: checkpoints, caches, sockets, another interpreter, dead runs."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from astracli.config import recipe_io
from astracli.doctor import checks, gather
from astracli.machine import packages
from astracli.machine import read as machine_read
from astracli.machine.facts import DataSet, GpuProcess, Tensor, validate
from astracli.runs import clean as cleaning
from astracli.runs import run_dir

TINY = "qwen3.5-tiny-m2po-delta"


def tiny(tmp_path: Path) -> Path:
    from astracli.data import fetch

    return Path(shutil.copytree(fetch.bundled("astra:tiny"), tmp_path / "tiny"))


def test_gather_is_quick_and_imports_nothing_heavy(tmp_path: Path) -> None:
    code = (
        "import json, sys, time\n"
        "from astracli.cli.main import run\n"
        "t = time.process_time(); run(['doctor', 'qwen3.5-tiny-m2po-delta', '--no-probe', '--json'])\n"
        "heavy = [m for m in ('torch', 'transformers', 'numpy', 'datasets', 'huggingface_hub') if m in sys.modules]\n"
        "print(json.dumps({'spent': time.process_time() - t, 'heavy': heavy}), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, cwd=tmp_path)
    said = json.loads(done.stderr.splitlines()[-1])
    assert said["heavy"] == []
    assert said["spent"] < 2.0
    report = json.loads(done.stdout)
    assert report["ok"] is True, [c for c in report["checks"] if c["status"] == "fail"]
    assert report["facts"]["checkpoint"]["path"] == "astra:tiny"
    assert report["facts"]["network"]["hub_asked"] is False


def test_the_shipped_model_is_whole(tmp_path: Path) -> None:
    found = gather.checkpoint("astra:tiny")
    assert found.missing_files == () and found.problem is None
    assert len(found.tensors) == 55 and found.chat_template is True
    assert found.tensors["model.norm.weight"] == Tensor(dtype="BF16", shape=(128,))


def test_a_checkpoint_that_is_cut_short_or_lacks_a_shard_is_found(tmp_path: Path) -> None:
    place = tiny(tmp_path)
    weights = place / "model.safetensors"
    (place / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {"a": "model.safetensors", "b": "model-2.safetensors"}})
    )
    assert gather.checkpoint(str(place)).missing_files == ("model-2.safetensors",)
    weights.write_bytes(weights.read_bytes()[:-1000])
    assert "its header promises" in str(gather.checkpoint(str(place)).problem)
    weights.write_text("version https://git-lfs.github.com/spec/v1")
    assert "header length does not fit the file" in str(gather.checkpoint(str(place)).problem)
    weights.unlink()
    (place / "model.safetensors.index.json").unlink()
    found = gather.checkpoint(str(place))
    assert found.missing_files == ("model.safetensors",)
    assert "nothing at" in str(gather.checkpoint("./nowhere").problem)


def test_the_hub_cache_is_read_without_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    monkeypatch.delenv("HF_HUB_CACHE", raising=False)
    assert gather.cached("a/b", "models") is None
    folder = tmp_path / "hub" / "models--a--b"
    (folder / "snapshots" / "c0ffee").mkdir(parents=True)
    (folder / "snapshots" / "c0ffee" / "config.json").write_text("{}")
    assert gather.cached("a/b", "models") is None
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text("c0ffee")
    assert gather.cached("a/b", "models") == folder / "snapshots" / "c0ffee"
    assert gather.cached("a/b", "models", "c0ffee") == folder / "snapshots" / "c0ffee"
    assert gather.cached("a/b", "models", "v2") is None


def test_data_is_looked_up_in_the_data_directory_and_in_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ASTRA_DATA_DIR", str(tmp_path))
    monkeypatch.setenv("HF_HOME", str(tmp_path / "empty"))
    (tmp_path / "deepscaler.jsonl").write_text("{}\n")
    recipe = recipe_io.load("qwen3.5-4b-m2po-delta", ['eval.benchmarks=["aime24", "arithmetic-heldout"]'])
    rows = {d.name: d for d in gather.data(recipe)}
    assert rows["deepscaler"].place == str((tmp_path / "deepscaler.jsonl").resolve())
    assert rows["aime24"] == DataSet(name="aime24", use="eval", hub_id="HuggingFaceH4/aime_2024", place=None)
    assert rows["arithmetic-heldout"].place == "generated"
    unknown = recipe_io.load(TINY, ["data.source=no-such-set"])
    assert "no data set `no-such-set`" in str(gather.data(unknown)[0].problem)


def test_sockets(monkeypatch: pytest.MonkeyPatch) -> None:
    import socket

    assert gather.network("127.0.0.1").hosts == {"127.0.0.1": None}
    assert gather.network("192.0.2.1").hosts["192.0.2.1"]
    monkeypatch.delenv("HTTPS_PROXY", raising=False)
    monkeypatch.delenv("https_proxy", raising=False)
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        assert gather.reach(f"http://127.0.0.1:{port}") is None
        monkeypatch.setenv("HTTPS_PROXY", f"127.0.0.1:{port}")
        assert gather.reach("https://192.0.2.1") is None
    assert gather.reach("https://192.0.2.1") == "connection refused"


def test_another_interpreter_is_asked_for_its_packages(tmp_path: Path) -> None:
    found = gather.environment(sys.executable, ["qwen3_5", "no_such_model"])
    assert found.version and found.packages["torch"].version and found.error is None
    assert found.packages["transformers"].models == ("qwen3_5",)
    assert gather.environment(str(tmp_path / "none"), []).error == "no such file or directory"
    broken = tmp_path / "python"
    broken.write_text("#!/bin/sh\necho 'broken venv' >&2; exit 3\n")
    broken.chmod(0o755)
    assert gather.environment(str(broken), []).error == "broken venv"


def test_pins_models_and_gpu_processes_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    info = tmp_path / "sglang-9.9.dist-info"
    info.mkdir()
    requires = ["torch==2.13.0", "numpy==1.0", "xgrammar (==0.1)", "loose>=2", 'extra-thing==1; extra == "all"']
    lines = ["Metadata-Version: 2.1", "Name: sglang", "Version: 9.9", *(f"Requires-Dist: {r}" for r in requires)]
    (info / "METADATA").write_text("\n".join(lines) + "\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    found = packages.exact_pins("sglang")
    assert sorted(found) == ["numpy", "torch", "xgrammar"]
    assert found["xgrammar"] == {"wants": "0.1", "has": None} and found["torch"]["has"]
    package = tmp_path / "engine_like" / "srt" / "models"
    package.mkdir(parents=True)
    (tmp_path / "engine_like" / "__init__.py").touch()
    (package / "qwen3_5.py").touch()
    assert packages.model_files("engine_like", "srt/models", ["llama", "qwen3_5"]) == ["qwen3_5"]
    assert packages.model_files("no_such_package", "models", ["llama"]) is None
    smi = "GPU-1, 123, /usr/bin/python, -c, x, 4096\nGPU-1, 9, Xorg, [N/A]\nno line\n"
    assert machine_read.parse_processes(smi) == [
        ("GPU-1", GpuProcess(pid=123, name="/usr/bin/python, -c, x", memory=4096 * 2**20)),
        ("GPU-1", GpuProcess(pid=9, name="Xorg", memory=None)),
    ]


def killed_run(root: Path) -> tuple[run_dir.RunDir, subprocess.Popen[bytes]]:
    """A run whose supervisor is gone, with a child that is not."""
    home = root / "runs" / "a"
    (home / "weights").mkdir(parents=True)
    (home / "config").mkdir()
    (home / "weights" / "x").write_bytes(b"0" * 1000)
    (home / "recipe.json").write_text("{}")
    run = run_dir.RunDir(home)
    run.start(recipe=TINY, steps=9)
    run.update(pid=2**22 - 1, create_time=1.0, boot=None, step=4)
    modules = root / "modules" / "astracli"
    modules.mkdir(parents=True)
    (modules / "__init__.py").touch()
    (modules / "sleeper.py").write_text("import time\ntime.sleep(120)\n")
    config = home.resolve() / "config" / "trainer.json"
    config.write_text("{}")
    child = subprocess.Popen([sys.executable, "-m", "astracli.sleeper", str(config)], cwd=root / "modules")
    return run, child


def test_a_dead_run_and_its_processes_are_named_and_cleaned(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, astra: Any
) -> None:
    run, child = killed_run(tmp_path)
    try:
        deadline = time.monotonic() + 60
        while not cleaning.leftovers(run) and time.monotonic() < deadline:
            time.sleep(0.02)
        (left,) = gather.dead_runs(tmp_path / "runs")
        assert left.step == 4 and left.bytes == 1002
        assert left.processes == {str(child.pid): "astracli.sleeper"}
        monkeypatch.chdir(tmp_path)
        said = astra("runs", "clean", "a", "--dry-run")
        assert said.out.startswith("runs/a  1 kB") and child.poll() is None
        said = astra("runs", "clean", "a")
        assert said.code == 0 and f"ended process {child.pid} that `runs/a` left behind" in said.err
        assert not psutil.pid_exists(child.pid)
        assert gather.dead_runs(tmp_path / "runs")[0].processes == {}
        assert not run.weights.exists()
    finally:
        child.kill()
        child.wait()


def test_a_run_that_lives_or_ended_is_not_dead(tmp_path: Path) -> None:
    for name in ("alive", "done"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "recipe.json").write_text("{}")
        run_dir.RunDir(tmp_path / name).start(recipe=TINY)
    run_dir.RunDir(tmp_path / "done").end("done", exit_code=0)
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "recipe.json").write_text("{}")
    (tmp_path / "damaged" / "status.json").write_text("{")
    assert gather.dead_runs(tmp_path) == ()


def test_the_document_of_a_broken_checkpoint_judges_it_anywhere(tmp_path: Path) -> None:
    place = tiny(tmp_path)
    (place / "tokenizer.json").unlink()
    recipe = recipe_io.load(TINY, [f"model.path={place}"])
    report = checks.run(recipe, validate(gather.gather(recipe).document()))
    assert {c["name"] for c in report["checks"] if c["status"] == "fail"} == {"tokenizer"}
