"""The doctor's judgement: each check failing and passing on documents, what a recipe can and cannot fail."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from doctor_cases import CASES, NET, Case, checkpoint, dead, held_by, pkg, put, stub
from machines import facts, package

from astracli.adapters import qwen3_5
from astracli.config import recipe_io
from astracli.doctor import checks, system
from astracli.machine import facts as machine
from astracli.machine import packages, read

TINY, BIG, SHARED = "qwen3.5-tiny-m2po-delta", "qwen3.5-4b-m2po-delta", "qwen3.5-0.8b-m2po-delta"
Report = dict[str, Any]


def found(report: Report, *statuses: str) -> dict[str, str]:
    return {c["name"]: c["status"] for c in report["checks"] if c["status"] in statuses}


def one(report: Report, name: str, group: str | None = None) -> dict[str, Any]:
    (check,) = [c for c in report["checks"] if c["name"] == name and group in (None, c["group"])]
    return check


def judged(recipe: str | None, document: dict[str, Any], *sets: str) -> Report:
    return checks.run(recipe_io.load(recipe, list(sets)) if recipe else None, machine.validate(document))


def gpu_box(capability: str = "8.9", count: int = 8, **more: Any) -> dict[str, Any]:
    return facts(capability, count, **{"host_gib": 512, **more})


@pytest.mark.parametrize("case", CASES, ids=[f"{c.group}-{c.name}-{i}".replace(" ", "_") for i, c in enumerate(CASES)])
def test_each_check_wrong_and_right(case: Case) -> None:
    """On eight GPUs with the 4B recipe, which needs all of it."""
    sick, well = gpu_box(), gpu_box()
    case.wrong(sick)
    case.right(well)
    report = judged(BIG, sick)
    check = one(report, case.name, case.group)
    assert check["status"] == case.status
    assert case.fix in check["fix"] and check["why"]
    assert report["ok"] is (not found(report, "fail"))
    sound = [c for c in judged(BIG, well)["checks"] if (c["name"], c["group"]) == (case.name, case.group)]
    assert [c["status"] for c in sound] == ([] if case.good == "absent" else [case.good])


def test_vllm_is_judged_where_a_recipe_takes_it() -> None:
    """Absent, too old for a hybrid, with another torch than its own, and with a transformers that misreads configs."""
    vllm = ("rollout.engine=vllm",)
    missing = one(judged(BIG, gpu_box(), *vllm), "vllm")
    assert missing["status"] == "fail" and "resources.engine.python" in missing["fix"]
    old = gpu_box()
    pkg("vllm", "0.20.2")(old)
    report = judged(BIG, old, *vllm)
    assert "install vllm 0.33" in one(report, "vllm hybrids")["fix"]
    assert one(report, "vllm pins")["status"] == "fail" and "torch" in one(report, "vllm pins")["value"]
    assert not [check for check in report["checks"] if check["name"] == "vllm transformers"]
    pkg("transformers", "4.57.6")(old)
    assert "rope_parameters" in one(judged(BIG, old, *vllm), "vllm transformers")["why"]


def test_every_check_that_can_go_wrong_has_a_case() -> None:
    """Those that only state a choice, and those with tests of their own below, are named here."""
    told = {"adapter", "fit", "attention", "engine", "hub cache"}
    own = {"gated backward", "attention backends", "tilelang", "packing", "refused", "load", "engine python", "vllm"}
    cased = {case.name for case in CASES} | set(system.CORE) | told | own
    boxes = [gpu_box(), gpu_box() | {"checkpoint": checkpoint(), "network": NET | {"hub_asked": True}}]
    seen = {c["name"] for d in boxes for name in (BIG, TINY, None) for c in judged(name, d)["checks"]}
    assert seen - cased == set()


def test_this_machine_without_a_recipe() -> None:
    report = checks.run(None, read.probe())
    assert report["ok"] is True, found(report, "fail")
    assert report["backends"] == []
    assert one(report, "torch")["value"] == torch.__version__
    assert report["facts"]["schema_version"] == 1
    json.dumps(report)


def test_the_report_has_the_documented_shape() -> None:
    report = judged(TINY, facts())
    assert set(report) == {"ok", "checks", "backends", "placement", "memory_by_place", "facts"}
    assert {tuple(c) for c in report["checks"]} == {("name", "group", "status", "value", "why", "fix")}
    assert {tuple(b) for b in report["backends"]} == {("what", "choice", "reason")}
    assert {c["group"] for c in report["checks"]} == {
        "system", "python", "gpu", "kernels", "serving", "trainer", "network", "data", "recipe", "runs",
    }  # fmt: skip
    machine.validate(report["facts"])
    again = judged(TINY, json.loads(json.dumps(report["facts"])))
    assert again == report


def test_only_what_the_recipe_needs_can_fail() -> None:
    """GPUs without a driver, a dead nvidia-smi, an ancient glibc and a broken sglang do not stop a CPU run."""
    document = gpu_box()
    for spoil in (put("torch_cuda", value=None), put("system", "libc", value="glibc 2.17"), stub("sglang")):
        spoil(document)
    document["gpus"][0]["driver"] = "450.1"
    document["system"] |= {"shm_total": 2**20, "nofile": 1024, "memlock": 0}
    document["packages"]["flash-attn"] = package(None, stub=True)
    report = judged(TINY, document)
    assert report["ok"] is True, found(report, "fail")
    document["gpu_error"] = "driver mismatch"
    assert judged(TINY, document)["ok"] is True
    document["torch_cuda"] = "13.0"
    assert judged(None, document)["ok"] is True
    assert judged(BIG, document)["ok"] is False


def test_hidden_gpus_are_said_to_be_hidden() -> None:
    assert one(judged(None, facts()), "gpus")["status"] == "skip"
    assert one(judged(None, facts("9.0", 2, visible="")), "gpus")["value"] == "2 hidden by CUDA_VISIBLE_DEVICES"


def test_processes_on_the_gpus_are_named() -> None:
    document = gpu_box()
    held_by(45 * 2**30)(document)
    check = one(judged(BIG, document), "gpus in use")
    assert check["value"] == "GPU 1: 45.00 GiB taken by python (process 4242)"
    assert check["why"] == "the recipe needs at least 20.05 GiB there"
    assert one(judged(TINY, document), "gpus in use")["status"] == "ok"


def test_a_cpu_recipe_passes_and_shows_its_backends() -> None:
    report = judged(TINY, facts())
    assert report["ok"] is True, found(report, "fail")
    assert one(report, "adapter")["value"].startswith("qwen3_5")
    assert one(report, "fit")["value"] == f"{TINY} fits here (4 processes)"
    assert {b["what"]: b["choice"] for b in report["backends"]}["engine"] == "embedded"


def test_a_gpu_recipe_fails_for_what_it_lacks_and_warns_of_a_download() -> None:
    report = judged(BIG, gpu_box(count=2))
    assert found(report, "fail") == {"gpus": "fail"}
    assert one(report, "gpus", "recipe")["value"] == "needs 8 GPUs (this machine has 2)"
    assert one(report, "checkpoint")["status"] == "warn"
    assert judged(BIG, gpu_box())["ok"] is True


def test_a_refused_combination_is_a_failed_check_with_its_way_out() -> None:
    report = judged(BIG, gpu_box(), "rollout.sglang.attention_backend=fa3")
    refused = one(report, "refused")
    assert refused["status"] == "fail" and "CUDA error: invalid argument" in refused["why"]
    assert "`flashinfer`" in refused["fix"]
    allowed = one(report, "attention backends")
    assert allowed["status"] == "ok"
    assert allowed["value"] == "flashinfer, triton, torch_native allowed on 8.9; refused: fa3"
    hopper = one(judged(BIG, gpu_box("9.0")), "attention backends")
    assert hopper["value"] == "flashinfer, triton, fa3, torch_native allowed on 9.0; not by `auto`: fa3"
    assert hopper["why"] == "fa3: not run with a Gated DeltaNet hybrid yet"


@pytest.mark.parametrize(
    ("fla", "triton", "nvcc", "status"),
    [
        ("0.5.0", "3.6.0", None, "warn"), ("0.5.0", "3.7.1", None, "warn"), ("0.6.0", "3.6.0", None, "warn"),
        ("0.6.0", "3.7.1", None, "ok"), ("0.5.0", "3.3.1", None, "ok"), ("0.5.0", "3.6.0", "/usr/bin/nvcc", "ok"),
    ],
)  # fmt: skip
def test_the_gated_backward_on_hopper(fla: str, triton: str, nvcc: str | None, status: str) -> None:
    versions = {"flash-linear-attention": fla, "triton": triton, "tilelang": "0.1.12" if nvcc else None}
    document = gpu_box("9.0", packages=versions, nvcc=nvcc)
    check = one(judged(BIG, document), "gated backward")
    assert check["status"] == status
    if status == "warn":
        assert "fla issue 640" in check["why"]
        assert ("constraints/cuda.txt" if triton == "3.6.0" else "'flash-linear-attention>=0.6'`") in check["fix"]
        del document["packages"]["sglang"]  # the engine has an environment of its own: nothing holds torch back
        if triton == "3.6.0":
            assert "'torch>=2.13' 'flash-linear-attention>=0.6'" in one(judged(None, document), "gated backward")["fix"]
    ada = gpu_box("8.9", packages=versions)
    assert one(judged(BIG, ada), "gated backward")["status"] == "ok"
    assert one(judged(None, document), "gated backward")["status"] == status


@pytest.mark.parametrize(
    ("name", "nvcc", "status", "kernel"),
    [
        ("cuda.txt", None, "ok", "fla"),
        ("cuda-torch2.11.txt", None, "warn", "torch"),
        ("cuda-torch2.11.txt", "/usr/local/cuda/bin/nvcc", "ok", "fla+tilelang"),
    ],
)
def test_the_shipped_sets_on_hopper(name: str, nvcc: str | None, status: str, kernel: str) -> None:
    """The extras allow either set; what the older one needs on Hopper is said here."""
    text = (Path(__file__).parents[1] / "constraints" / name).read_text()
    lines = [line.split("==") for line in text.splitlines() if "==" in line and not line.startswith("#")]
    document = gpu_box("9.0", packages={n: v for n, v in lines if n in packages.PACKAGES}, nvcc=nvcc)
    document["compilers"]["cccl"] = nvcc and "/usr/local/cuda/include/cccl"
    report = judged(BIG, document)
    assert report["ok"] is True
    check = one(report, "gated backward")
    assert check["status"] == status and one(report, "tilelang")["status"] == "ok"
    assert {row["what"]: row["choice"] for row in report["backends"]}["delta rule, backward"] == kernel
    if status == "warn":
        assert "`pip install -c constraints/cuda.txt" in check["fix"] and "nvcc" in check["fix"]


def test_tilelang_needs_an_nvcc_with_headers() -> None:
    versions = {"flash-linear-attention": "0.5.0", "triton": "3.6.0", "tilelang": "0.1.12"}
    document = gpu_box("9.0", packages=versions, nvcc="/usr/bin/nvcc")
    check = one(judged(BIG, document), "tilelang")
    assert check["status"] == "fail" and "CCCL" in check["value"]
    document["compilers"]["cccl"] = "/usr/local/cuda/include/cccl"
    assert one(judged(BIG, document), "tilelang")["status"] == "ok"
    unused = gpu_box("9.0", packages={"tilelang": "0.1.12"})
    assert one(judged(BIG, unused), "tilelang")["value"] == "0.1.12, without nvcc"


@pytest.mark.parametrize(("version", "said"), [("5.8.1", "silently"), ("5.17.0", "silently"), ("5.23.0", "refuses")])
def test_packing_is_astras_own_whatever_transformers_does(version: str, said: str) -> None:
    document = gpu_box(packages={"transformers": version})
    check = one(judged(BIG, document), "packing")
    assert check["status"] == "ok" and check["value"].startswith("astra's own varlen path") and said in check["why"]


def test_packing_without_a_varlen_path_of_its_own_fails_on_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    import dataclasses

    from astracli.models import registry

    leaking = dataclasses.replace(qwen3_5.ADAPTER, install_varlen=None)
    monkeypatch.setattr(registry, "resolve", lambda recipe, config=None: leaking)
    assert one(judged(BIG, gpu_box()), "packing")["status"] == "fail"
    assert one(judged(TINY, facts()), "packing")["status"] == "warn"


def test_the_engines_environment_is_judged_apart_from_the_trainers() -> None:
    """The trainer's packages hold no sglang, the engine's hold another torch: both are as they should be."""
    document = gpu_box(packages={"sglang": None, "flashinfer-python": None})
    there = copy.deepcopy(gpu_box()["packages"])
    there["sglang"] |= {"models": ["qwen3_5"], "pins": {"torch": {"wants": "2.11.0", "has": "2.11.0+cu130"}}}
    engine = {"executable": "/engine/bin/python", "version": "3.12.3", "packages": there, "torch_cuda": "13.0"}
    document["engine"] = engine
    ask = "resources.engine.python=/engine/bin/python"
    report = judged(BIG, document, ask)
    assert report["ok"] is True, found(report, "fail")
    assert one(report, "engine python")["value"] == "3.12.3 at /engine/bin/python"
    assert one(report, "sglang")["value"] == "0.5.21, holds `qwen3_5`"
    assert one(report, "sglang pins")["status"] == "ok"
    assert one(judged(BIG, document), "sglang")["status"] == "fail"
    document["engine"] = engine | {"error": "no such file or directory", "packages": {}}
    assert found(judged(BIG, document, ask), "fail") == {"engine python": "fail"}
    document["engine"] = None
    assert one(judged(BIG, document, ask), "engine python")["status"] == "warn"


def test_a_choice_without_its_package_fails() -> None:
    document = gpu_box(packages={"flashinfer-python": None})
    asked = one(judged(BIG, document, "rollout.sglang.attention_backend=flashinfer"), "flashinfer")
    assert asked["status"] == "fail" and "rollout.sglang.attention_backend=triton" in asked["fix"]
    assert one(judged(BIG, document), "flashinfer")["status"] == "skip"


def test_dead_runs_and_their_processes_are_named() -> None:
    document = facts()
    dead(1, {"77": "astracli.training.worker"})(document)
    check = one(judged(TINY, document), "dead runs")
    assert check["value"] == "runs/a stopped at step 7, holds 3.00 GiB"
    assert check["why"] == "still running: astracli.training.worker (process 77)"
    dead(7)(document)
    several = [c for c in judged(TINY, document)["checks"] if c["name"] == "dead runs"]
    assert len(several) == 6 and several[-1]["value"] == "2 more, 6.00 GiB"


def test_a_checkpoint_that_a_script_makes_is_mended_by_that_script() -> None:
    lost = {"path": "./small-warm", "place": None, "problem": "model.path = `./small-warm`: nothing at that path"}
    absent = gpu_box() | {"checkpoint": lost}
    assert one(judged("qwen3.5-small-m2po-delta", absent), "checkpoint")["fix"] == (
        "make it: `python scripts/make_small.py ./small-warm`"
    )


def test_load_is_warned_about() -> None:
    document = facts()
    document["system"]["cores_usable"] = 1.0
    check = one(judged(TINY, document), "load")
    assert (check["status"], check["why"]) == ("warn", "they will starve each other")
    assert found(judged(TINY, facts()), "warn") == {}
