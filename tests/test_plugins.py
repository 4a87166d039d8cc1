"""A stranger's packages, one of each kind: wheels of `examples/plugins`, installed, used together by one run."""

from __future__ import annotations

import csv
import json
import math
import os
import shutil
import subprocess
import sys
from collections import defaultdict
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
import warm
from tokenizers import Tokenizer

from astracli.runs import metrics

ROOT = Path(__file__).parents[1]
KINDS = ("adapter", "algorithm", "engine", "env", "reward", "sink")
STEPS = 3


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the packages, each built into a wheel of its own and installed from that."""
    root = tmp_path_factory.mktemp("plugins")
    sources = [shutil.copytree(ROOT / "examples" / "plugins" / kind, root / kind) for kind in KINDS]
    pip, offline = [sys.executable, "-m", "pip"], ["--quiet", "--no-deps", "--no-index"]
    wheels, target = root / "wheels", root / "site"
    build = f"from setuptools import build_meta; build_meta.build_wheel({str(wheels)!r})"  # what pip calls, thrice
    for source in sources:
        done = warm.run(["-c", build], cwd=Path(source))
        assert done.returncode == 0, done.stderr
    found = sorted(map(str, wheels.glob("*.whl")))
    assert len(found) == len(KINDS)
    subprocess.run([*pip, "install", *offline, "--target", str(target), *found], check=True, timeout=200)
    return target


def astra(*words: str, path: Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    return warm.run(["-m", "astracli", *words], env={**os.environ, "PYTHONPATH": str(path)}, cwd=cwd)


def sets(*values: str) -> list[str]:
    return [word for value in values for word in ("--set", value)]


def mistral(path: Path) -> Path:
    """A checkpoint of random weights with the shipped tokenizer."""
    import torch
    from transformers import MistralConfig, MistralForCausalLM

    torch.manual_seed(0)
    config = MistralConfig(
        vocab_size=32, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=128, pad_token_id=0, bos_token_id=None, eos_token_id=1,
        tie_word_embeddings=True, sliding_window=None,
    )  # fmt: skip
    MistralForCausalLM(config).save_pretrained(path)
    for file in (files("astracli") / "assets" / "tiny").iterdir():
        if file.name.startswith(("tokenizer", "chat_template")):
            (path / file.name).write_bytes(file.read_bytes())
    return path


def test_one_run_with_all_of_them(site: Path, tmp_path: Path) -> None:
    model, run = mistral(tmp_path / "model"), tmp_path / "run"
    small = sets(
        f"model.path={model}", "rollout.engine=plain", "rollout.env=second_try", "data.reward=digits",
        "algorithm.name=rloo", "algorithm.rloo.weight_cap=1.5",
        'metrics.sinks=["curve"]', f"train.steps={STEPS}", "train.batch_groups=4", "train.minibatches=2",
        "train.learning_rate=0.01", "eval.every=0", "eval.benchmarks=[]", "checkpoint.every=0",
        "launch.deterministic=true", "metrics.samples_per_step=32",
    )  # fmt: skip
    done = astra("train", "--recipe", "qwen3.5-tiny-m2po-delta", "--run-dir", str(run), *small, path=site, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    trained = [r for r in metrics.read(run / "metrics.jsonl") if r["process"] == "trainer" and "loss" in r]
    assert len(trained) == STEPS and all(record["grad_norm"] > 0 for record in trained)
    # the engine: a server of its own took every version, checked its digests and read its parameters back
    processes = {p["name"]: p["module"] for p in json.loads((run / "plan.json").read_text())["processes"]}
    assert processes["engine0"] == "astra_plain.server"
    updates = [r for r in metrics.read(run / "metrics.jsonl") if "fetch_s" in r]
    assert [r["step"] for r in updates] == list(range(1, STEPS + 1)) and not any(r["resyncs"] for r in updates)
    assert all(r["verify_s"] > 0 and r["readback_s"] > 0 for r in updates) and updates[-1]["kind"] == "delta"
    # the adapter: nothing else claims the model; the engine agreed with the trainer
    assert all(record["parity_mean_abs"] < 1e-4 for record in trained)
    assert json.loads((run / "export" / "config.json").read_text())["model_type"] == "mistral"
    # the sink
    curve = [(int(step), float(mean)) for step, mean in csv.reader((run / "curve.csv").open())]
    assert curve == [(record["step"], record["reward_mean"]) for record in trained]
    # the environment: two turns with a token between that is not trained; the reward, of the second turn; and the
    # advantage of the algorithm
    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
    groups = defaultdict(list)
    for file in (run / "samples").iterdir():
        for row in map(json.loads, file.read_text().splitlines()):
            told = row["loss_mask"].index(0)
            assert row["tokens"][told] == tokenizer.token_to_id("=") and row["loss_mask"].count(0) == 1
            assert 1 <= told <= 8 and row["logprobs"][told] is None
            text = tokenizer.decode(row["tokens"][told + 1 :])
            assert row["reward"] == pytest.approx(sum(map(str.isdigit, text)) / max(1, len(text)), abs=1e-6)
            groups[row["step"], row["problem_id"]].append((row["reward"], row["advantage"]))
    assert len(groups) == 4 * STEPS and all(len(rows) == 8 for rows in groups.values())
    for rows in groups.values():
        others = [(sum(r for r, _ in rows) - reward) / (len(rows) - 1) for reward, _ in rows]
        assert [a for _, a in rows] == pytest.approx([r - o for (r, _), o in zip(rows, others, strict=True)], abs=1e-5)
    # its limits, from its own settings
    assert [record["m2_limit"] for record in trained] == [pytest.approx(math.log(1.5))] * STEPS


def test_no_file_of_the_package_knows_them() -> None:
    sources = [*(ROOT / "astracli").rglob("*.py"), *(ROOT / "adapters").rglob("*.py"), *(ROOT / "recipes").rglob("*")]
    said = "\n".join(file.read_text(encoding="utf-8") for file in sources if file.suffix in (".py", ".toml")).lower()
    assert len(sources) > 100
    for word in ("mistral", "rloo", "astra_plain", "astra_digits", "astra_curve", "second_try"):
        assert word not in said


DRAWS = """
from astra_plain.server import Request
asked = {"temperature": 1.0, "sampling_seed": 7, "max_new_tokens": 9, "stop_token_ids": []}
draws = Request(0, [], asked, 0, "", print)
seen = []
for _ in range(4):
    seen += draws.noise(40).tolist()
    draws.take(3, -1.0)
resumed = Request(0, [], asked, 3, "", print)  # what an update cut off goes on at its position
print(len(set(seen)), resumed.noise(40).tolist() == seen[120:])
"""


def test_the_engine_of_the_example_draws_every_token_anew(site: Path) -> None:
    """Noise that two positions share would make samples that are not the policy's, at log-probabilities that are."""
    env = {**os.environ, "PYTHONPATH": str(site)}
    done = warm.run(["-c", DRAWS], env=env)
    assert done.stdout == "160 True\n", done.stderr


LOADS = """
import json, sys
from astracli.config import recipe_io
from astracli.errors import UserError
for override in sys.argv[1:]:
    try:
        loaded = recipe_io.load("qwen3.5-tiny-m2po-delta", override.split())
        print(json.dumps(recipe_io.to_document(loaded)["algorithm"]))
    except UserError as error:
        print(json.dumps([error.message, error.hint]))
assert "torch" not in sys.modules and "numpy" not in sys.modules
"""
NO_SUCH = "is not allowed: there is no such algorithm"


def loads(path: Path, *overrides: str) -> list[Any]:
    """Per text of overrides the table `[algorithm]`, or the message and the hint."""
    env = {**os.environ, "PYTHONPATH": str(path)}
    done = subprocess.run([sys.executable, "-c", LOADS, *overrides], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_its_settings_are_as_strict_as_any(site: Path, tmp_path: Path) -> None:
    key = "algorithm.rloo.weight_cap"
    cases = {
        f"{key[:-2]}pa=2": ("unknown key `algorithm.rloo.weight_cpa` (= 2)", f"did you mean `{key}`?"),
        f"{key}=0": (f"`{key}` = 0 is not allowed: it takes a number greater than 0", ""),
        f"{key}=big": (f'`{key}` = "big" is not allowed: it takes a number greater than 0', ""),
        "algorithm.name=rlo": (f'`algorithm.name` = "rlo" {NO_SUCH}', "did you mean `rloo`? known: cispo, dapo"),
        "algorithm.weight_cap=2": (f"`algorithm.weight_cap` = 2 is a setting of one algorithm: it is now `{key}`", ""),
        "rollout.group_size=1": ("rollout.group_size = 1: the advantages of rloo need at least 2 samples a prompt", ""),
    }
    found = loads(site, *(f"algorithm.name=rloo {override}" for override in cases))
    for (message, hint), (said, hinted) in zip(cases.values(), found, strict=True):
        assert said == f"recipe `qwen3.5-tiny-m2po-delta`: {message}" and hint in hinted
    shown = astra("recipes", "show", "qwen3.5-tiny-m2po-delta", *sets(f"{key}=0"), path=site, cwd=tmp_path)
    assert shown.returncode == 2


def test_its_table_may_stand_in_a_recipe_of_another(site: Path) -> None:
    another, itself = loads(site, "algorithm.rloo.weight_cap=1.5", "algorithm.rloo.weight_cap=1.5 algorithm.name=rloo")
    assert "rloo" not in another and "m2po" in another
    assert itself["rloo"] == {"weight_cap": 1.5} and "m2po" not in itself


def test_a_broken_algorithm_hurts_only_who_names_it(tmp_path: Path) -> None:
    for package, entries in (("one", "shaky = nobody_has_it:X\ngrpo = math:pi\n"), ("two", "wrong = math:pi\n")):
        info = tmp_path / f"{package}-1.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1\n")
        (info / "entry_points.txt").write_text(f"[astra.algorithms]\n{entries}")
    whole, *broken = loads(tmp_path, *(f"algorithm.name={name}" for name in ("m2po", "shaky", "wrong", "grpo")))
    assert whole["name"] == "m2po"
    ((message, hint),) = loads(tmp_path, "algorithm.wrong.x=1")
    assert '`algorithm.wrong` = {"x": 1} is not allowed: math:pi' in message and "uninstall" in hint
    for (message, hint), said in zip(
        broken,
        (
            "package `one` is broken: ModuleNotFoundError: No module named 'nobody_has_it'",
            "math:pi of package `two` is a float, not an astracli.rl.losses.Algorithm",
            "it comes from several packages: ",
        ),
        strict=True,
    ):
        assert f"is not allowed: {said}" in message and "uninstall" in hint
