"""Every algorithm on three tokens against its formula written out; what its name switches; steps of a tiny model."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from training_tools import divided, make_trainer, recipe, sample_groups, save_model

from astracli.config import recipe_io
from astracli.config.algorithms import AlgorithmTable, installed
from astracli.config.recipe import Recipe
from astracli.errors import UserError
from astracli.rl import losses
from astracli.rl.batch import empty_micro_batch, pad_rows
from astracli.rl.losses import TokenLoss
from astracli.rl.rows import Row
from astracli.rl.types import Group, Sample, Segment
from astracli.training import objective

# Two sequences: tokens 0 and 1 with advantage 1, token 2 with advantage -2. Probabilities under the behaviour policy,
# the policy at the start of the step, and the policy that is trained.
BEHAVIOUR = [0.40, 0.10, 0.25]
PROXIMAL = [0.50, 0.35, 0.20]
POLICY = [0.55, 0.50, 0.10]
ADVANTAGE = [1.0, 1.0, -2.0]
TEACHER = [0.60, 0.30, 0.40]
"""Of algorithms that have one."""
LOSS_LENGTH = 10
"""The constant of dr_grpo here."""
Probabilities = list[Tensor]


def row(tokens: int, behaviour: list[float], advantage: float) -> Row:
    drawn = Segment(0, np.arange(4, 4 + tokens, dtype=np.int32), np.log(np.array(behaviour, np.float32)))
    sample = Sample(0, [drawn], "stop")
    return Row(0, Group(0, "p", np.arange(2, 4, dtype=np.int32), [sample]), sample, advantage)


def recipe_of(name: str, settings: dict[str, Any], **shared: Any) -> Recipe:
    """With the algorithm's own `settings`; dr_grpo divides by LOSS_LENGTH."""
    own = ({"loss_length": LOSS_LENGTH} if name == "dr_grpo" else {}) | settings
    return recipe(algorithm={"name": name, name: own} | shared)


def teacher_of(name: str, tokens: int = 3) -> Tensor | None:
    """Log-probabilities of the teacher, where the algorithm has one."""
    return torch.tensor(TEACHER[:tokens]).log() if losses.get(name).teacher is not None else None


def computed(name: str, **settings: Any) -> tuple[float, list[float], TokenLoss]:
    """(loss of the minibatch, its gradient to the three log-probabilities, the token losses) by the package's code."""
    chosen = recipe_of(name, settings)
    algorithm = losses.get(name)
    micro = pad_rows([row(2, BEHAVIOUR[:2], 1.0), row(1, BEHAVIOUR[2:], -2.0)], 0)
    proximal = torch.tensor(PROXIMAL).log()
    log_ratio, own = proximal - torch.from_numpy(micro.logprob_N), chosen.algorithm.own
    limits = algorithm.prepare(log_ratio, torch.tensor(ADVANTAGE), own)
    logprob = torch.tensor(POLICY).log().requires_grad_()
    result, _ = objective.token_losses(algorithm, micro, logprob, proximal, limits, teacher_N=teacher_of(name))
    batch: Any = type("Whole", (), {"minibatch_tokens": [3], "rows_per_minibatch": 2.0})
    divisor = objective.denominator(algorithm.normaliser, batch, 0, chosen)
    loss = objective.normalised(algorithm.normaliser, result.loss_N, micro, divisor)
    loss.backward()
    assert logprob.grad is not None
    return loss.item(), logprob.grad.tolist(), result


def clip(value: Tensor, low: float, high: float) -> Tensor:
    return torch.clamp(value, low, high)


def ppo(ratio: Tensor, advantage: float, low: float, high: float) -> Tensor:
    return torch.min(ratio * advantage, clip(ratio, low, high) * advantage)


def mean_of_tokens(term: Callable[[Tensor, int], Tensor]) -> Callable[[Probabilities], Tensor]:
    return lambda p: -(term(p[0], 0) + term(p[1], 1) + term(p[2], 2)) / 3


def gspo(p: Probabilities) -> Tensor:
    s_first = (p[0] * p[1] / (BEHAVIOUR[0] * BEHAVIOUR[1])) ** 0.5
    s_second = p[2] / BEHAVIOUR[2]
    return -(ppo(s_first, 1.0, 0.3, 3.0) + ppo(s_second, -2.0, 0.3, 3.0)) / 2


def dr_grpo(p: Probabilities) -> Tensor:
    terms = [ppo(p[i] / BEHAVIOUR[i], ADVANTAGE[i], 0.8, 1.4) for i in range(3)]
    return -(sum(terms[:2], torch.zeros(())) / LOSS_LENGTH + terms[2] / LOSS_LENGTH) / 2


def decoupled(p: Tensor, i: int) -> Tensor:
    weight = PROXIMAL[i] / BEHAVIOUR[i]
    return (0.0 if weight > 3.0 else weight) * ppo(p / PROXIMAL[i], ADVANTAGE[i], 0.8, 1.2)


def tis(p: Tensor, i: int) -> Tensor:
    return min(PROXIMAL[i] / BEHAVIOUR[i], 2.0) * ppo(p / PROXIMAL[i], ADVANTAGE[i], 0.8, 1.2)


def taught(i: int) -> float:
    """The reward's advantage, and twice log teacher / student at the start of the step."""
    return ADVANTAGE[i] + 2.0 * math.log(TEACHER[i] / PROXIMAL[i])


def m2po_mask(p: Tensor, i: int) -> Tensor:
    # at the start of the step log r = 0.223, 1.253, -0.223, all candidates: m 0.0498, 1.569, 0.0498; mean 0.556 > 0.1,
    # without the second 0.0498: tokens over sqrt(0.1) = 0.316 in the direction of their advantage are dropped
    log_ratio = math.log(POLICY[i] / BEHAVIOUR[i])  # 0.318, 1.609, -0.916: all of them by now
    return 0.0 * p if log_ratio * ADVANTAGE[i] > 0 and abs(log_ratio) > math.sqrt(0.1) else p / BEHAVIOUR[i]


FORMULAS: dict[str, tuple[dict[str, Any], Callable[[Probabilities], Tensor]]] = {
    "grpo": (
        {"clip_low": 0.2, "clip_high": 0.4},
        mean_of_tokens(lambda p, i: ppo(p / BEHAVIOUR[i], ADVANTAGE[i], 0.8, 1.4)),
    ),
    "m2po": ({"variant": "mask", "m2_threshold": 0.1}, mean_of_tokens(m2po_mask)),
    "dapo": ({"clip_high": 0.4}, mean_of_tokens(lambda p, i: ppo(p / BEHAVIOUR[i], ADVANTAGE[i], 0.8, 1.4))),
    "dr_grpo": ({"clip_high": 0.4}, dr_grpo),
    "gspo": ({"clip_low": 0.7, "clip_high": 2.0}, gspo),
    "cispo": (
        {"clip_high": 1.0},
        mean_of_tokens(lambda p, i: min(POLICY[i] / BEHAVIOUR[i], 2.0) * ADVANTAGE[i] * p.log()),
    ),
    "decoupled": ({"weight_cap": 3.0}, mean_of_tokens(decoupled)),
    "tis": ({}, mean_of_tokens(tis)),
    "distill": (
        {"teacher": "big", "coef": 2.0, "clip_high": 0.4},
        mean_of_tokens(lambda p, i: ppo(p / BEHAVIOUR[i], taught(i), 0.8, 1.4)),
    ),
}


def test_every_algorithm_has_its_formula_here() -> None:
    assert FORMULAS.keys() == installed().keys()


@pytest.mark.parametrize("name", FORMULAS)
def test_three_tokens_equal_autograd_of_the_formula(name: str) -> None:
    settings, formula = FORMULAS[name]
    logprob = torch.tensor(POLICY, dtype=torch.float64).log().requires_grad_()
    expected = formula(list(logprob.exp()))
    expected.backward()
    loss, gradient, _ = computed(name, **settings)
    assert loss == pytest.approx(expected.item(), rel=1e-5)
    assert logprob.grad is not None
    assert gradient == pytest.approx(logprob.grad.tolist(), rel=1e-5, abs=1e-7)
    assert any(gradient) or name == "m2po"


# The same by hand. Ratios to the behaviour policy 1.375, 5, 0.4; to the proximal one 1.1, 1.4286, 0.5; weights 1.25,
# 3.5, 0.8.


def test_dapo_by_hand() -> None:
    # range [0.8, 1.28]: min(1.375, 1.28), min(5, 1.28), min(-0.8, -1.6): all at their clip
    loss, gradient, result = computed("dapo")
    assert loss == pytest.approx(-(1.28 + 1.28 - 1.6) / 3)
    assert gradient == [0.0, 0.0, 0.0]
    assert result.clipped_N.tolist() == [True, True, True]


def test_dr_grpo_by_hand() -> None:
    # range [0.8, 1.4]: 1.375, 1.4, -1.6; over length 10, mean over 2 sequences
    loss, gradient, _ = computed("dr_grpo", clip_high=0.4)
    assert loss == pytest.approx(-(1.375 + 1.4 - 1.6) / 10 / 2)
    assert gradient == pytest.approx([-1.375 / 20, 0.0, 0.0])


def test_gspo_by_hand() -> None:
    # s: sqrt(1.375 * 5) = 2.622 and 0.4; range [0.3, 3]: -(2.622 - 0.8) / 2; d s / d log p = s / 2, two tokens each
    s = math.sqrt(6.875)
    loss, gradient, result = computed("gspo", clip_low=0.7, clip_high=2.0)
    assert loss == pytest.approx(-(s - 0.8) / 2)
    assert gradient == pytest.approx([-s / 4, -s / 4, 0.4])
    # with the paper's range both sequences are clipped, all tokens of them
    assert computed("gspo")[2].clipped_N.tolist() == [True, True, True]
    assert not result.clipped_N.any()


def test_cispo_by_hand() -> None:
    # weights min(r, 2): 1.375, 2, 0.4; the gradient of A log p is A: no token is left out
    loss, gradient, result = computed("cispo", clip_high=1.0)
    assert loss == pytest.approx(-(1.375 * math.log(0.55) + 2 * math.log(0.5) - 0.8 * math.log(0.1)) / 3)
    assert gradient == pytest.approx([-1.375 / 3, -2 / 3, 0.8 / 3])
    assert result.clipped_N.tolist() == [False, True, False]


def test_decoupled_by_hand() -> None:
    # range [0.8, 1.2]: 1.25 * 1.1, dropped (3.5 > 3), 0.8 * min(-1, -1.6)
    loss, gradient, result = computed("decoupled", weight_cap=3.0)
    assert loss == pytest.approx(-(1.375 - 1.28) / 3)
    assert gradient == pytest.approx([-1.375 / 3, 0.0, 0.0])
    assert result.capped_N is not None and result.capped_N.tolist() == [False, True, False]


def test_tis_by_hand() -> None:
    # 1.25 * 1.1, 2 * 1.2 (clipped), 0.8 * -1.6 (clipped)
    loss, gradient, result = computed("tis")
    assert loss == pytest.approx(-(1.375 + 2.4 - 1.28) / 3)
    assert gradient == pytest.approx([-1.375 / 3, 0.0, 0.0])
    assert result.capped_N is not None and result.capped_N.tolist() == [False, True, False]


@pytest.mark.parametrize(("name", "weights"), [("tis", [1.375, 2.0, 0.4]), ("decoupled", [1.375, 0.0, 0.4])])
def test_a_policy_that_has_not_moved_trains_with_the_weight_alone(name: str, weights: list[float]) -> None:
    """No pass without gradients: u = 1 with the gradient of log pi, the weight pi / pi_behaviour is a constant."""
    micro = pad_rows([row(2, BEHAVIOUR[:2], 1.0), row(1, BEHAVIOUR[2:], -2.0)], 0)
    algorithm, logprob = losses.get(name), torch.tensor(POLICY).log().requires_grad_()
    limits = algorithm.prepare(torch.zeros(3), torch.tensor(ADVANTAGE), algorithm.settings(weight_cap=2.0))
    result, _ = objective.token_losses(algorithm, micro, logprob, None, limits)
    result.loss_N.sum().backward()
    expected = [-w * a for w, a in zip(weights, ADVANTAGE, strict=True)]
    assert result.loss_N.tolist() == pytest.approx(expected)
    assert logprob.grad is not None and logprob.grad.tolist() == pytest.approx(expected)


@pytest.mark.parametrize("name", FORMULAS)
def test_a_micro_batch_without_tokens_keeps_its_graph(name: str) -> None:
    algorithm, empty = losses.get(name), torch.zeros(0)
    logprob = torch.zeros(0, requires_grad=True)
    limits = algorithm.prepare(empty, empty, algorithm.settings(**({"teacher": "big"} if algorithm.teacher else {})))
    micro = empty_micro_batch(0)
    result, _ = objective.token_losses(
        algorithm, micro, logprob * 1.0, None, limits, teacher_N=teacher_of(name, tokens=0)
    )
    loss = objective.normalised(algorithm.normaliser, result.loss_N, micro, 4.0)
    loss.backward()
    assert loss.item() == 0.0 and logprob.grad is not None


# mismatch correction, beside any algorithm


@pytest.mark.parametrize("name", FORMULAS)
def test_mismatch_correction_weighs_tokens_of_the_current_version(name: str) -> None:
    """Tokens 0 and 2 are the current version's: their ratio is to the trainer's own probability, their weight
    min(pi_proximal / pi_engine, 1.1), which is 1.1 and 0.8. Token 1 is older: its ratio is to the engine's, and it
    weighs 1."""
    settings, _ = FORMULAS[name]
    own, algorithm = recipe_of(name, settings).algorithm.own, losses.get(name)
    micro = pad_rows([row(2, BEHAVIOUR[:2], 1.0), row(1, BEHAVIOUR[2:], -2.0)], 0)
    micro.rows[0].versions[:], micro.rows[1].versions[:] = [7, 6], [7]
    proximal = torch.tensor(PROXIMAL).log()
    moved = objective.moved(proximal - torch.from_numpy(micro.logprob_N), micro, 7, 1.1)
    assert moved.tolist() == pytest.approx([0.0, math.log(3.5), 0.0])
    limits = algorithm.prepare(moved, torch.tensor(ADVANTAGE), own)
    logprob = torch.tensor(POLICY).log().requires_grad_()
    taught: Any = {"teacher_N": teacher_of(name)}
    result, capped = objective.token_losses(algorithm, micro, logprob, proximal, limits, version=7, cap=1.1, **taught)
    result.loss_N.sum().backward()

    # the same algorithm, told that the engine's probabilities of tokens 0 and 2 were the trainer's
    plain = logprob.detach().clone().requires_grad_()
    for place, probability in zip(micro.rows, (PROXIMAL[0], PROXIMAL[2]), strict=True):
        place.logprobs[0] = math.log(probability)
    expected, _ = objective.token_losses(algorithm, micro, plain, proximal, limits, **taught)
    weights = torch.tensor([1.1, 1.0, 0.8])
    (expected.loss_N * weights).sum().backward()
    torch.testing.assert_close(result.loss_N, expected.loss_N * weights)
    assert logprob.grad is not None and plain.grad is not None
    torch.testing.assert_close(logprob.grad, plain.grad)
    assert capped is not None and capped.tolist() == [True, False, False]


def test_grpo_with_mismatch_correction_is_tis_on_fresh_tokens() -> None:
    grpo, micro = losses.get("grpo"), pad_rows([row(2, BEHAVIOUR[:2], 1.0), row(1, BEHAVIOUR[2:], -2.0)], 0)
    proximal, logprob = torch.tensor(PROXIMAL).log(), torch.tensor(POLICY).log().requires_grad_()
    limits = grpo.prepare(torch.zeros(3), torch.tensor(ADVANTAGE), grpo.settings())
    result, _ = objective.token_losses(grpo, micro, logprob, proximal, limits, version=0, cap=2.0)
    (result.loss_N.sum() / 3).backward()
    loss, gradient, _ = computed("tis")
    assert (result.loss_N.sum() / 3).item() == pytest.approx(loss)
    assert logprob.grad is not None and logprob.grad.tolist() == pytest.approx(gradient)


# what the name switches


def test_the_name_brings_its_own_values() -> None:
    def own(name: str, *keys: str) -> list[Any]:
        table = AlgorithmTable.model_validate({"name": name})
        return [getattr(table if hasattr(table, key) else table.own, key) for key in keys]

    assert own("grpo", "clip_low", "clip_high", "advantage", "overlong_fraction") == [0.2, 0.2, "group", 0.0]
    assert own("dapo", "clip_low", "clip_high", "overlong_fraction") == [0.2, 0.28, 0.2]
    assert own("gspo", "clip_low", "clip_high") == [3e-4, 4e-4]
    assert (own("decoupled", "weight_cap"), own("tis", "weight_cap")) == ([5.0], [2.0])
    assert AlgorithmTable.model_validate({"name": "dapo", "dapo": {"clip_high": 0.3}}).own.clip_high == 0.3


def test_a_resolved_recipe_reads_back_the_same(tmp_path: Path) -> None:
    first = recipe_io.load("qwen3.5-tiny-m2po-full", ["algorithm.name=gspo"])
    assert first.algorithm.own.clip_high == 4e-4
    path = tmp_path / "recipe.json"
    path.write_text(first.model_dump_json())
    assert recipe_io.load(path).algorithm == first.algorithm


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["algorithm.name=dr_grpo", "algorithm.dr_grpo.advantage=group"], "unknown key `algorithm.dr_grpo.advantage`"),
        (
            ["algorithm.name=dr_grpo", "algorithm.batch_norm_advantage=true"],
            "algorithm.batch_norm_advantage = true divides by the spread",
        ),
        (["algorithm.name=dapo", "algorithm.drop_equal_groups=false"], "takes dynamic sampling out"),
    ],
)
def test_settings_that_undo_an_algorithm_are_refused(overrides: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        recipe_io.load("qwen3.5-tiny-m2po-full", overrides)


# the tiny model


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("model"))


@pytest.mark.parametrize("name", sorted(FORMULAS.keys() - {"distill"}))  # with a teacher: test_distill.py
def test_two_steps_of_a_tiny_model(model_dir: Path, name: str) -> None:
    trainer = make_trainer(model_dir, recipe(algorithm={"name": name}, train={"learning_rate": 1e-3}))
    before = {n: v.clone() for n, v in trainer.masters.values.items()}
    for step in range(2):
        groups = sample_groups(trainer, 4, seed=step, version=step)
        metrics = trainer.train(groups, step, step).metrics
        assert math.isfinite(metrics["loss"]) and metrics["grad_norm"] > 0
        assert metrics["ratio_mean"] == pytest.approx(1.0, abs=1e-5)
    assert any((before[n] != v).any() for n, v in trainer.masters.values.items())
    assert ("weight_capped_fraction" in metrics) == (name in ("decoupled", "tis"))
    if name == "dapo":  # completions of 2 to 13 tokens, the ramp begins at 0.8 * 16 = 12.8
        lengths = [len(s.tokens) for g in groups for s in g.samples]
        assert metrics["overlong_fraction"] == pytest.approx(lengths.count(13) / len(lengths))
        assert metrics["overlong_fraction"] > 0 and metrics["overlong_penalty_mean"] > 0


@pytest.mark.parametrize("name", ["gspo", "dr_grpo"])
def test_a_normaliser_does_not_see_micro_batches(model_dir: Path, name: str) -> None:
    figures = []
    for budget in (10_000, 40):
        trainer = make_trainer(
            model_dir, recipe(algorithm={"name": name}, train={"minibatches": 1, "tokens_per_microbatch": budget})
        )
        metrics = trainer.train(sample_groups(trainer, 3, seed=2), 0, 0).metrics
        figures.append((metrics["loss"], metrics["grad_norm"]))
    assert figures[0] == pytest.approx(figures[1], rel=1e-4, abs=1e-6)


def test_mismatch_correction_in_a_step(model_dir: Path) -> None:
    """An engine that gives every token half of the trainer's probability: weight 2, capped at 1.5, and no ratio moved,
    however narrow the range; older tokens keep the ratio 2 and are clipped where they gain."""
    chosen = recipe(algorithm={"name": "grpo", "mismatch_cap": 1.5}, train={"minibatches": 1, "parity_tolerance": 1.0})
    figures = []
    for version in (0, -1):
        trainer = make_trainer(model_dir, chosen)
        groups = sample_groups(trainer, 4, seed=1, version=version)
        for sample in (s for g in groups for s in g.samples):
            sample.segments[0].logprobs = sample.segments[0].logprobs - np.float32(math.log(2.0))
        figures.append(trainer.train(groups, 0, 0).metrics)
    rows = divided(trainer, groups).rows
    tokens = sum(r.loss_tokens for r in rows)
    fresh, old = figures
    assert (fresh["mismatch_capped_fraction"], fresh["clip_fraction"]) == (1.0, 0.0)
    assert fresh["loss"] == pytest.approx(-1.5 * sum(r.advantage * r.loss_tokens for r in rows) / tokens, rel=1e-4)
    gaining = sum(r.loss_tokens for r in rows if r.advantage > 0) / tokens
    assert old["mismatch_capped_fraction"] == 0.0 and old["clip_fraction"] == pytest.approx(gaining)


def test_one_stale_minibatch_is_measured_from_the_policy_itself(model_dir: Path) -> None:
    """Nothing has moved since the start of the step: no ratio is clipped, the weight is pi / pi_behaviour."""
    trainer = make_trainer(
        model_dir, recipe(algorithm={"name": "tis", "tis": {"weight_cap": 1.5}}, train={"minibatches": 1})
    )
    groups = sample_groups(trainer, 4, seed=1, version=-1)
    for sample in (s for g in groups for s in g.samples):
        sample.segments[0].logprobs = sample.segments[0].logprobs - np.float32(math.log(2.0))
    metrics = trainer.train(groups, 0, 0).metrics
    assert metrics["ratio_mean"] == pytest.approx(2.0, rel=1e-4)
    assert metrics["clip_fraction"] == 0.0
    assert metrics["weight_capped_fraction"] == 1.0
    advantages = [(r.advantage, r.loss_tokens) for r in divided(trainer, groups).rows]
    expected = -1.5 * sum(a * n for a, n in advantages) / sum(n for _, n in advantages)
    assert metrics["loss"] == pytest.approx(expected, rel=1e-4)
