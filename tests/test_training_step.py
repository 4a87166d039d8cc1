"""A training step on a tiny hybrid: the loss is the plain one, start-up checks stop a broken pair, masters keep what
rounding loses, schedules hit their figures."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from training_tools import make_trainer, recipe, sample_groups, save_model

from astracli.adapters.qwen3_5 import ADAPTER
from astracli.config.recipe_train import TrainTable
from astracli.errors import RunFailed
from astracli.rl.types import Group, Segment
from astracli.training import parity
from astracli.training.adam import learning_rate
from astracli.training.agreement import Agreement
from astracli.training.step import Trainer


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("model"))


def stale(groups: list[Group], shift: float, version: int = -1) -> list[Group]:
    """The same groups as if an older version had drawn them: behaviour log-probabilities moved by up to `shift`."""
    rng = np.random.default_rng(0)
    moved = copy.deepcopy(groups)
    for sample in (s for g in moved for s in g.samples):
        noise = rng.uniform(-shift, shift, len(sample.tokens)).astype(np.float32)
        sample.segments = [Segment(version, sample.tokens, sample.logprobs + noise)]
    return moved


def plain_loss(
    trainer: Trainer, groups: list[Group], low: float, high: float, temperature: float = 1.0
) -> torch.Tensor:
    """The clipped objective, row by row through the plain model: token mean over the whole batch."""
    total, tokens = torch.zeros(()), 0
    for group in groups:
        mean, std = group.rewards.mean(), group.rewards.std(ddof=1)
        for sample in group.samples:
            row = torch.from_numpy(np.concatenate([group.prompt_tokens, sample.tokens]).astype(np.int64))[None]
            logits = trainer.policy.model(input_ids=row).logits  # type: ignore[operator]
            start = len(group.prompt_tokens)
            logprob = (logits[0, start - 1 : -1] / temperature).log_softmax(-1).gather(1, row[0, start:, None])[:, 0]
            ratio = (logprob - torch.from_numpy(sample.logprobs)).exp()
            advantage = float((sample.reward - mean) / (std + 1e-5))
            total = total - torch.minimum(ratio * advantage, ratio.clamp(low, high) * advantage).sum()
            tokens += len(sample.tokens)
    return total / tokens


def test_one_minibatch_is_the_plain_objective(model_dir: Path) -> None:
    trainer = make_trainer(
        model_dir,
        recipe(train={"minibatches": 1}, algorithm={"name": "grpo", "grpo": {"clip_low": 0.1, "clip_high": 0.2}}),
    )
    groups = stale(sample_groups(trainer, 4, seed=1), 0.3)
    expected = plain_loss(trainer, groups, 0.9, 1.2)
    gradients = torch.autograd.grad(expected, list(trainer.masters.parameters.values()))
    norm = math.sqrt(sum(float(g.double().square().sum()) for g in gradients))
    metrics = trainer.train(groups, 0, 0).metrics
    assert metrics["loss"] == pytest.approx(expected.item(), abs=1e-6)
    assert metrics["grad_norm"] == pytest.approx(norm, rel=1e-4)
    assert metrics["staleness_mean"] == 1.0
    assert "parity_mean_abs" not in metrics  # no token of the current version
    assert 0 < metrics["clip_fraction"] < 0.5
    assert abs(metrics["ratio_mean"] - 1.0) > 1e-4


def tempered(trainer: Trainer, groups: list[Group], temperature: float) -> list[Group]:
    """The same tokens with the log-probabilities of an engine that drew them at a temperature."""
    for group, sample in ((g, s) for g in groups for s in g.samples):
        row = torch.from_numpy(np.concatenate([group.prompt_tokens, sample.tokens]).astype(np.int64))[None]
        with torch.no_grad():
            logits = trainer.policy.model(input_ids=row).logits[0, len(group.prompt_tokens) - 1 : -1]  # type: ignore[operator]
        scaled = (logits.double() / temperature).log_softmax(-1)
        chosen = scaled.gather(1, row[0, len(group.prompt_tokens) :, None])[:, 0]
        sample.segments[0].logprobs = chosen.float().numpy()
    return groups


def test_a_rollout_temperature_trains_the_policy_that_drew(model_dir: Path) -> None:
    """Gradient against autograd of the definition at temperature 0.7; engine, KL and entropy at the same."""
    rollout = {"group_size": 4, "max_new_tokens": 16, "context_length": 64, "temperature": 0.7}
    table = {"name": "grpo", "kl_coef": 0.1, "grpo": {"clip_low": 0.1, "clip_high": 0.2}}
    trainer = make_trainer(model_dir, recipe(train={"minibatches": 1}, algorithm=table, rollout=rollout))
    fresh = tempered(trainer, sample_groups(trainer, 4, seed=1), 0.7)
    old = stale(fresh, 0.3)
    expected = plain_loss(trainer, old, 0.9, 1.2, 0.7)
    gradients = torch.autograd.grad(expected, list(trainer.masters.parameters.values()))
    norm = math.sqrt(sum(float(g.double().square().sum()) for g in gradients))
    metrics = trainer.train(old, 0, 0).metrics
    assert metrics["loss"] == pytest.approx(expected.item(), abs=1e-6)
    assert metrics["grad_norm"] == pytest.approx(norm, rel=1e-4)
    assert metrics["kl"] == pytest.approx(0.0, abs=1e-9)

    again = make_trainer(model_dir, recipe(algorithm=table, rollout=rollout))
    metrics = again.train(fresh, 0, 0).metrics
    assert metrics["parity_max_abs"] < 1e-5 and metrics["ratio_mean"] == pytest.approx(1.0, abs=1e-5)
    with pytest.raises(RunFailed, match="trainer and engine disagree at version 0"):
        make_trainer(model_dir, recipe(algorithm=table, rollout=rollout)).train(sample_groups(again, 4, seed=1), 0, 0)


def test_the_cap_of_m2po_comes_from_the_whole_batch(model_dir: Path) -> None:
    """Whatever the minibatches and micro-batches are, the limit is that of one big batch."""
    limits = []
    for minibatches, budget in ((1, 10_000), (4, 10_000), (4, 40)):
        table = {"minibatches": minibatches, "tokens_per_microbatch": budget}
        trainer = make_trainer(model_dir, recipe(train=table, algorithm={"m2po": {"m2_threshold": 0.002}}))
        limits.append(trainer.train(stale(sample_groups(trainer, 4, seed=1), 0.3), 0, 0).metrics["m2_limit"])
    assert limits[1] == pytest.approx(limits[0], abs=1e-5)
    assert limits[2] == pytest.approx(limits[0], abs=1e-5)
    assert 0.05 < limits[0] < 0.3


def test_a_fresh_batch_agrees_with_its_engine(model_dir: Path) -> None:
    trainer = make_trainer(model_dir, recipe())
    metrics = trainer.train(sample_groups(trainer, 4, seed=1), 0, 0).metrics
    assert metrics["parity_max_abs"] < 1e-5
    assert metrics["rows_max_abs"] < 1e-5
    assert metrics["ratio_mean"] == pytest.approx(1.0, abs=1e-6)
    assert metrics["updates"] == 2
    assert metrics["tokens"] == sum(len(s.tokens) for g in sample_groups(None, 4, seed=1) for s in g.samples)


def test_micro_batches_do_not_change_the_update(model_dir: Path) -> None:
    results = []
    for budget in (10_000, 40):
        trainer = make_trainer(model_dir, recipe(train={"tokens_per_microbatch": budget}))
        for step in range(2):
            trainer.train(sample_groups(trainer, 4, seed=step, version=step), step, step)
        results.append(trainer.masters.values)
    for name, value in results[0].items():
        torch.testing.assert_close(value, results[1][name], atol=2e-5, rtol=0.0, msg=name)


def test_the_pass_without_gradients_is_left_out_when_it_says_nothing(
    model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = make_trainer(model_dir, recipe(algorithm={"name": "grpo"}, train={"minibatches": 1}))
    calls = 0
    forward = parity.logprobs

    def counted(*arguments):  # type: ignore[no-untyped-def]
        nonlocal calls
        calls += 1
        return forward(*arguments)

    monkeypatch.setattr(parity, "logprobs", counted)
    counts = []
    for step in range(1, 4):
        calls = 0
        result = trainer.train(sample_groups(trainer, 2, seed=step, version=step), step, step)
        counts.append(calls / sum(map(len, result.batch.minibatches)))
        assert result.metrics["ratio_mean"] == pytest.approx(1.0, abs=1e-5)
        assert result.metrics["entropy"] > 0
    assert counts[0] >= 2.0 and counts[1:] == [1.0, 1.0]  # the first batch of a process is always scored, and checked


def test_an_engine_with_other_weights_stops_the_run(model_dir: Path) -> None:
    trainer = make_trainer(model_dir, recipe())
    groups = stale(sample_groups(trainer, 4, seed=1), 0.01, version=0)
    with pytest.raises(RunFailed, match=r"trainer and engine disagree at version 0: mean .* allowed mean 1.0e-04"):
        trainer.train(groups, 0, 0)
    relaxed = make_trainer(model_dir, recipe(train={"parity_tolerance": 0.02}))
    assert relaxed.train(groups, 0, 0).metrics["parity_mean_abs"] == pytest.approx(0.005, abs=0.001)


def test_an_engine_that_missed_the_update_stops_the_run(model_dir: Path) -> None:
    trainer = make_trainer(model_dir, recipe(train={"learning_rate": 1e-2}))
    old = sample_groups(trainer, 4, seed=1, version=1)
    trainer.train(sample_groups(trainer, 4, seed=0), 0, 0)
    with pytest.raises(RunFailed, match="at version 1"):
        trainer.train(old, 1, 1)


@pytest.mark.parametrize("minibatches", [1, 2])
def test_an_engine_that_drifts_away_later_stops_the_run_before_an_update(model_dir: Path, minibatches: int) -> None:
    """With one fresh minibatch no scoring pass is made: the training forward itself is judged."""
    trainer = make_trainer(model_dir, recipe(train={"minibatches": minibatches}))
    for step in range(3):
        metrics = trainer.train(sample_groups(trainer, 4, seed=step, version=step), step, step).metrics
        assert metrics["parity_mean_abs"] < 1e-5
    before = {name: value.clone() for name, value in trainer.masters.values.items()}
    with pytest.raises(RunFailed, match=r"disagree at version 3: .* allowed mean 1.0e-04") as stopped:
        trainer.train(stale(sample_groups(trainer, 4, seed=3), 0.01, version=3), 3, 3)
    assert "train.parity_tolerance" in str(stopped.value.hint)
    assert all(torch.equal(before[name], value) for name, value in trainer.masters.values.items())


def test_agreement_is_measured_on_the_tokens_of_the_trainers_version_alone(model_dir: Path) -> None:
    trainer = make_trainer(model_dir, recipe(train={"parity_tolerance": 1.0}))
    fresh, old = sample_groups(trainer, 2, seed=1, version=5), sample_groups(trainer, 2, seed=2, first=2)
    log_ratios = []
    for sample in (s for g in fresh for s in g.samples):
        shift = np.linspace(-0.2, 0.1, len(sample.tokens)).astype(np.float32)
        sample.segments = [Segment(5, sample.tokens, sample.logprobs - shift)]
        log_ratios.append(shift.astype(np.float64))
    metrics = trainer.train([*fresh, *stale(old, 3.0, version=4)], 5, 5).metrics
    log_N = np.concatenate(log_ratios)
    assert metrics["parity_tokens"] == len(log_N)
    assert metrics["parity_mean_abs"] == pytest.approx(np.abs(log_N).mean(), abs=1e-5)
    assert metrics["parity_max_abs"] == pytest.approx(0.2, abs=1e-4)
    assert metrics["parity_ratio_mean"] == pytest.approx(np.exp(log_N).mean(), abs=1e-5)
    assert metrics["parity_kl"] == pytest.approx((np.exp(log_N) - 1 - log_N).mean(), abs=1e-5)
    assert metrics["parity_kl_k1"] == pytest.approx(-log_N.mean(), abs=1e-5)


def test_few_tokens_are_judged_by_their_sum_and_no_number_is_no_agreement() -> None:
    def judged(count: int, value: float) -> bool:
        measured = Agreement()
        measured.add(torch.full((count,), value))
        try:
            measured.require(0.01, 0)
        except RunFailed:
            return False
        return True

    assert judged(64, 0.0099) and not judged(64, 0.0101) and not judged(5000, 0.0101)
    assert judged(4, 0.159) and not judged(4, 0.161)
    assert not judged(64, math.nan)
    assert Agreement().figures == {}


def test_rows_that_leak_stop_the_run(model_dir: Path) -> None:
    """A model that sees the other rows of its batch."""
    trainer = make_trainer(model_dir, recipe())

    def leak(module, arguments, output):  # type: ignore[no-untyped-def]
        return output + 0.1 * output.mean(0, keepdim=True)

    trainer.policy.model.get_input_embeddings().register_forward_hook(leak)  # type: ignore[operator]
    with pytest.raises(RunFailed, match="rows padded together differ from separate rows"):
        trainer.train(sample_groups(None, 4, seed=1), 0, 0)


def test_masters_keep_what_the_wire_dtype_loses(model_dir: Path) -> None:
    """Updates far under half an ulp of bf16 add up in the master; the parameter is the rounded master."""
    trainer = make_trainer(model_dir, recipe(train={"learning_rate": 1e-6}))
    before = {name: value.clone() for name, value in trainer.masters.values.items()}
    for step in range(2):
        trainer.train(sample_groups(trainer, 4, seed=step, version=step), step, step)
    for name, value in trainer.masters.values.items():
        assert value.dtype == torch.float32
        parameter = trainer.masters.parameters[name]
        if trainer.masters.wire[name].dtype == "bfloat16":
            assert torch.equal(parameter, value.bfloat16().float())
        else:
            assert "A_log" in name and torch.equal(parameter, value)
    moved = sum(int((before[n] != v).sum()) for n, v in trainer.masters.values.items())
    shown = trainer.masters.wire_shards()
    still = sum(
        int((before[n].to(t.dtype) == t).sum())
        for n, t in ((n, shown[trainer.masters.wire[n].name]) for n in before)
        if isinstance(t, torch.Tensor)
    )
    total = sum(v.numel() for v in before.values())
    assert moved > 0.8 * total
    assert still > 0.95 * total


def test_gradients_are_clipped_together(model_dir: Path) -> None:
    """With a tiny clip, AdamW's first update still has the sign of every gradient; the norm told is the one before."""
    trainer = make_trainer(model_dir, recipe(train={"grad_clip": 1e-3, "minibatches": 1}))
    groups = sample_groups(trainer, 4, seed=1)
    seen = {}
    step = trainer.masters.adam.adamw.step

    def spy() -> None:
        grads = [p.grad for p in trainer.masters.adam.adamw.param_groups[0]["params"] if p.grad is not None]
        seen["norm"] = math.sqrt(sum(float(g.double().square().sum()) for g in grads))
        step()

    trainer.masters.adam.adamw.step = spy  # type: ignore[method-assign, assignment]
    metrics = trainer.train(groups, 0, 0).metrics
    assert metrics["grad_norm"] > 1e-2
    assert seen["norm"] == pytest.approx(1e-3, rel=1e-2)


@pytest.mark.parametrize("on", ["all", "matrices"])
def test_what_decays_is_the_recipes_choice(model_dir: Path, on: str) -> None:
    """No gradient, so an update is the decay alone: 1 - 0.1 x 0.5 of the value."""
    table = {"weight_decay": 0.5, "learning_rate": 0.1, "weight_decay_on": on}
    masters = make_trainer(model_dir, recipe(train=table)).masters
    before = {name: value.clone() for name, value in masters.values.items()}
    for parameter in masters.parameters.values():
        parameter.grad = torch.zeros_like(parameter)
    masters.update(0)
    kinds = {name.rsplit(".", 1)[-1] for name, value in before.items() if value.ndim == 1}
    assert {"A_log", "dt_bias", "weight"} <= kinds
    for name, value in before.items():
        decays = on == "all" or value.ndim > 1
        torch.testing.assert_close(masters.values[name], value * 0.95 if decays else value, msg=name)


def test_a_gradient_that_is_not_finite_stops_the_run(model_dir: Path) -> None:
    trainer = make_trainer(model_dir, recipe())
    next(iter(trainer.masters.parameters.values())).grad = torch.full((64, 32), math.nan)
    with pytest.raises(RunFailed, match="gradient norm of step 7 is nan"):
        trainer.masters.update(7)


def test_kl_to_the_initial_model(model_dir: Path) -> None:
    trainer = make_trainer(model_dir, recipe(algorithm={"kl_coef": 0.1}, train={"learning_rate": 1e-2}))
    first = trainer.train(sample_groups(trainer, 4, seed=0), 0, 0).metrics
    second = trainer.train(sample_groups(trainer, 4, seed=1, version=1), 1, 1).metrics
    assert first["kl"] == pytest.approx(0.0, abs=1e-9)
    assert second["kl"] > 1e-3
    assert trainer.reference is not None
    assert all(p.grad is None for p in trainer.reference.parameters())


@pytest.mark.parametrize("mode", ["full", "selective"])
def test_recomputation_changes_nothing(model_dir: Path, mode: str) -> None:
    losses = []
    for chosen in ("none", mode):
        trainer = make_trainer(model_dir, recipe(train={"activation_checkpointing": chosen}))
        groups = stale(sample_groups(make_trainer(model_dir, recipe()), 4, seed=1), 0.1)
        losses.append([trainer.train(groups, step, 0).metrics[k] for step in (0, 1) for k in ("loss", "grad_norm")])
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)


def test_an_adapter_that_names_other_parameters_is_refused(model_dir: Path) -> None:
    def odd(model):  # type: ignore[no-untyped-def]
        wire = ADAPTER.wire_tensors(model)
        return {name.replace("embed_tokens", "embeddings"): tensor for name, tensor in wire.items()}

    with pytest.raises(RunFailed, match=r"model\.embeddings\.weight"):
        make_trainer(model_dir, recipe(), adapter=replace(ADAPTER, wire_tensors=odd))


def test_learning_rate_by_hand() -> None:
    def rates(**values: object) -> list[float]:
        table = TrainTable.model_validate({"steps": 6, "learning_rate": 1.0, "warmup_steps": 2} | values)
        return [round(learning_rate(table, step), 4) for step in range(6)]

    assert rates() == [0.5, 1, 1, 1, 1, 1]
    assert rates(schedule="linear", final_lr_fraction=0.2) == [0.5, 1, 1, 0.8, 0.6, 0.4]
    assert rates(schedule="cosine") == [0.5, 1, 1, 0.8536, 0.5, 0.1464]
    assert rates(schedule="linear", warmup_steps=0) == [1, 0.8333, 0.6667, 0.5, 0.3333, 0.1667]
