"""Made-up rows before the first batch: what they are, and that nothing is changed by them; `astra doctor --warm`."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Ran
from trainer_job import Job, expected, job, model_dir, same
from training_tools import make_trainer, recipe, sample_groups

from astracli.launch import run, warm
from astracli.runs.run_dir import RunDir
from astracli.training import parity
from astracli.training.fsdp import Ranks
from astracli.training.warm_up import lengths, rows_of, sizes, warm_up

__all__ = ["expected", "job", "model_dir"]


def test_lengths_are_those_that_kernels_are_compiled_for() -> None:
    assert lengths(8192, 8192, packed=True) == [8192, 7168, 6144, 5120, 4096]
    assert lengths(8192, 2000, packed=False) == [2000, 1024]
    assert lengths(8192, 700, packed=True) == [8192, 7168, 6144, 5120, 4096], "several samples fill a packed row"
    assert lengths(64, 64, packed=True) == [64]


@pytest.mark.parametrize(("length", "longest"), [(8192, 8192), (8192, 700), (64, 64), (200, 40), (41, 40), (11, 10)])
def test_rows_fill_their_length(length: int, longest: int) -> None:
    rows = rows_of(sizes(length, longest), 100)
    found = [len(row) for row in rows]
    assert sum(found) == length and max(found) <= longest and min(found) >= 2
    assert all(row.loss_tokens == len(row) - row.prompt_length > 0 for row in rows)
    assert len(found) > 1
    assert all(row.tokens.min() >= 0 and row.tokens.max() < 100 for row in rows)


@pytest.mark.parametrize("compute", [None, torch.bfloat16])
@pytest.mark.parametrize("packing", ["packed", "padded"])
def test_a_trainer_that_was_warmed_up_trains_the_same_bytes(
    model_dir: Path, packing: str, compute: torch.dtype | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = recipe(algorithm={"kl_coef": 0.01}, train={"packing": packing, "parity_tolerance": 100.0})
    warmed, cold = (make_trainer(model_dir, chosen, Ranks(compute=compute)) for _ in range(2))
    said: list[str | None] = []
    shapes = set()
    real = parity.logprobs

    def seen(policy, adapter, micro, *more):  # type: ignore[no-untyped-def]
        shapes.add(micro.tokens_BL.shape)
        return real(policy, adapter, micro, *more)

    random = torch.get_rng_state()
    monkeypatch.setattr(parity, "logprobs", seen)
    assert warm_up(warmed, said.append) > 0
    assert torch.equal(torch.get_rng_state(), random)
    assert said[0] == "the compiler: kernels for rows of 64 tokens (1 of 1 lengths)" and said[-1] is None
    assert (1, 64) in shapes
    assert not warmed.masters.grads.found()
    for trainer in (warmed, cold):
        trainer.first_step = False
        trainer.train(sample_groups(None, 4, seed=1), 1, 0)
    for name, tensor in cold.masters.wire_full().items():
        assert torch.equal(tensor, warmed.masters.wire_full()[name]), name
    assert all(map(torch.equal, cold.masters.split_masters.rests, warmed.masters.split_masters.rests))
    with cold.masters.split_masters.whole(), warmed.masters.split_masters.whole():
        assert all(map(torch.equal, cold.masters.values.values(), warmed.masters.values.values()))


def test_a_run_that_was_warmed_up_trains_the_same(job: Job, expected: dict[str, torch.Tensor]) -> None:
    loop = job.loop(warm_up=True)
    loop.start()
    job.train(loop)
    assert same(loop, expected)
    told = [record for record in job.records() if "warm_up_s" in record]
    assert [record["step"] for record in told] == [0] and told[0]["warm_up_s"] > 0


def test_what_the_caches_held_before_and_hold_now_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, astra: Callable[..., Ran]
) -> None:
    seen: list[Any] = []
    for variable, _ in warm.CACHES.values():
        monkeypatch.setenv(variable, str(tmp_path / variable))
    cache = tmp_path / "TRITON_CACHE_DIR"
    cache.mkdir()
    (cache / "old").write_bytes(bytes(1024))

    def train_run(recipe: Any, *, command: str, run_dir: Path, warm: bool) -> tuple[int, RunDir]:
        assert warm
        seen.append(recipe)
        (cache / "deep").mkdir()
        (cache / "deep" / "new").write_bytes(bytes(3 * 1024))
        run_dir.mkdir()
        record = {"process": "trainer", "step": 0, "train_s": 2.0, "warm_up_s": 7.0}
        made = RunDir(run_dir)
        made.metrics_jsonl.write_text(json.dumps(record) + "\n")
        return 0, made

    monkeypatch.setattr(run, "train_run", train_run)
    shown = astra("doctor", "--warm", "qwen3.5-4b-m2po-delta", "--json")
    assert shown.code == 0
    found = json.loads(shown.out)
    assert found["caches"] == [{"name": "triton", "place": str(cache), "before": 1024, "after": 4096}]
    assert found["seconds"]["made-up rows"] == 7.0 and found["seconds"]["first step"] == 2.0
    (recipe,) = seen
    assert (recipe.train.steps, recipe.train.batch_groups, recipe.train.minibatches) == (1, 1, 1)
    assert recipe.data.source == "arithmetic" and not recipe.eval.every and not recipe.checkpoint.every
    kept = (recipe.train.tokens_per_microbatch, recipe.rollout.context_length, recipe.rollout.max_running_requests)
    assert kept == (8192, 8192, "auto") and recipe.weights.transfer == "delta" and recipe.algorithm.kl_coef == 0.001


@pytest.mark.parametrize(
    "words",
    [
        ("--warm",),
        ("--warm", "qwen3.5-tiny-m2po-delta", "--facts", "8xl40"),
        ("qwen3.5-tiny-m2po-delta", "--tuned-out", "tuned.json"),
    ],
)
def test_warm_needs_a_recipe_and_this_machine(astra: Callable[..., Ran], words: tuple[str, ...]) -> None:
    refused = astra("doctor", *words)
    assert refused.code == 2 and "--warm" in refused.err


def test_what_is_tuned_is_asked_for_only_where_something_is(astra: Callable[..., Ran]) -> None:
    refused = astra("doctor", "--warm", "qwen3.5-tiny-m2po-delta", "--tuned-out", "tuned.json")
    assert refused.code == 2 and "takes a GPU" in refused.err
