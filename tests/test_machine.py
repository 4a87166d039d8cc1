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

SMI = """0, GPU-aa11, NVIDIA L40, 8.9, 46068, 45000, 580.105.08
1, GPU-bb22, NVIDIA L40, 8.9, 46068, 46000, 580.105.08
2, GPU-cc33, NVIDIA GH200, 9.0, [N/A], [N/A], 580.105.08
"""


def test_probe_is_quick_valid_json_and_imports_nothing_heavy() -> None:
    code = (
        "import json, sys, time; from astracli.machine import facts as machine\n"
        "t = time.process_time(); document = machine.probe(); spent = time.process_time() - t\n"
        "machine.validate(document)\n"
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
    assert machine.usable(document, "torch")


def test_validate_names_the_key() -> None:
    document = machine.probe()
    document["system"]["memory_total"] = "plenty"
    with pytest.raises(UserError, match=r"`system\.memory_total`"):
        machine.validate(document)
    document = machine.probe()
    document["surprise"] = 1
    with pytest.raises(UserError, match="`surprise`"):
        machine.validate(document)
    assert machine.schema()["properties"]["schema_version"]["const"] == 1


def test_a_namespace_stub_is_not_importable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "flash_attn").mkdir()  # a folder without __init__.py: `import flash_attn` succeeds, and holds nothing
    monkeypatch.syspath_prepend(str(tmp_path))
    document = machine.probe()
    assert document["packages"]["flash-attn"]["importable_spec"] is True
    assert document["packages"]["flash-attn"]["origin"] is None
    assert not machine.usable(document, "flash-attn")
    assert machine.version_of(document, "flash-attn") == ()


def test_gpus_from_nvidia_smi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    smi = tmp_path / "nvidia-smi"
    smi.write_text(f"#!/bin/sh\ncat <<'END'\n{SMI}END\n")
    smi.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    document = machine.probe()
    assert [g["compute_capability"] for g in document["gpus"]] == ["8.9", "8.9", "9.0"]
    assert document["gpus"][0]["memory_total"] == 46068 * 2**20
    assert document["gpus"][2]["memory_total"] is None
    assert len(machine.visible_gpus(document)) == 3
    smi.write_text("#!/bin/sh\necho 'NVIDIA-SMI has failed: no driver'; exit 9\n")
    broken = machine.probe()
    assert broken["gpus"] == [] and "no driver" in broken["gpu_error"]


@pytest.mark.parametrize(
    ("setting", "indexes"),
    [(None, [0, 1, 2]), ("", []), ("2,0", [2, 0]), ("GPU-bb", [1]), ("1,7,0", [1]), ("-1", [])],
)
def test_cuda_visible_devices_is_read_as_cuda_reads_it(setting: str | None, indexes: list[int]) -> None:
    gpus = machine_read.parse_gpus(SMI)
    facts = {"gpus": gpus, "env": {"CUDA_VISIBLE_DEVICES": setting}}
    assert [gpu["index"] for gpu in machine.visible_gpus(facts)] == indexes


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
