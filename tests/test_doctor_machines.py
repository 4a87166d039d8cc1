"""The shipped machine documents, and the verdicts that an expert gives on them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from doctor_cases import checkpoint
from test_doctor import BIG, SHARED, TINY, found, judged, one

from astracli.machine import documents as machine_facts

RECORDED = Path(__file__).parent / "fixtures" / "machines"
"""Environments of the past: AstraFlow's on L40s, and torch 2.11 with TileLang on an H200."""
ASTRAFLOW, TILELANG = (str(RECORDED / f"{name}.json") for name in ("8xl40-astraflow", "1xh200-tilelang"))


def document(name: str) -> dict[str, Any]:
    return machine_facts.load(name).document()


def choices(report: dict[str, Any]) -> dict[str, str]:
    return {row["what"]: row["choice"] for row in report["backends"]}


def test_the_shipped_documents_are_what_their_script_makes() -> None:
    """Of the versions that constraints/ pins now."""
    script = Path(__file__).parents[1] / "scripts" / "make_machines.py"
    done = subprocess.run([sys.executable, str(script), "--check"], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_shipped_documents_say_what_they_are() -> None:
    names = machine_facts.names()
    assert {"1xl40", "8xl40", "8xa100-80g", "8xh100", "1xh200", "2xh200", "8xh200", "8xb200", "laptop"} <= set(names)
    for name in names:
        facts = document(name)
        assert facts["source"].startswith("typical, not measured: ")
        assert str(len(facts["gpus"])) == name.partition("x")[0] or name in ("laptop", "rtx5090", "container")
        assert (facts["checkpoint"], facts["data"], facts["network"]) == (None, [], None), "nothing that nobody knows"


VERDICTS: list[tuple[str, str, set[str], set[str], str]] = [
    # machine, recipe, what fails, what warns, serving attention
    ("8xl40", BIG, set(), {"checkpoint"}, "flashinfer"),
    (ASTRAFLOW, BIG, set(), {"checkpoint"}, "flashinfer"),
    ("8xl40", TINY, set(), set(), "sdpa"),
    ("8xh100", BIG, set(), {"checkpoint"}, "flashinfer"),
    ("1xa100-80g", BIG, {"gpus"}, {"checkpoint", "locked memory"}, "flashinfer"),
    ("1xa100-80g", SHARED, set(), {"checkpoint"}, "flashinfer"),
    ("8xb200", BIG, set(), {"checkpoint"}, "trtllm_mha"),
    ("rtx5090", BIG, {"gpus"}, {"checkpoint", "open files", "gpus in use"}, "flashinfer"),
    ("rtx5090", SHARED, set(), {"checkpoint", "open files", "gpus in use"}, "flashinfer"),
    ("rtx5090", TINY, set(), {"open files"}, "sdpa"),
    ("laptop", TINY, set(), {"open files"}, "sdpa"),
    (
        "laptop",
        BIG,
        {"gpus", "memory"},
        {"open files", "checkpoint", "disk", "load"},
        "auto",
    ),
    ("container", BIG, {"shared memory"}, {"open files", "locked memory", "checkpoint"}, "flashinfer"),
    ("container", SHARED, set(), {"open files", "shared memory", "checkpoint"}, "flashinfer"),
    ("container", TINY, set(), {"open files"}, "sdpa"),
]


@pytest.mark.parametrize(("name", "recipe", "fails", "warns", "serving"), VERDICTS)
def test_verdicts(name: str, recipe: str, fails: set[str], warns: set[str], serving: str) -> None:
    report = judged(recipe, document(name))
    assert set(found(report, "fail")) == fails
    evaluations = set() if recipe == TINY else {"load"}  # those of the math recipes generate more than training
    assert set(found(report, "warn")) == warns | evaluations
    assert report["ok"] is not bool(fails)
    assert choices(report)["serving attention"] == serving


def test_l40_with_the_references_environment() -> None:
    """flashinfer and triton may serve, fa3 is refused with the reason; samples are kept apart by our own path, not by
    transformers 5.8.1; the development build of SGLang counts by the model that it holds, not by its number."""
    report = judged(BIG, document(ASTRAFLOW))
    attention = one(report, "attention backends")
    assert attention["value"].startswith("flashinfer, triton") and attention["value"].endswith("refused: fa3")
    assert "dies under load" in attention["why"]
    assert one(report, "packing")["value"] == "astra's own varlen path resets convolution and delta rule"
    assert "transformers 5.8.1 leaks state between packed samples silently" in one(report, "packing")["why"]
    assert one(report, "sglang")["value"] == "0.5.6.post3.dev5643+g373cadc92, holds `qwen3_5`"
    assert one(report, "gated backward")["status"] == "ok"
    assert choices(report)["delta rule, backward"] == "fla"
    asked = judged(BIG, document(ASTRAFLOW), "rollout.sglang.attention_backend=fa3")
    assert found(asked, "fail") == {"refused": "fail"}
    assert judged(BIG, document(ASTRAFLOW), "rollout.sglang.attention_backend=triton")["ok"] is True


def test_the_references_kernels_on_hopper_lose_the_fast_backward() -> None:
    report = judged(BIG, document("8xh100") | {"packages": document(ASTRAFLOW)["packages"]})
    assert report["ok"] is True
    assert one(report, "gated backward")["status"] == "warn"
    assert choices(report)["delta rule, backward"] == "torch"
    assert choices(judged(BIG, document("8xh100")))["delta rule, backward"] == "fla"


def test_the_container_is_mended_by_the_two_options_that_it_names() -> None:
    box = document("container")
    report = judged(BIG, box)
    assert one(report, "shared memory")["fix"] == "start the container with `--shm-size=8g`"
    assert "--ulimit nofile=65536:65536" in one(report, "open files")["fix"]
    box["system"] |= {"shm_total": 8 * 2**30, "nofile": 65536, "memlock": -1}
    box["checkpoint"] = checkpoint()
    assert found(judged(BIG, box), "fail", "warn") == {"load": "warn"}, "its evaluations generate more than training"


def test_the_command_judges_a_document(astra: Any, tmp_path: Path) -> None:
    """Failures with their mending first, backends last, nothing wider than 100 columns."""
    file = tmp_path / "container.json"
    file.write_text(json.dumps(document("container")))
    said = astra("doctor", BIG, "--facts", str(file))
    lines = said.out.splitlines()
    assert said.code == 1
    assert lines[0] == "fail  system/shared memory: 64.0 MiB at /dev/shm"
    assert "      fix: start the container with `--shm-size=8g`" in lines
    starts = [line.split()[0] for line in lines if line.startswith(("fail", "warn", "ok ", "backend"))]
    assert starts == ["fail", "warn", "warn", "warn", "warn", "ok", "backend"]
    assert lines[-1].startswith("a run would not work: ") and lines[-1].endswith("1 failed")
    assert max(map(len, lines)) <= 100
    assert astra("doctor", TINY, "--facts", str(file)).code == 0
    assert json.loads(astra("doctor", BIG, "--facts", str(file), "--json").out) == judged(BIG, document("container"))
    assert astra("doctor", TINY, "--facts", str(file), "--probe").code == 2


def test_a_document_that_was_written_is_read_again(astra: Any, tmp_path: Path) -> None:
    file = tmp_path / "here.json"
    here = astra("doctor", TINY, "--no-probe", "--json", "--facts-out", str(file))
    there = astra("doctor", TINY, "--facts", str(file), "--json")
    assert here.code == there.code == 0
    assert json.loads(here.out) == json.loads(there.out)
    assert json.loads(file.read_text()) == json.loads(here.out)["facts"]
    assert astra("doctor", "--no-probe", "--facts-out", str(tmp_path / "none" / "x.json")).code == 2


def test_data_recorded_for_another_recipe_is_not_judged(astra: Any, tmp_path: Path) -> None:
    file = tmp_path / "m.json"
    assert astra("doctor", "qwen3.5-tiny-m2po-delta", "--no-probe", "--facts-out", str(file)).code == 0
    report = json.loads(astra("doctor", "qwen3.5-4b-m2po-delta", "--facts", str(file), "--json").out)
    found = {c["name"]: (c["status"], c["value"]) for c in report["checks"] if c["group"] == "data"}
    assert found["training data"] == found["benchmarks"] == ("skip", "not in this document")


def test_tilelang_on_an_h200_needs_its_own_tvm_ffi() -> None:
    whole = document(TILELANG)
    check = one(judged(BIG, whole), "tilelang")
    assert (check["status"], check["value"]) == ("ok", "0.1.11")
    whole["packages"]["apache-tvm-ffi"]["version"] = "0.1.15"
    report = judged(BIG, whole)
    check = one(report, "tilelang")
    assert check["status"] == "warn" and check["fix"] == "`pip install apache-tvm-ffi==0.1.11`"
    assert "0.1.15 is installed" in check["why"]
    assert one(report, "gated backward")["status"] == "warn"
