"""What the benches of engines compute by themselves."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

sys.path.append(str(Path(__file__).parents[1] / "bench"))
from engine.offline import arguments
from engine.prefixes import gap

from astracli.engines.contract import GenResult


def result(tokens: list[int], logprobs: list[float]) -> GenResult:
    return GenResult(np.array(tokens, np.int32), np.array(logprobs, np.float32), "length", 0, 0, "r")


def test_log_probabilities_are_compared_until_the_tokens_differ() -> None:
    one, two = result([1, 2, 3], [-1.0, -2.0, -3.0]), result([1, 2, 4], [-1.5, -2.25, -9.0])
    assert gap([one], [two]) == 0.5
    assert gap([result([1], [-1.0])], [result([2], [-5.0])]) == 0.0


def test_the_offline_engine_gets_its_servers_arguments_and_no_address(tmp_path: Path) -> None:
    line = "--config /c --model-path=/m --port=80 --cuda-graph-bs-decode 1 2 --custom-weight-loader a.b c.d --seed=7"
    (tmp_path / "engine.log").write_text(f"noise\nstarting sglang.launch_server {line} --skip-tokenizer-init\n")
    found = arguments("sglang", tmp_path)
    assert found == {"model_path": "/m", "cuda_graph_bs_decode": [1, 2], "seed": 7, "skip_tokenizer_init": True}
