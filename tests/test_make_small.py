"""The scripts that make starting points: a warm-up leaves whole checkpoints, and its chances are the model's."""

from __future__ import annotations

import base64
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import warm

from astracli.data import arithmetic
from astracli.models import registry

SCRIPTS = Path(__file__).parents[1] / "scripts"


@pytest.fixture(scope="module")
def small() -> object:
    sys.path.insert(0, str(SCRIPTS))
    try:
        import make_small

        return make_small
    finally:
        sys.path.remove(str(SCRIPTS))


def test_a_warm_up_leaves_a_checkpoint_and_its_metrics(tmp_path: Path) -> None:
    command = [str(SCRIPTS / "make_small.py"), str(tmp_path / "warm"), "--shape", "tiny", "--cpu"]
    command += ["--tokens", "512", "--steps", "3", "--every", "0", "--workers", "0", "--items", "8"]
    done = warm.run(command)
    assert done.returncode == 0, done.stderr
    records = [json.loads(line) for line in (tmp_path / "warm" / "warm_up.jsonl").read_text().splitlines()]
    assert [r["step"] for r in records] == [1, 2, 3] and all(3.3 < r["loss"] < 3.7 for r in records)
    assert json.loads((tmp_path / "warm" / "config.json").read_text())["full_attention_interval"] == 4
    registry.get("qwen3_5").load_for_training(tmp_path / "warm")


def test_rows_hold_the_solutions_and_noise_falls_on_targets_alone(small) -> None:  # type: ignore[no-untyped-def]
    problems = arithmetic.held_out(5, arithmetic.STEP_LEVELS)
    row = small.pack([small.solved(problem) for problem in problems])
    tokenizer = small.vocabulary()[0]
    for number, problem in enumerate(problems):
        a, b = row.bounds_S1[number : number + 2]
        text = f"{problem.question}={arithmetic.worked_text(problem.question)}"
        assert [*tokenizer(text)["input_ids"], small.EOS] == list(row.tokens_1T[0, a:b])
    assert (row.tokens_1T[0, row.predict_N + 1] == row.target_N).all()
    tokens_BL, predict_N = small.padded(row)
    assert (tokens_BL.reshape(-1)[predict_N + 1] == row.target_N).all()
    noisy, clean = small.draw(3, 8192, 0.2), small.draw(3, 8192, 0.0)
    assert (noisy.tokens_1T == clean.tokens_1T).all()
    assert 0.15 < np.mean(noisy.target_N != clean.target_N) < 0.2  # a tenth of the draws hits the right token
    assert noisy.tokens_1T.size <= 8192


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
    training, held_out = make_hybrid.read_solutions(solved, tokenizer, 50)
    assert (len(training), len(held_out)) == (76, 4)  # p19 and p39
    prompt, solution = training[0]
    assert tokenizer.decode(solution) == "s0<|im_end|>" and tokenizer.decode(prompt).startswith(
        "<|im_start|>user\np0\n"
    )
    packed = list(make_hybrid.rows_of(training[:6], 2 * (len(prompt) + len(solution)) + 8))
    assert [len(row.bounds_S1) - 1 for row in packed] == [2, 2, 2]
    assert (packed[0].tokens_1T[0, packed[0].predict_N + 1] == packed[0].target_N).all()
