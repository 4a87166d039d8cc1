"""Probes: children that answer, hang and die; kernels that are right and wrong; ranks that agree."""

from __future__ import annotations

import dataclasses
import os
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from machines import facts
from test_doctor import BIG, TINY, gpu_box

from astracli.adapters import generic, qwen3_5
from astracli.config import recipe_io
from astracli.doctor import all_reduce, measures, probe_child, probes
from astracli.doctor.probes import Probe
from astracli.doctor.subject import Subject, subject
from astracli.kernels import varlen
from astracli.machine.facts import validate
from astracli.models import registry
from astracli.models.adapter import DeltaRule

CONFIG = qwen3_5.tiny_config()


def judged(name: str | None = TINY, document: dict[str, Any] | None = None, *sets: str) -> Subject:
    return subject(recipe_io.load(name, list(sets)) if name else None, validate(document or facts()))


def probe(name: str, code: str, timeout_s: float = 20.0, **more: Any) -> Probe:
    """A probe that imports a module of that name from this folder's own path."""
    return Probe(name, "imports", {"wanted": {name: code}}, timeout_s, True, "why", "fix", **more)


def test_every_probe_of_the_tiny_recipe_passes_here() -> None:
    found = {check.name: check for check in probes.run(judged())}
    assert {name: c.status for name, c in found.items() if c.status != "ok"} == {}
    assert set(found) == {
        "imports", "qwen3_5: load", "qwen3_5: block classes", "qwen3_5: wire names", "qwen3_5: parameter count",
        "qwen3_5: output head",
        "qwen3_5: padded rows == separate", "qwen3_5: packed row == separate", "qwen3_5: shared prompt == separate",
        "delta rule, forward",
        "delta rule, backward", "attention sdpa", "engine == trainer", "memory copy", "loopback",
    }  # fmt: skip
    assert found["imports"].value == "torch, transformers, math-verify"
    assert float(found["delta rule, backward"].value.split()[0]) < 1e-5
    assert found["delta rule, backward"].value.endswith("worst of five gradients")


def test_a_child_that_hangs_or_dies_fails_its_probe_and_the_rest_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    modules = {
        "hangs": "import time, os; open('pid', 'w').write(str(os.getpid())); time.sleep(60)",
        "dies": "import os, sys; print('segmentation fault', file=sys.stderr, flush=True); os._exit(139)",
        "noisy": "print('hello'); f = print",
        "hollow": "f = 1",
        "broken": "import no_such_module",
    }
    for name, code in modules.items():
        (tmp_path / f"{name}.py").write_text(code)
    monkeypatch.chdir(tmp_path)
    env = {"PYTHONPATH": f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}"}
    asked = [probe(name, f"{name}:f", 1.0 if name == "hangs" else 20.0, env=env) for name in modules]
    said = {p.name: rows[0] for p, rows in probes.answers(asked, start_s=2.0)}
    assert [(name, row["status"]) for name, row in said.items()] == [
        ("hangs", "fail"), ("dies", "fail"), ("noisy", "ok"), ("hollow", "fail"), ("broken", "fail"),
    ]  # fmt: skip
    assert said["hangs"]["value"] == "no answer in 3 s"
    assert said["dies"]["value"] == "its process ended with code 139: segmentation fault"
    assert said["hollow"]["value"] == "f is not callable"
    assert "No module named 'no_such_module'" in said["broken"]["value"]
    assert not psutil.pid_exists(int((tmp_path / "pid").read_text()))


def test_an_interpreter_that_is_not_there_fails_its_probe() -> None:
    ((_, rows),) = probes.answers([probe("x", "json:loads", python="/no/such/python")])
    assert rows[0]["value"] == "no such file or directory"


def test_another_interpreter_needs_no_astra_for_its_imports(tmp_path: Path) -> None:
    import sys

    bare = tmp_path / "python"
    bare.write_text(f'#!/bin/sh\nexec {sys.base_prefix}/bin/python3 -S -E "$@"\n')
    bare.chmod(0o755)
    asked = [probe("x", "json:loads", python=str(bare)), probe("y", "astracli:x", python=str(bare))]
    (_, good), (_, bad) = probes.answers(asked)
    assert good[0]["status"] == "ok" and bad[0]["status"] == "fail"


def test_what_is_asked_of_whom_on_gpus() -> None:
    """Nothing is run here: the probes of eight GPUs with the 4B recipe, at its head shapes."""
    judged_big = judged(BIG, gpu_box())
    asked = {p.name: p for p in probes.trainer_probes(judged_big)}
    assert set(asked) == {"imports", "adapter", "delta rule", "attention", "all-reduce", "bandwidth"}
    assert set(asked["imports"].arguments["wanted"]) == {
        "torch", "transformers", "math-verify", "triton", "flash-linear-attention",
    }  # fmt: skip
    assert asked["delta rule"].arguments["config"]["text_config"]["linear_num_value_heads"] == 32
    assert asked["delta rule"].arguments["device"] == "cuda"
    assert asked["attention"].arguments["chosen"] == ["sdpa"]
    assert asked["all-reduce"].arguments == {"ranks": 4, "device": "cuda"}
    assert asked["all-reduce"].env["CUDA_VISIBLE_DEVICES"] == "4,5,6,7"
    engine, serving = probes.engine_probes(judged_big)
    assert serving.arguments["chosen"] == ["flashinfer"] and serving.arguments["device"] == "cuda"
    assert engine.arguments["wanted"]["flashinfer-python"] == "flashinfer:single_prefill_with_kv_cache"
    on_cpu = {p.name: p for p in probes.trainer_probes(judged(TINY, gpu_box(), "resources.train_ranks=2"))}
    assert on_cpu["delta rule"].env["CUDA_VISIBLE_DEVICES"] == ""
    assert on_cpu["all-reduce"].arguments == {"ranks": 2, "device": "cpu"}
    assert probes.engine_probes(judged()) == []
    assert {p.name for p in probes.trainer_probes(judged(None))} == {"imports", "bandwidth"}


def test_a_recipe_whose_model_has_to_be_made_first_is_asked_what_can_be(tmp_path: Path, monkeypatch: Any) -> None:
    """No checkpoint, so no adapter and no sizes: on a laptop and where the GPUs are."""
    monkeypatch.chdir(tmp_path)
    for document in (facts(), gpu_box()):
        small = judged("qwen3.5-small-m2po-delta", document)
        assert small.adapter is None and small.refusal is not None
        assert {p.name for p in probes.engine_probes(small)} <= {"engine imports"}
        assert {p.name for p in probes.trainer_probes(small)} == {"imports", "bandwidth"}


def test_an_adapter_without_a_tiny_model_is_skipped_and_said() -> None:
    asked = judged()
    bare = dataclasses.replace(asked, adapter=generic.ADAPTER, facts=asked.facts.model_copy(update={"packages": {}}))
    assert [(c.name, c.status) for c in probes.run(bare)] == [("generic", "skip")]


def with_adapter(monkeypatch: pytest.MonkeyPatch, **changes: Any) -> None:
    changed = dataclasses.replace(qwen3_5.ADAPTER, **changes)
    monkeypatch.setattr(registry, "get", lambda name: changed)


def test_a_leaking_adapter_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def leaking(model: Any) -> None:
        assert qwen3_5.ADAPTER.install_varlen is not None
        qwen3_5.ADAPTER.install_varlen(model)
        varlen.carry_state(model)

    with_adapter(monkeypatch, install_varlen=leaking)
    failed = [row["name"] for row in measures.adapter("qwen3_5", "cpu") if row["status"] == "fail"]
    assert failed == ["packed row == separate", "shared prompt == separate"]


@pytest.mark.parametrize("part", ["forward", "backward"])
def test_a_wrong_delta_rule_is_found(monkeypatch: pytest.MonkeyPatch, part: str) -> None:
    right = qwen3_5.delta_rule(CONFIG, "cpu")

    def wrong(q: Any, k: Any, v: Any, *, g: Any, beta: Any, **more: Any) -> Any:
        if part == "forward":
            return right.rule(q, k, v * 1.001, g=g, beta=beta, **more)
        return right.rule(q, k, v, g=g.detach() + 0 * g, beta=beta, **more)  # the gate gets no gradient

    broken = DeltaRule(wrong, right.value_heads, right.key_dim, right.value_dim)
    with_adapter(monkeypatch, delta_rule=lambda config, device: broken)
    said = {row["name"]: row["status"] for row in measures.delta_rule("qwen3_5", CONFIG, "cpu")}
    assert said[f"delta rule, {part}"] == "fail"
    assert (said["delta rule, forward"] == "ok") is (part == "backward")


def test_a_wrong_or_nan_attention_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    grouped = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
    monkeypatch.setitem(probe_child.BACKENDS, "leaky", lambda q, k, v: probe_child.BACKENDS["sdpa"](q, k, v.flip(0)))
    monkeypatch.setitem(probe_child.BACKENDS, "nan", lambda q, k, v: q * float("nan"))
    rows = probe_child.attention(grouped, "cpu", ["sdpa", "leaky", "nan", "fa3"])
    assert [row["status"] for row in rows] == ["ok", "fail", "fail", "skip"]
    assert rows[2]["value"].startswith("inf")


def test_an_engine_that_disagrees_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def off(path: Any, *, attention: str) -> Any:
        model = qwen3_5.load(path, attention=attention)
        with torch.no_grad():
            model.model.norm.weight += 0.1
        return model

    assert measures.parity("qwen3_5", "embedded")[0]["status"] == "ok"
    with_adapter(monkeypatch, load_for_serving=off)
    (row,) = measures.parity("qwen3_5", "embedded")
    assert row["status"] == "fail" and float(row["value"].split()[0]) > 1e-3


def test_slow_links_fail_their_row() -> None:
    assert measures.speed_row("x", 1e9, 5e9) == {"name": "x", "status": "fail", "value": "1.0 GB/s (at least 5)"}
    assert measures.speed_row("x", 6e9, 5e9)["status"] == "ok"


def test_two_ranks_sum() -> None:
    (row,) = all_reduce.all_reduce(2, "cpu")
    assert row["status"] == "ok" and row["value"].startswith("2 ranks, 1 MiB in ")


def test_ranks_that_cannot_meet_are_ended_and_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(all_reduce, "LIMIT_S", 0.2)
    start = time.monotonic()
    assert all_reduce.attempt(2, "cpu", {}, start_s=0.0) is None
    assert time.monotonic() - start < 60
    tried: list[dict[str, str]] = []

    def attempt(ranks: int, device: str, env: dict[str, str]) -> str | None:
        tried.append(env)
        return "4 ranks, 256 MiB in 30.0 ms" if env else None

    monkeypatch.setattr(all_reduce, "attempt", attempt)
    monkeypatch.setattr(
        all_reduce, "peer_access", lambda ranks: {"name": "peer access", "status": "ok", "value": "all"}
    )
    row = all_reduce.all_reduce(4, "cuda")[-1]
    assert tried == [{}, {"NCCL_P2P_DISABLE": "1"}]
    assert row["status"] == "fail" and "export NCCL_P2P_DISABLE=1" in row["fix"]
    monkeypatch.setattr(all_reduce, "attempt", lambda *args: None)
    assert all_reduce.all_reduce(4, "cuda")[-1]["value"].endswith("nor with NCCL_P2P_DISABLE=1")


def test_every_rank_sees_its_own_gpu_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    started = []

    class Ended:
        def __init__(self, command: Any, env: Any, **more: Any) -> None:
            started.append(env.get("CUDA_VISIBLE_DEVICES"))

        def wait(self, timeout: float | None = None) -> int:
            return 1

        def kill(self) -> None:
            pass

    monkeypatch.setattr(all_reduce.subprocess, "Popen", Ended)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,GPU-1a, 6")
    assert all_reduce.attempt(3, "cuda", {}) is None
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    assert all_reduce.attempt(2, "cuda", {}) is None
    assert all_reduce.attempt(2, "cpu", {}) is None
    assert started == ["4", "GPU-1a", "6", "0", "1", None, None]


def test_a_failed_row_carries_its_own_mending() -> None:
    asked = Probe("all-reduce", "all_reduce", {}, 1, True, "why", "fix")
    row = {"name": "all-reduce", "status": "fail", "value": "v", "fix": "own"}
    check = probes.check_of(judged(), asked, row)
    assert (check.status, check.why, check.fix) == ("fail", "why", "own")
    optional = dataclasses.replace(asked, needed=False)
    assert probes.check_of(judged(), optional, row).status == "warn"
    assert probe_child.imports({"x": "json:nothing"})[0]["status"] == "fail"


def test_attention_is_measured_by_an_interpreter_that_need_not_hold_astra(tmp_path: Path) -> None:
    import sys

    config = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "hidden_size": 64}
    sizes = {"config": config, "device": "cpu", "chosen": ["sdpa", "fa3"]}
    (tmp_path / "astracli.py").write_text("raise ImportError('not here')")
    there = {"python": sys.executable, "env": {"PYTHONPATH": f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}"}}
    asked = [Probe("serving attention", "attention", sizes, 60.0, True, "why", "fix", **there)]
    asked.append(probe("astracli", "astracli:x", **there))
    (_, rows), (_, hidden) = probes.answers(asked)
    assert [row["status"] for row in rows] == ["ok", "skip"]
    assert "not here" in hidden[0]["value"]
