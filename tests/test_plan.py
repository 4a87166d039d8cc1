"""Launch plans on recorded machines: processes, GPU map, bytes, what is missing, and refusals whose hint works."""

from __future__ import annotations

import dataclasses
import itertools
import json
import re
from pathlib import Path
from typing import Any

import pytest
from machines import GIB, facts

from astracli.adapters import qwen3_5
from astracli.backends import choice as backend
from astracli.config import recipe_io
from astracli.config.recipe import Recipe
from astracli.errors import UserError
from astracli.machine.facts import validate
from astracli.models import registry
from astracli.plan import build as plan
from astracli.plan import memory as plan_memory
from astracli.plan.seats import GpuId
from astracli.plan.types import LaunchPlan
from astracli.plan.view import render, to_json, what

TINY = qwen3_5.tiny_config()


def memory_warnings(result: LaunchPlan) -> list[str]:
    """Without the one that the 4B recipes' evaluations deserve anywhere."""
    return [warning for warning in result.warnings if not warning.startswith("evaluations generate")]


def planned(recipe: Recipe, document: dict[str, Any], config: dict[str, Any] | None = None, **more: Any) -> LaunchPlan:
    adapter = registry.resolve(recipe, config)
    there = validate(document)
    choice = backend.choose(adapter, there, recipe, config)
    return plan.build(recipe, adapter, choice, there, config=config, **more)


def load(name: str, *overrides: str) -> Recipe:
    return recipe_io.load(name, overrides)


def tiny(*overrides: str) -> Recipe:
    return load("qwen3.5-tiny-m2po-delta", *overrides)


def test_the_tiny_recipe_on_two_cores() -> None:
    result = planned(tiny(), facts(), TINY)
    assert [p.name for p in result.processes] == ["engine0", "rollout", "trainer", "eval"]
    assert {p.name: p.nice for p in result.processes} == {"engine0": 0, "rollout": 5, "trainer": 0, "eval": 5}
    assert all(p.threads == 1 and p.restarts == 0 and p.gpus == () for p in result.processes)
    assert {p.env["OMP_NUM_THREADS"] for p in result.processes} == {"1"}
    assert {p.env["CUDA_VISIBLE_DEVICES"] for p in result.processes} == {""}
    assert [p.module for p in result.processes] == [
        "astracli.engines.embedded.process",
        "astracli.rollout.worker",
        "astracli.training.worker",
        "astracli.evaluation.worker",
    ]
    assert result.missing == [] and result.warnings == ()
    plan.refuse(result)
    assert plan_memory.total(result.memory, where="host") < 3 * GIB
    assert plan_memory.total(result.memory, where="gpu") == 0


def test_commands_start_what_they_need() -> None:
    def names(command: Any, *overrides: str) -> list[str]:
        return [p.name for p in planned(tiny(*overrides), facts(), TINY, command=command).processes]

    assert names("rollout") == ["engine0", "rollout"]
    assert names("eval", "resources.engines=2") == ["engine0", "engine1", "eval"]
    assert names("train", "eval.every=0") == ["engine0", "rollout", "trainer"]
    assert names("train", "resources.train_ranks=2", "eval.benchmarks=[]") == [
        "engine0",
        "rollout",
        "trainer",
        "trainer1",
    ]


def test_ranks_threads_and_restarts_come_from_the_recipe() -> None:
    overrides = ("resources.train_ranks=2", "resources.threads.engine=3", "launch.max_restarts=1")
    result = planned(tiny(*overrides), facts(), TINY)
    by_name = {p.name: p for p in result.processes}
    assert [(p.rank, p.world_size) for n, p in by_name.items() if n.startswith("trainer")] == [(0, 2), (1, 2)]
    assert (by_name["engine0"].threads, by_name["engine0"].env["OMP_NUM_THREADS"]) == (3, "3")
    assert {n: p.restarts for n, p in by_name.items()} == {
        "engine0": 1,
        "rollout": 1,
        "trainer": 0,
        "trainer1": 0,
        "eval": 1,
    }
    assert "engines and trainer want 5 threads of 2 usable cores: they will starve each other" in result.warnings


def test_draws_that_the_loss_does_not_compute_with_are_warned_of() -> None:
    odd = tiny("rollout.temperature=0.7", "rollout.top_p=0.9")
    (warning,) = (w for w in planned(odd, facts(), TINY).warnings if "rollout." in w)
    assert warning.startswith("rollout.top_p = 0.9: the loss computes with")
    assert not [w for w in planned(tiny("rollout.temperature=0.7"), facts(), TINY).warnings if "rollout." in w]
    assert not [w for w in planned(odd, facts(), TINY, command="rollout").warnings if "rollout." in w]


def test_evaluations_that_generate_more_than_the_rollouts_between_them_are_warned_of(tmp_path: Path) -> None:
    """30x16 + 30x16 + 45x16 + 272x4 + 500x4 completions every ten steps of 32 x 8 rollouts."""

    def told(*overrides: str, name: str = "qwen3.5-4b-m2po-delta", **more: Any) -> list[str]:
        result = planned(load(name, *overrides), facts("8.9", 8, host_gib=512), **more)
        return [warning for warning in result.warnings if warning.startswith("evaluations")]

    assert told() == [
        "evaluations generate more than training: one is 4,768 completions, between two of them 2,560 rollouts are "
        "made; try eval.every=19, or eval.samples=2 with eval.pass_k=2"
    ]
    assert told("eval.every=18") and not told("eval.every=19")
    assert not told("eval.samples=2", "eval.pass_k=2") and told("eval.samples=3", "eval.pass_k=3")
    assert told("eval.every=19", "train.replay_ratio=1")[0].endswith(
        "try eval.every=38, or eval.samples=2 with eval.pass_k=2"
    )
    assert not told(command="eval") and not told("eval.every=0")
    assert not told("eval.every=20", "rollout.max_running_requests=65")
    (narrow,) = told("eval.every=20", "rollout.max_running_requests=65", "eval.max_concurrency=64")
    assert narrow == (
        "evaluations leave slots empty: an engine runs 65 requests at once, and gets 64 of an evaluation; "
        "try eval.max_concurrency=auto"
    )
    own = tmp_path / "own.jsonl"
    own.write_text('{"problem": "1", "answer": "1"}\n' * 700)
    (found,) = told(f'eval.benchmarks=["{own}"]')
    assert "one is 2,800 completions" in found and "try eval.every=11, or eval.samples=3 with eval.pass_k=3" in found
    own.unlink()
    assert not told(f'eval.benchmarks=["{own}"]'), "its size is not known"


def test_gpu_map_of_eight_gpus() -> None:
    result = planned(load("qwen3.5-4b-m2po-delta"), facts("8.9", 8, host_gib=512))
    assert result.gpu_map == {
        GpuId(0): ["engine0"],
        GpuId(1): ["engine1"],
        GpuId(2): ["engine2"],
        GpuId(3): ["engine3"],
        GpuId(4): ["trainer"],
        GpuId(5): ["trainer1"],
        GpuId(6): ["trainer2"],
        GpuId(7): ["trainer3"],
    }
    by_name = {p.name: p for p in result.processes}
    assert by_name["engine2"].env["CUDA_VISIBLE_DEVICES"] == "2"
    assert by_name["engine2"].env["SGLANG_RETURN_ORIGINAL_LOGPROB"] == "0"
    # alone with its GPU: every thread of a rank, the publisher's too, finds it as the current one
    assert by_name["trainer3"].env["CUDA_VISIBLE_DEVICES"] == "7"
    assert by_name["rollout"].env["CUDA_VISIBLE_DEVICES"] == ""
    assert by_name["engine0"].module == "astracli.engines.sglang.server" and by_name["engine0"].restarts == 2
    assert result.missing == ["checkpoint Qwen/Qwen3.5-4B not on this machine"]
    plan.refuse(result)  # a download is no reason to refuse


def test_the_gpu_map_follows_cuda_visible_devices() -> None:
    result = planned(load("qwen3-1.7b-m2po-delta"), facts("9.0", 8, visible="5,2", host_gib=512))
    assert result.gpu_map == {GpuId(2): ["trainer"], GpuId(5): ["engine0"]}
    shared = planned(load("qwen3.5-0.8b-m2po-delta"), facts("9.0", 8, visible="5,2", host_gib=512))
    assert shared.gpu_map == {GpuId(5): ["engine0", "trainer"]}


def test_every_shipped_recipe_plans_on_any_machine() -> None:
    for info in recipe_io.shipped():
        recipe = load(info.name)
        family = "llama" if "smollm" in recipe.model.path else "qwen3_5"
        made_here = recipe.model.path.startswith(("astra:", "./"))  # no Hub id that an adapter knows
        config = registry.get(family).tiny_config() if made_here else None
        for document in (facts(), facts("8.9", 1), facts("9.0", 8, host_gib=512)):
            result = planned(recipe, document, config)
            assert result.model["parameters"] > 0, info.name
            json.dumps(to_json(result))
            assert {t.title for t in render(result)} >= {"processes", "backends", "model", "memory", "disk"}


def test_processes_that_need_the_same_stand_once_in_the_tables() -> None:
    result = planned(load("qwen3.5-4b-m2po-delta"), facts())
    (memory,) = (table for table in render(result) if table.title == "memory")
    labels = list(dict.fromkeys(row[0] for row in memory.rows))
    assert labels == ["supervisor", "4 x engine, each", "rollout", "4 x trainer, each", "eval", "all"]
    whole = sum(what(row) == "weights (bf16)" for row in result.memory)
    assert (whole, sum(row[1] == "weights (bf16)" for row in memory.rows)) == (4, 1)


def test_a_gpu_recipe_on_a_laptop_says_what_is_missing() -> None:
    result = planned(load("qwen3.5-4b-m2po-delta"), facts())
    assert result.missing == [
        "8 GPUs (this machine has none)",
        "package sglang",
        "a CUDA build of torch",
        "66.94 GiB of memory",
        "checkpoint Qwen/Qwen3.5-4B not on this machine",
    ]
    with pytest.raises(UserError) as error:
        plan.refuse(result)
    assert error.value.exit_code == 2
    assert error.value.message == (
        "recipe `qwen3.5-4b-m2po-delta` asks for 8 GPUs (rollout 4, train 4), this machine has none "
        "(also missing: package sglang, a CUDA build of torch, 66.94 GiB of memory)"
    )
    assert error.value.hint == (
        "`astra train --recipe qwen3.5-tiny-m2po-delta` runs on a CPU; "
        "`astra train --recipe qwen3.5-4b-m2po-delta --dry-run --facts 8xl40` plans for another machine"
    )


@pytest.mark.parametrize(
    ("count", "memory_gib", "sets"),
    [
        (1, 141, "resources.rollout_gpus=1 resources.train_gpus=1 resources.share_gpus=true"),
        (2, 141, "resources.rollout_gpus=1 resources.train_gpus=1"),
        (4, 80, "resources.rollout_gpus=2 resources.train_gpus=2"),
        (4, 36, "resources.rollout_gpus=1 resources.train_gpus=3"),
    ],
)
def test_the_hint_of_a_refusal_works(count: int, memory_gib: float, sets: str) -> None:
    document = facts("9.0", count, memory_gib=memory_gib, host_gib=512)
    result = planned(load("qwen3.5-4b-m2po-delta"), document)
    with pytest.raises(UserError, match=rf"asks for 8 GPUs \(rollout 4, train 4\), this machine has {count}") as error:
        plan.refuse(result)
    hint = str(error.value.hint)
    assert hint.startswith("run `astra train --recipe qwen3.5-4b-m2po-delta --set ")
    overrides = re.findall(r"--set ([^ `]+)", hint)
    assert " ".join(overrides) == sets
    plan.refuse(planned(load("qwen3.5-4b-m2po-delta", *overrides), document))


GPUS_GIB = (24, 44, 80, 141, 192)
SHAPES = ("qwen3.5-tiny-m2po-delta", "qwen3.5-0.8b-m2po-delta", "qwen3-1.7b-m2po-delta", "qwen3.5-4b-m2po-delta")


@pytest.mark.parametrize("name", SHAPES)
def test_no_hint_is_refused_when_it_is_followed(name: str) -> None:
    """Over a grid of machines; with little memory in the host, too."""
    config = TINY if "tiny" in name else None
    gpus = ("resources.device=cuda", "resources.rollout_gpus=1", "resources.train_gpus=1") if config else ()
    tried = {"fits": 0, "followed": 0, "none": 0}
    every = [(gib, count, 1024) for gib, count in itertools.product(GPUS_GIB, (1, 2, 3, 4, 8))]
    machines = every[::2]  # of each size and of each number some
    for gib, count, host_gib in [*machines, *((gib, count, 64) for gib in GPUS_GIB[::2] for count in (1, 4))]:
        document = facts("9.0", count, memory_gib=gib, host_gib=host_gib, disk_gib=9000)
        for more in ((), ("train.activation_checkpointing=none", "train.optimizer_device=gpu")):
            try:
                plan.refuse(planned(load(name, *gpus, *more), document, config))
                tried["fits"] += 1
            except UserError as error:
                sets = re.findall(r"--set ([^ `]+)", str(error.hint))
                hinted = str(error.hint).startswith("run ")
                tried["followed" if hinted else "none"] += 1
                if hinted:
                    assert sets
                    plan.refuse(planned(load(name, *gpus, *more, *sets), document, config))
                else:
                    assert not sets, "a hint that names settings is one to run"
    assert tried["fits"] > 0
    assert tried["followed"] > 0 or config, tried


def test_rollout_and_eval_count_rollout_gpus_only() -> None:
    document = facts("9.0", 4, memory_gib=80, host_gib=512)
    for command in ("rollout", "eval"):
        plan.refuse(planned(load("qwen3.5-4b-m2po-delta"), document, command=command))
    result = planned(load("qwen3.5-4b-m2po-delta"), facts("9.0", 1, memory_gib=80, host_gib=512), command="rollout")
    with pytest.raises(UserError, match=r"asks for 4 GPUs \(rollout 4\), this machine has 1") as error:
        plan.refuse(result)
    assert error.value.hint == "run `astra rollout --recipe qwen3.5-4b-m2po-delta --set resources.rollout_gpus=1`"


def test_old_gpus_and_old_systems() -> None:
    old = planned(load("qwen3-1.7b-m2po-delta"), facts("7.5", 2, host_gib=512))
    assert "GPUs of compute capability 8.0 or newer" in old.missing
    document = facts("9.0", 2, host_gib=512)
    document["system"]["libc"] = "glibc 2.31"
    assert "glibc 2.34 or newer (sglang's wheels)" in planned(load("qwen3-1.7b-m2po-delta"), document).missing


def test_the_engines_own_environment_is_not_judged_from_here() -> None:
    document = facts("9.0", 2, packages={"sglang": None}, host_gib=512)
    assert "package sglang" in planned(load("qwen3-1.7b-m2po-delta"), document).missing
    own = load("qwen3-1.7b-m2po-delta", "resources.engine.python=/envs/sglang/bin/python")
    result = planned(own, document)
    assert "package sglang" not in result.missing
    assert result.processes[0].python is None  # the process that watches the server is one of ours


def test_a_python_path_that_changes_the_trainer_is_said() -> None:
    """The engine's packages, sourced for the whole shell."""
    document = facts("9.0", 2, packages={"transformers": "5.12.1"}, host_gib=512)
    document["packages"]["transformers"]["origin"] = "/tmp/site/transformers/__init__.py"

    def said(path: str | None, *overrides: str) -> list[str]:
        document["env"]["PYTHONPATH"] = path
        found = planned(load("qwen3-1.7b-m2po-delta", *overrides), document).warnings
        return [line for line in found if "PYTHONPATH" in line]

    (line,) = said("/opt/more:/tmp/site/")
    assert line.startswith("the trainer computes with transformers 5.12.1 of PYTHONPATH (`/tmp/site/`)")
    assert "resources.engine.env.PYTHONPATH" in line
    assert said(None) == said("/opt/more:/tmp/sit") == []
    assert said(None, 'resources.engine.env={PYTHONPATH="/tmp/site"}') == [], "the engine's own"


def test_an_unknown_model_still_has_processes() -> None:
    recipe = load("qwen3-1.7b-m2po-delta", "model.path=some/finetune", "model.adapter=qwen3")
    result = planned(recipe, facts("9.0", 2, host_gib=512))
    assert result.model == {} and result.disk == ()
    assert "checkpoint some/finetune not on this machine" in result.missing
    assert any("config.json is not on this machine" in line for line in result.warnings)


def test_building_reads_nothing_but_its_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    there, recipe = validate(facts("9.0", 8, host_gib=512)), load("qwen3.5-4b-m2po-delta")
    before = there.document()
    adapter = registry.resolve(recipe)
    choice = backend.choose(adapter, there, recipe)
    monkeypatch.setattr("astracli.machine.read.probe", lambda: pytest.fail("a plan must not probe"))
    monkeypatch.setattr("builtins.open", lambda *a, **k: pytest.fail("a plan must not read files"))
    first = plan.build(recipe, adapter, choice, there)
    assert first == plan.build(recipe, adapter, choice, there)
    assert there.document() == before
    with pytest.raises(dataclasses.FrozenInstanceError):
        first.recipe = "other"  # type: ignore[misc]
