"""From a recipe to processes: configs, environment, resume rules."""

from __future__ import annotations

import json
import stat
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from launch_tools import build, context_of, specs_of, tiny

from astracli.config import recipe_io
from astracli.config.recipe import Recipe
from astracli.errors import UserError
from astracli.launch import hub, recipe_changes, run
from astracli.launch.local import child_spec
from astracli.plan.view import to_json
from astracli.process.config import (
    EngineConfig,
    EvalConfig,
    Role,
    RolloutConfig,
    SampleFile,
    TrainerConfig,
    load_config,
)
from astracli.rl.types import Group, Sample, Verdict
from astracli.rollout.groups import SampleWriter
from astracli.runs.run_dir import RunDir


def test_every_process_gets_its_config_and_only_its_owner_reads_it(tmp_path: Path) -> None:
    recipe = tiny(resources__engines=2, resources__train_ranks=2)
    specs = specs_of(context_of(recipe, tmp_path, resume_step=4))
    assert list(specs) == ["engine0", "engine1", "rollout", "trainer", "trainer1", "eval"]
    kinds = [EngineConfig, EngineConfig, RolloutConfig, TrainerConfig, TrainerConfig, EvalConfig]
    told: dict[str, Any] = {
        name: load_config(["w", spec.argv[-1]], kind) for (name, spec), kind in zip(specs.items(), kinds, strict=True)
    }
    for name, spec in specs.items():
        file = tmp_path / "config" / f"{name}.json"
        assert spec.argv[1:] == ("-P", "-m", spec.argv[3], str(file))
        assert stat.S_IMODE(file.stat().st_mode) == 0o600
        assert told[name].recipe == recipe and told[name].token == "secret" and told[name].name == name
        assert spec.log == tmp_path / "logs" / "attempt_1" / f"{name}.log"
        assert "secret" not in " ".join([*spec.argv, *spec.env.values()])
    urls = [engine.url for engine in told["rollout"].engines]
    ports = [told[name].port for name in ("engine0", "engine1")]
    assert len({*ports}) == 2 and urls == [f"http://127.0.0.1:{port}" for port in ports]
    assert told["engine0"].stage_dir == told["eval"].engines[0].stage_dir == tmp_path / "stage" / "engine0"
    assert told["engine0"].stage_dir.is_dir() and told["engine0"].await_weights
    assert told["engine0"].mem_fraction_static == 0.8, "the engine's own, where the plan derives none"
    trainer = told["trainer1"]
    assert (trainer.resume_step, trainer.role, trainer.attention) == (4, Role.TRAINER, "sdpa")


def test_the_hub_and_every_process_know_the_requests_that_the_plan_derived(tmp_path: Path) -> None:
    context = context_of(tiny(rollout__max_running_requests="auto"), tmp_path)
    context = replace(context, plan=replace(context.plan, running_requests=200))
    for spec in specs_of(context).values():
        config = json.loads(Path(spec.argv[-1]).read_text())
        assert config["recipe"]["rollout"]["max_running_requests"] == 200
    with hub.serving(context, lambda status: None) as (store, _):
        assert store.slots("engine0", "rollout", 1000, 0).limit == 200


def test_an_engine_held_to_a_part_of_its_card_reserves_of_that_part(tmp_path: Path) -> None:
    context = context_of(tiny(), tmp_path)
    held = replace(context, plan=replace(context.plan, gpu_share=0.25))
    assert load_config(["w", specs_of(held)["engine0"].argv[-1]], EngineConfig).mem_fraction_static == 0.8 * 0.25


def test_children_are_offline_threaded_and_past_any_proxy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_PROXY", "intranet")
    recipe = tiny(resources__train_ranks=2, resources__threads__trainer=3)
    specs = specs_of(context_of(recipe, tmp_path))
    for spec in specs.values():
        assert (spec.env["HF_HUB_OFFLINE"], spec.env["CUDA_VISIBLE_DEVICES"]) == ("1", "")
        assert spec.env["NO_PROXY"].split(",") == ["intranet", "127.0.0.1", "localhost", "127.0.0.1"]
    assert (specs["trainer"].env["OMP_NUM_THREADS"], specs["engine0"].env["OMP_NUM_THREADS"]) == ("3", "1")
    ranks = [specs[name].env for name in ("trainer", "trainer1")]
    assert [env["RANK"] for env in ranks] == ["0", "1"] and {env["WORLD_SIZE"] for env in ranks} == {"2"}
    assert ranks[0]["MASTER_PORT"] == ranks[1]["MASTER_PORT"] and "RANK" not in specs["eval"].env
    assert (specs["engine0"].nice, specs["rollout"].nice, specs["eval"].nice) == (0, 5, 5)


def test_files_in_the_working_directory_are_not_imported(tmp_path: Path) -> None:
    for name in ("logging", "random", "queue", "types", "datasets"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('imported from the working directory')")
    spec = specs_of(context_of(tiny(), tmp_path / "run"))["rollout"]
    command = [*spec.argv[:-1], "nothing.json"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and done.stderr.startswith("error: cannot read worker config `nothing.json`")


def test_an_engine_that_is_started_again_waits_for_weights(tmp_path: Path) -> None:
    recipe = tiny(launch__max_restarts=2)
    processes = {process.name: process for process in build(context_of(recipe, tmp_path))}
    engine = processes["engine0"]
    assert (engine.plan.restarts, processes["trainer"].plan.restarts) == (2, 0)
    told = [load_config(["w", child_spec(p).argv[-1]], EngineConfig) for p in (engine, engine.again())]
    assert [config.await_weights for config in told] == [False, True]
    assert processes["rollout"].again() == processes["rollout"]


def test_an_engine_without_a_trainer_is_started_again_with_the_models_own_weights(tmp_path: Path) -> None:
    recipe = tiny(launch__max_restarts=2)
    alone = replace(context_of(recipe, tmp_path), plan=run.planned(recipe, "rollout"))
    engine = next(process for process in build(alone) if process.plan.role is Role.ENGINE)
    assert engine.plan.restarts == 2 and engine.again() == engine, "nobody would give it any"


def stored_run(tmp_path: Path, recipe: Recipe) -> RunDir:
    (tmp_path / "recipe.json").write_text(recipe_io.to_json(recipe))
    return RunDir(tmp_path)


def test_a_finished_run_is_not_resumed_but_can_train_on(tmp_path: Path) -> None:
    stored = stored_run(tmp_path, tiny())
    stored.start(recipe="t", steps=100, step=100)
    stored.end("done", exit_code=0)
    with pytest.raises(UserError, match="is done: 100 of 100 steps"):
        recipe_changes.resume_step(stored, tiny(train__steps=100))
    assert recipe_changes.resume_step(stored, tiny(train__steps=200)) == 0


def test_a_failed_fetch_leaves_no_run_behind(tmp_path: Path) -> None:
    target = tmp_path / "run"
    recipe = tiny(data__source="./nowhere.jsonl")
    with pytest.raises(UserError, match=r"nowhere\.jsonl"):
        run.train(recipe, run_dir=target)
    assert not target.exists()


def test_a_used_run_directory_is_refused(tmp_path: Path) -> None:
    stored_run(tmp_path, tiny())
    with pytest.raises(UserError, match="was used before"):
        run.train(tiny(), run_dir=tmp_path)


def test_dry_run_of_every_shipped_recipe() -> None:
    for info in recipe_io.shipped():
        recipe = recipe_io.load(info.name)
        if recipe.model.path.startswith("./"):  # its model is made first
            with pytest.raises(UserError, match="nothing at that path") as refused:
                to_json(run.planned(recipe, "train"))
            assert refused.value.hint and "make it: `python scripts/make_" in refused.value.hint
            continue
        document = to_json(run.planned(recipe, "train"))
        assert document["recipe"] == info.name and document["processes"]
        assert json.loads(json.dumps(document, default=str))["processes"][0]["name"] == "engine0"


def test_fewer_samples_than_pass_k_lower_it() -> None:
    evaluation = recipe_changes.with_evaluation(tiny(), ["gsm8k"], 2).eval
    assert (evaluation.benchmarks, evaluation.samples, evaluation.pass_k) == (["gsm8k"], 2, 2)
    assert recipe_changes.with_evaluation(tiny(), None, 16).eval.pass_k == 4


def test_a_rollout_that_wrote_no_sample_leaves_no_file(tmp_path: Path) -> None:
    """The same command would be refused: `--out` is there already."""
    out = tmp_path / "samples.jsonl"
    out.write_text('{"reward": 1.0}\n{"reward": 0.0}\n')
    assert run.rollout_words(out) == f"2 samples, mean reward 0.500, in {out}"
    out.write_text("")
    assert run.rollout_words(out) == "no samples yet" and not out.exists()


def test_a_rollout_may_keep_the_right_samples_alone(tmp_path: Path) -> None:
    """By the verdict, not by the reward; every group counts, also one without a right sample."""
    out, no_tokens = tmp_path / "right.jsonl", np.zeros(0, np.int32)
    verdicts: list[Verdict] = ["right", "wrong", "right", "no_answer"]
    samples = [Sample(i, [], "stop", reward=0.5, verdict=verdict) for i, verdict in enumerate(verdicts)]
    writer = SampleWriter(SampleFile(path=out, groups=2, keep="right"))
    writer.write(Group(0, "a", no_tokens, samples[1::2]))
    assert writer.left == 1 and run.rollout_words(out, "right") == "no sample was right: nothing is written"
    writer.write(Group(1, "b", no_tokens, samples))
    assert writer.left == 0 and run.rollout_words(out, "right") == f"2 right samples in {out}"
    assert [json.loads(line)["sample"] for line in out.read_text().splitlines()] == [0, 2]
