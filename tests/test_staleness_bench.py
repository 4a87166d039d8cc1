"""The bench of stale data generates with the very policy that it trains."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).parents[1] / "bench"))

from learning.staleness import Run


def test_the_generating_model_is_the_trained_one_and_older_versions_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """In fp32 where an engine holds fp32: `A_log` rounded to bf16 is another policy."""
    small = ["train.batch_groups=2", "train.minibatches=1", "rollout.group_size=4"]
    args = argparse.Namespace(steps=1, every=1, samples=1, between=1, set=small)
    bench = Run("grpo", 1, 0, args)
    monkeypatch.setattr(bench.actor, "evaluate", lambda temperature, samples: 0.0)
    assert bench.run()["ended"] is None
    trained, generating = (dict(model.named_parameters()) for model in (bench.trainer.policy.model, bench.actor.model))
    assert trained.keys() == generating.keys() == bench.kept[1].keys()
    assert not [name for name, tensor in trained.items() if not torch.equal(tensor, generating[name])]
    for name in (name for name in trained if "A_log" in name):
        assert not torch.equal(trained[name], trained[name].bfloat16().float()), "the update left bf16's grid"
        assert not torch.equal(bench.kept[0][name], trained[name]), "a version that is kept does not move on"
