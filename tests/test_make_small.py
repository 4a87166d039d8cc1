"""The scripts that make starting points: a warm-up leaves whole checkpoints, and its chances are the model's."""

from __future__ import annotations

import base64
import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import warm

from astracli.config.recipe import Recipe
from astracli.data import arithmetic
from astracli.data.examples import ExampleTokens
from astracli.models import registry
from astracli.runs import metrics
from astracli.runs.run_dir import RunDir

SCRIPTS = Path(__file__).parents[1] / "scripts"


@pytest.fixture(scope="module")
def small() -> object:
    sys.path.insert(0, str(SCRIPTS))
    try:
        import make_small

        return make_small
    finally:
        sys.path.remove(str(SCRIPTS))


def test_a_warm_up_leaves_a_checkpoint_and_its_run(tmp_path: Path) -> None:
    """As it is called, with everything that the script says of its examples checked before the start of its run."""
    command = [str(SCRIPTS / "make_small.py"), str(tmp_path / "warm"), "--shape", "tiny", "--cpu"]
    done = warm.run([*command, "--tokens", "512", "--steps", "3", "--threads", "1"])
    assert done.returncode == 0, done.stderr
    run = RunDir(tmp_path / "warm-run")
    records = [line for line in metrics.read(run.metrics_jsonl) if "loss" in line]
    assert [r["step"] for r in records] == [0, 1, 2] and all(3.2 < r["loss"] < 3.8 for r in records)
    assert {r["samples"] for r in records} == {7.0} and {r["too_long"] for r in records} == {0.0}
    assert json.loads((tmp_path / "warm" / "config.json").read_text())["full_attention_interval"] == 4
    registry.get("qwen3_5").load_for_training(tmp_path / "warm")


def test_no_solution_is_longer_than_the_script_says(small) -> None:  # type: ignore[no-untyped-def]
    tokens = ExampleTokens(
        Recipe.model_validate(
            {"model": {"path": "x"}, "data": {"source": "arithmetic"}, "train": {"steps": 1}, "sft": {}}
        ),
        small.vocabulary(),
    )
    drawn = [arithmetic.draw(i, small.SEED, arithmetic.STEP_LEVELS) for i in range(500)]
    lengths = [len(tokens(replace(p, messages=({"role": "user", "content": p.question},)))) for p in drawn]
    assert max(lengths) <= small.LONGEST and abs(sum(lengths) / len(lengths) - small.EXAMPLE) < 1


def test_the_small_shape_has_the_size_it_says(small, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    small.build("small", tmp_path, 0)
    shape = registry.get("qwen3_5").memory_shape(json.loads((tmp_path / "config.json").read_text()))
    assert shape.parameters == 20_784_688


def test_the_hybrid_has_the_size_it_says_and_reads_right_solutions_alone(tmp_path: Path) -> None:
    sys.path.insert(0, str(SCRIPTS))
    try:
        import make_hybrid
    finally:
        sys.path.remove(str(SCRIPTS))
    own = {k: v for k, v in make_hybrid.HYBRID["168m"].items() if k != "rope"}
    config = make_hybrid.build_config().to_dict() | own | {"vocab_size": make_hybrid.ROWS, "layer_types": None}
    assert registry.get("qwen3_5").memory_shape(config).parameters == 167_729_224
    ranks = [bytes([i]) for i in range(256)] + [b"ab", b"cd", b"abcd", "é".encode()]
    file = tmp_path / make_hybrid.RANKS
    file.write_bytes(b"".join(base64.b64encode(token) + f" {i}\n".encode() for i, token in enumerate(ranks)))
    tokenizer = make_hybrid.build_tokenizer(file)
    assert tokenizer("abcd")["input_ids"] == [258] and tokenizer("abc")["input_ids"] == [256, ord("c")]
    assert tokenizer("é<|im_end|>")["input_ids"] == [259, 262] and tokenizer.decode([259]) == "é"
    rows = [{"problem": f"p{i % 40}", "completion": f"s{i}<|im_end|>", "verdict": "right"} for i in range(80)]
    rows += [
        {"problem": "p0", "completion": "no", "verdict": "wrong"},
        {"problem": "p0", "solution": "x" * 99},
        rows[0],
    ]
    solved = tmp_path / "solved.jsonl"
    solved.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = make_hybrid.read_solutions(solved, tokenizer, 50)
    assert len(found) == 80 and found[0] == {"problem": "p0", "completion": "s0"}
