"""Machine facts: the document and its schema, what counts as importable, GPUs and cgroup limits from recorded text."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from astracli.errors import UserError
from astracli.machine import facts as machine
from astracli.machine import read as machine_read
from astracli.machine.facts import Machine

SMI = """0, GPU-aa11, NVIDIA L40, 8.9, 46068, 45000, 580.105.08
1, GPU-bb22, NVIDIA L40, 8.9, 46068, 46000, 580.105.08
2, GPU-cc33, NVIDIA GH200, 9.0, [N/A], [N/A], 580.105.08
"""


def test_probe_is_quick_valid_json_and_imports_nothing_heavy() -> None:
    code = (
        "import json, sys, time; from astracli.machine import facts, read\n"
        "t = time.process_time(); document = read.probe().document(); spent = time.process_time() - t\n"
        "facts.validate(document)\n"
        "heavy = [m for m in ('torch', 'transformers', 'numpy', 'datasets') if m in sys.modules]\n"
        "print(json.dumps({'document': document, 'spent': spent, 'heavy': heavy}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    assert answer["heavy"] == []
    assert answer["spent"] < 0.5
    document = answer["document"]
    assert document["schema_version"] == 1
    assert document["python"]["executable"] == sys.executable
    assert document["system"]["cores_usable"] <= document["system"]["cores"] == os.cpu_count()
    assert 0 < document["system"]["memory_available"] <= document["system"]["memory_total"]
    import torch

    assert document["packages"]["torch"]["version"] == torch.__version__
    assert document["torch_cuda"] == torch.version.cuda
    assert machine.validate(document).usable("torch")


def test_validate_names_the_key() -> None:
    here = machine_read.probe().document()
    assert machine.validate(here).document() == here
    for table, key, value in (("system", "memory_total", "plenty"), ("system", "cores", "8"), ("python", "venv", 1)):
        with pytest.raises(UserError, match=rf"`{table}\.{key}`: input should be a valid"):
            machine.validate(here | {table: here[table] | {key: value}})
    with pytest.raises(UserError, match=r"`packages\.torch\.surprise`: extra inputs are not permitted"):
        machine.validate(here | {"packages": {"torch": here["packages"]["torch"] | {"surprise": 1}}})
    with pytest.raises(UserError, match=r"`compilers\.nvcc`: field required"):
        machine.validate(here | {"compilers": {"cc": None}})
    assert Machine.model_json_schema()["properties"]["schema_version"]["const"] == 1


def test_a_namespace_stub_is_not_importable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "flash_attn").mkdir()  # a folder without __init__.py: `import flash_attn` succeeds, and holds nothing
    monkeypatch.syspath_prepend(str(tmp_path))
    here = machine_read.probe()
    assert here.packages["flash-attn"].importable_spec is True
    assert here.packages["flash-attn"].origin is None
    assert not here.usable("flash-attn")
    assert here.version_of("flash-attn") == ()


def test_gpus_from_nvidia_smi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    smi = tmp_path / "nvidia-smi"
    smi.write_text(f"#!/bin/sh\ncat <<'END'\n{SMI}END\n")
    smi.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    here = machine_read.probe()
    assert [gpu.compute_capability for gpu in here.gpus] == ["8.9", "8.9", "9.0"]
    assert here.gpu_sizes == {0: 46068 * 2**20, 1: 46068 * 2**20} and here.gpus[2].memory_total is None
    assert len(here.visible_gpus) == 3 and here.capability == (8, 9)
    smi.write_text("#!/bin/sh\necho 'NVIDIA-SMI has failed: no driver'; exit 9\n")
    broken = machine_read.probe()
    assert broken.gpus == () and "no driver" in str(broken.gpu_error)


@pytest.mark.parametrize(
    ("setting", "indexes"),
    [(None, [0, 1, 2]), ("", []), ("2,0", [2, 0]), ("GPU-bb", [1]), ("1,7,0", [1]), ("-1", [])],
)
def test_cuda_visible_devices_is_read_as_cuda_reads_it(setting: str | None, indexes: list[int]) -> None:
    more = {"gpus": tuple(machine_read.parse_gpus(SMI)), "env": {"CUDA_VISIBLE_DEVICES": setting}}
    here = machine_read.probe().model_copy(update=more)
    assert [gpu.index for gpu in here.visible_gpus] == indexes


def test_cgroup_limits_take_the_tightest_of_the_tree(tmp_path: Path) -> None:
    inner = tmp_path / "pod" / "box"
    inner.mkdir(parents=True)
    (inner / "memory.max").write_text("max\n")
    (inner / "cpu.max").write_text("150000 100000\n")
    (tmp_path / "pod" / "memory.max").write_text("4294967296\n")
    (tmp_path / "pod" / "memory.current").write_text("1073741824\n")
    (tmp_path / "pod" / "cpu.max").write_text("max 100000\n")
    assert machine_read.cgroup_limits(tmp_path, "/pod/box") == (4 * 2**30, 2**30, 1.5)
    assert machine_read.cgroup_limits(tmp_path / "nothing", "/") == (None, None, None)


def test_version_tuple() -> None:
    assert machine.version_tuple("2.13.0+cu130") == (2, 13, 0)
    assert machine.version_tuple("0.5.13.post1") == (0, 5, 13)
    assert machine.version_tuple("unknown") == ()
