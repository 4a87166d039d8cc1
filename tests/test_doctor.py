"""The doctor on recorded machines: what fails, what only warns, and the cure that is named; and adapter promises."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest
import torch
from machines import facts, package

from astracli import machine, recipe_io
from astracli.adapters import generic, qwen3_5
from astracli.doctor import checks
from astracli.errors import UserError


def found(report: dict[str, Any], *statuses: str) -> dict[str, str]:
    return {c["name"]: c["status"] for c in report["checks"] if c["status"] in statuses}


def one(report: dict[str, Any], name: str) -> dict[str, Any]:
    (check,) = [c for c in report["checks"] if c["name"] == name]
    return check


def test_this_machine_without_a_recipe() -> None:
    report = checks.run(None, machine.probe())
    assert report["ok"] is True
    assert report["backends"] == []
    assert one(report, "torch")["value"] == torch.__version__
    assert one(report, "torch")["status"] == "ok"
    assert report["facts"]["schema_version"] == 1
    json.dumps(report)


def test_core_packages_fail_by_name_and_version() -> None:
    document = facts(packages={"transformers": "5.1.0", "numpy": None})
    report = checks.run(None, document)
    assert report["ok"] is False
    assert found(report, "fail") == {"transformers": "fail", "numpy": "fail"}
    assert one(report, "transformers")["fix"] == "`pip install 'transformers>=5.8'`"
    assert one(report, "numpy")["why"] == "every run imports it"


def test_old_python_fails() -> None:
    document = facts()
    document["python"]["version"] = "3.10.12"
    assert found(checks.run(None, document), "fail") == {"python": "fail"}


def test_small_containers_are_warned_about_and_never_failed() -> None:
    document = facts()
    document["system"] |= {"nofile": 1024, "shm_total": 32 * 2**20, "cores_usable": 1.0}
    report = checks.run(None, document)
    assert report["ok"] is True
    assert found(report, "warn") == {"open files": "warn", "/dev/shm": "warn", "cpu cores": "warn"}
    assert one(report, "/dev/shm")["fix"] == "start the container with `--shm-size=8g`"
    document["system"] |= {"nofile": -1, "shm_total": None, "cores_usable": 2.0}
    assert found(checks.run(None, document), "warn", "fail") == {}


def test_a_namespace_stub_is_seen_through() -> None:
    document = facts("9.0", 1)
    document["packages"]["flash-attn"] = package(None, stub=True)
    check = one(checks.run(None, document), "flash-attn")
    assert (check["status"], check["value"]) == ("warn", "stub")


def test_the_gpu_group() -> None:
    assert one(checks.run(None, facts()), "gpus")["status"] == "skip"
    hidden = one(checks.run(None, facts("9.0", 2, visible="")), "gpus")
    assert hidden["value"] == "2 hidden by CUDA_VISIBLE_DEVICES"
    document = facts("9.0", 2)
    document["torch_cuda"] = None
    assert found(checks.run(None, document), "warn") == {"torch for gpus": "warn"}
    document = facts("9.0", 2)
    document["gpus"][0]["driver"] = "550.54.15"
    driver = one(checks.run(None, document), "driver")
    assert (driver["status"], driver["why"]) == ("warn", "CUDA 13.0 needs 580 or newer")
    document["gpu_error"] = "no driver"
    assert one(checks.run(None, document), "gpus")["why"] == "no driver"


def test_a_cpu_recipe_passes_and_shows_its_backends() -> None:
    report = checks.run(recipe_io.load("qwen3.5-tiny-m2po-delta"), facts())
    assert report["ok"] is True, found(report, "fail")
    assert one(report, "adapter")["value"].startswith("qwen3_5")
    assert one(report, "fit")["value"] == "qwen3.5-tiny-m2po-delta can run here (4 processes)"
    assert {b["what"]: b["choice"] for b in report["backends"]}["engine"] == "embedded"


def test_a_gpu_recipe_fails_for_what_it_lacks_and_warns_of_a_download() -> None:
    report = checks.run(recipe_io.load("qwen3.5-4b-m2po-delta"), facts("8.9", 2, host_gib=512))
    assert report["ok"] is False
    assert found(report, "fail") == {"gpus": "fail"}
    gpus = [c for c in report["checks"] if c["name"] == "gpus" and c["group"] == "recipe"]
    assert gpus[0]["value"] == "8 GPUs (this machine has 2)"
    assert one(report, "checkpoint")["status"] == "warn"
    assert checks.run(recipe_io.load("qwen3.5-4b-m2po-delta"), facts("8.9", 8, host_gib=512))["ok"] is True


def test_a_refused_combination_is_a_failed_check_with_its_way_out() -> None:
    recipe = recipe_io.load("qwen3.5-4b-m2po-delta", ["rollout.attention_backend=fa3"])
    report = checks.run(recipe, facts("8.9", 8, host_gib=512))
    refused = one(report, "refused")
    assert refused["status"] == "fail" and "CUDA error: invalid argument" in refused["why"]
    assert "`flashinfer`" in refused["fix"]


def test_the_hopper_backward_is_a_warning_with_its_cure() -> None:
    document = facts("9.0", 8, host_gib=512, packages={"triton": "3.6.0"})
    report = checks.run(recipe_io.load("qwen3.5-4b-m2po-delta"), document)
    warned = [c for c in report["checks"] if c["name"] == "warning" and "fla issue 640" in c["why"]]
    assert len(warned) == 1 and "triton>=3.7.1" in warned[0]["fix"]


def test_facts_that_are_none_are_refused() -> None:
    with pytest.raises(UserError, match="not a machine description: `system`"):
        checks.run(None, {"schema_version": 1})


def test_numeric_checks_find_a_leak_and_skip_where_there_is_no_tiny_model() -> None:
    leaking = dataclasses.replace(qwen3_5.ADAPTER, install_varlen=lambda model: None)
    failed = [check for check in checks.numerics(leaking) if check.status == "fail"]
    assert [check.name for check in failed] == ["qwen3_5: packed row == separate"]
    assert "constraints/cpu.txt" in failed[0].fix
    assert [check.status for check in checks.numerics(generic.ADAPTER)] == ["skip"]


def test_probing_runs_the_recipes_adapter() -> None:
    report = checks.run(recipe_io.load("qwen3.5-tiny-m2po-delta"), facts(), probe=True)
    numeric = {c["name"]: c["status"] for c in report["checks"] if c["group"] == "numerics"}
    assert numeric["qwen3_5: packed row == separate"] == "ok"
    assert set(numeric.values()) == {"ok"} and len(numeric) == 6
