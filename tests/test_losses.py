"""Algorithms: hand-worked numbers, and M2PO against a brute-force search, all three variants."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from astracli.errors import UserError
from astracli.rl import losses
from astracli.rl.losses import TokenLoss, Tokens, k3, m2po
from astracli.rl.losses.clipping import ClipRange

M2PO = losses.get("m2po")


def grpo_settings(**values: float) -> Any:
    return losses.get("grpo").settings(**values)


def tensors(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float32)


def token_loss(name: str, log_ratio: Tensor, advantage: Tensor, limits: Any) -> TokenLoss:
    """The algorithm on tokens of a behaviour policy that gave each probability 1, all of one sequence."""
    zeros = torch.zeros_like(log_ratio)
    tokens = Tokens(log_ratio, zeros, advantage, log_ratio.detach(), zeros.long())
    return losses.get(name).token_loss(tokens, limits)


def test_an_unknown_name_lists_those_that_exist() -> None:
    with pytest.raises(UserError, match="`ppo3`") as error:
        losses.get("ppo3")
    assert str(error.value.hint).endswith("known: cispo, dapo, decoupled, distill, dr_grpo, grpo, gspo, m2po, tis")


# grpo


def test_grpo_by_hand() -> None:
    # ratios 1.5, 0.5, 1.5, 0.5 with range [0.8, 1.3]
    log_ratio = tensors(1.5, 0.5, 1.5, 0.5).log().requires_grad_()
    advantage = tensors(2.0, 2.0, -2.0, -2.0)
    grpo = losses.get("grpo")
    limits = grpo.prepare(log_ratio, advantage, grpo_settings(clip_low=0.2, clip_high=0.3))
    loss, clipped, _ = token_loss("grpo", log_ratio, advantage, limits)
    # -min(r A, clip(r) A): -min(3, 2.6), -min(1, 1.6), -min(-3, -2.6), -min(-1, -1.6)
    assert loss.tolist() == pytest.approx([-2.6, -1.0, 3.0, 1.6])
    assert clipped.tolist() == [True, False, False, True]
    loss.sum().backward()
    # d(-r A)/d log r = -r A where it is not cut
    assert log_ratio.grad is not None
    assert log_ratio.grad.tolist() == pytest.approx([0.0, -1.0, 3.0, 0.0])


def test_the_loss_of_a_far_off_token_stays_finite() -> None:
    loss, _, _ = token_loss("grpo", tensors(200.0), tensors(-1.0), ClipRange(0.8, 1.2))
    assert math.isfinite(loss.item())


def test_the_limit_of_a_fixed_range_is_its_wider_side() -> None:
    def cap(low: float, high: float) -> float:
        settings = grpo_settings(clip_low=low, clip_high=high)
        return losses.get("grpo").prepare(tensors(), tensors(), settings).cap

    assert cap(0.2, 0.2) == pytest.approx(-math.log(0.8))  # 0.223; log 1.2 is 0.182
    assert cap(0.1, 0.4) == pytest.approx(math.log(1.4))
    assert cap(1.5, 0.2) == pytest.approx(-math.log(1e-6))  # no ratio is under 0


# m2po: hand-worked, tau 0.09. Candidates: |log r| 0.1, 0.2, 0.3, 0.6 -> m 0.01, 0.04, 0.09, 0.36; the last two tokens
# moved against their advantage and are none.

LOG_RATIO = tensors(0.1, -0.2, 0.3, -0.6, 0.9, -0.9)
ADVANTAGE = tensors(1.0, -1.0, 1.0, -1.0, -1.0, 1.0)


def test_mask_by_hand() -> None:
    # mean of all four 0.125 > 0.09; of the three smallest 0.14 / 3 = 0.0467: the cap is 0.3 = sqrt(tau) as well
    limits = M2PO.prepare(LOG_RATIO, ADVANTAGE, m2po.Settings(variant="mask", m2_threshold=0.09))
    assert isinstance(limits, m2po.Mask)
    assert limits.cap == pytest.approx(0.3)
    loss, clipped, _ = token_loss("m2po", LOG_RATIO, ADVANTAGE, m2po.Mask(0.3 + 1e-6))
    assert clipped.tolist() == [False, False, False, True, False, False]
    expected = [-math.exp(0.1), math.exp(-0.2), -math.exp(0.3), 0.0, math.exp(0.9), -math.exp(-0.9)]
    assert loss.tolist() == pytest.approx(expected)


def test_clip_by_hand() -> None:
    # tau 0.04: prefix means 0.01, 0.025, 0.0467: two are kept, the cap is 0.2
    limits = M2PO.prepare(LOG_RATIO, ADVANTAGE, m2po.Settings(variant="clip", m2_threshold=0.04))
    assert isinstance(limits, ClipRange)
    assert (limits.low, limits.high) == pytest.approx((math.exp(-0.2), math.exp(0.2)))
    assert limits.cap == pytest.approx(0.2)


def test_waterfill_by_hand() -> None:
    # sum(min(m, t^2)) = 0.0725 * 4 = 0.29: 0.01 + 0.04 + 0.09 stay, t^2 = 0.15
    limits = M2PO.prepare(LOG_RATIO, ADVANTAGE, m2po.Settings(variant="waterfill", m2_threshold=0.0725))
    t = math.sqrt(0.15)
    assert isinstance(limits, ClipRange)
    assert (limits.low, limits.high) == pytest.approx((math.exp(-t), 1.5))  # 1 - e^-0.387 = 0.321, e^0.387 - 1 = 0.473


def test_a_mean_of_exactly_tau_is_kept_and_nothing_more() -> None:
    moments = torch.tensor([0.25, 0.75, 4.0], dtype=torch.float64)
    assert m2po.largest_kept(moments, 0.5) == math.sqrt(0.75)
    assert m2po.largest_kept(moments, 0.4999) == math.sqrt(0.4999)  # the one kept, 0.25, is under it
    assert m2po.largest_kept(moments[:0], 0.25) == 0.5


def test_a_water_level_is_never_under_the_root_of_tau() -> None:
    assert m2po.water_level(torch.tensor([0.01]), 0.25) == 0.5
    assert m2po.water_level(torch.tensor([0.01, 0.36]), 0.25) == pytest.approx(0.6)
    assert m2po.water_level(torch.tensor([]), 0.25) == 0.5


def test_a_water_level_where_the_mean_is_tau_but_for_rounding() -> None:
    """Means and running sums round differently: no level need fit under its moment."""
    draw = torch.Generator().manual_seed(0)
    for count in range(1, 300):
        moments = torch.rand(count, generator=draw, dtype=torch.float64)
        for tau in (float(moments.mean()), math.nextafter(float(moments.mean()), 0.0)):
            assert m2po.water_level(moments, tau) == pytest.approx(math.sqrt(float(moments.max())), rel=1e-6)


def test_widths_are_bounded() -> None:
    far = tensors(9.0, -9.0)
    limits = M2PO.prepare(far, tensors(1.0, -1.0), m2po.Settings(variant="clip", m2_threshold=100.0))
    assert isinstance(limits, ClipRange)
    assert (limits.low, limits.high) == pytest.approx((0.05, 21.0))


@pytest.mark.parametrize("variant", ["mask", "clip", "waterfill"])
def test_a_fresh_batch_leaves_the_later_minibatches_room(variant: str) -> None:
    zeros, advantage = torch.zeros(4), tensors(1.0, -1.0, 1.0, -1.0)
    limits = M2PO.prepare(zeros, advantage, m2po.Settings(variant=variant, m2_threshold=0.01))
    assert limits.cap >= 0.1 - 1e-9  # sqrt(tau)
    moved = tensors(0.09, -0.09, 0.05, -0.05)
    _, clipped, _ = token_loss("m2po", moved, advantage, limits)
    assert not clipped.any()


@pytest.mark.parametrize("variant", ["mask", "clip", "waterfill"])
def test_where_the_mean_is_under_the_threshold_nothing_is_bounded(variant: str) -> None:
    """As published: mask and waterfill cut nothing at all, clip is as wide as it gets. Moments 0.0001 and 0.0199."""
    chosen = m2po.Settings(variant=variant, m2_threshold=0.01)
    log_ratio, advantage = tensors(0.01, -(0.0199**0.5 - 1e-4)), tensors(1.0, -1.0)
    limits = M2PO.prepare(log_ratio, advantage, chosen)
    later = tensors(3.0, -2.9, 3.1, -3.1)
    _, clipped, _ = token_loss("m2po", later, tensors(1.0, -1.0, 1.0, -1.0), limits)
    assert clipped.tolist() == [False, False, variant == "clip", variant == "clip"]
    assert M2PO.prepare(tensors(), tensors(), chosen) == limits == M2PO.prepare(-log_ratio, advantage, chosen)
    over = M2PO.prepare(tensors(0.01, -(0.0199**0.5 + 1e-4)), advantage, chosen)
    assert over.cap == pytest.approx(math.log(1.5) if variant == "waterfill" else 0.1, abs=1e-6)


@pytest.mark.parametrize("variant", ["mask", "clip", "waterfill"])
@pytest.mark.parametrize("count", [1, 2, 5])
def test_an_infinite_log_ratio_is_the_largest_there_is(variant: str, count: int) -> None:
    """The engine, or the trainer, gave a token the probability 0. Limits are those of a very large log-ratio."""
    rest = [0.01, -0.02, 0.4, -0.5]
    signs = tensors(1.0, -1.0, 1.0, -1.0, 1.0)[:count]
    advantage = torch.cat([tensors(1.0, -1.0, 1.0, -1.0), signs])
    chosen = m2po.Settings(variant=variant, m2_threshold=0.04)
    infinite = M2PO.prepare(torch.cat([tensors(*rest), signs * math.inf]), advantage, chosen)
    huge = M2PO.prepare(torch.cat([tensors(*rest), signs * 1e6]), advantage, chosen)
    assert infinite == huge and math.isfinite(infinite.cap)
    only = M2PO.prepare(signs * math.inf, signs, chosen)
    assert math.isfinite(only.cap) and token_loss("m2po", signs * math.inf, signs, only).clipped_N.all()


@pytest.mark.parametrize("variant", ["mask", "clip"])
def test_the_largest_kept_token_trains_and_the_next_does_not(variant: str) -> None:
    """Its ratio in fp32 may lie an ulp outside of a range that is made from it: 3 of 75 batches lost its gradient."""
    draw = torch.Generator().manual_seed(0)
    for _ in range(300):
        log_ratio = torch.randn(40, generator=draw) * 0.3
        advantage = torch.randn(40, generator=draw).sign()
        limits = M2PO.prepare(log_ratio, advantage, m2po.Settings(variant=variant, m2_threshold=0.02))
        moving = log_ratio.clone().requires_grad_()
        loss, clipped, _ = token_loss("m2po", moving, advantage, limits)
        loss.sum().backward()
        assert moving.grad is not None
        inside = log_ratio.double().abs() <= limits.cap + 1e-9
        chosen = m2po.candidates(log_ratio, advantage)
        assert torch.equal(clipped, chosen & ~inside)
        assert torch.equal(moving.grad == 0.0, clipped)
        assert torch.allclose(moving.grad[inside], -(log_ratio.exp() * advantage)[inside])


@pytest.mark.parametrize("variant", ["mask", "clip", "waterfill"])
@pytest.mark.parametrize(("tau", "spread"), [(0.003, 0.15), (0.01, 0.3), (0.04, 0.6)])
def test_stale_data_is_cut_as_by_limits_of_each_minibatch(variant: str, tau: float, spread: float) -> None:
    """Published rules take limits from what an update computes on. On stale data one pass over the batch cuts within
    a tenth of the same tokens, although the policy moves on between the minibatches."""
    draw = torch.Generator().manual_seed(1)
    advantage = torch.randn(4, 5000, generator=draw)
    scored = torch.randn(4, 5000, generator=draw) * spread
    drift = torch.arange(4)[:, None] * 0.02 * spread * advantage.sign()
    chosen = m2po.Settings(variant=variant, m2_threshold=tau)
    once = M2PO.prepare(scored.flatten(), advantage.flatten(), chosen)
    cut = own = 0
    for then, a in zip(scored + drift, advantage, strict=True):
        cut += int(token_loss("m2po", then, a, once).clipped_N.sum())
        own += int(token_loss("m2po", then, a, M2PO.prepare(then, a, chosen)).clipped_N.sum())
    assert own > 100 and cut == pytest.approx(own, rel=0.1)


def candidates(log_ratio: list[float], advantage: list[float]) -> list[float]:
    return [r for r, a in zip(log_ratio, advantage, strict=True) if (a > 0 and r > 0) or (a < 0 and r < 0)]


def brute_force_kept(moments: list[float], tau: float) -> int:
    """Most candidates that any subset can keep with a mean at or under tau."""
    for size in range(len(moments), 0, -1):
        if any(sum(chosen) / size <= tau for chosen in itertools.combinations(moments, size)):
            return size
    return 0


values = st.floats(-1.5, 1.5).map(lambda v: round(v, 3))
tokens = st.lists(st.tuples(values, st.sampled_from([-1.5, -1.0, 0.0, 1.0])), min_size=1, max_size=9)


@settings(max_examples=150, deadline=None)
@given(tokens, st.sampled_from([0.01, 0.04, 0.25]))
def test_mask_and_clip_equal_brute_force(data: list[tuple[float, float]], tau: float) -> None:
    log_ratio, advantage = [d[0] for d in data], [d[1] for d in data]
    ratio64 = torch.tensor(log_ratio, dtype=torch.float64)
    moments = [r * r for r in candidates(log_ratio, advantage)]
    sums = [sum(sorted(moments)[: k + 1]) / (k + 1) for k in range(len(moments))]
    if any(abs(s - tau) < 1e-9 for s in sums):
        return
    for variant in ("mask", "clip"):
        limits = M2PO.prepare(
            ratio64, torch.tensor(advantage).double(), m2po.Settings(variant=variant, m2_threshold=tau)
        )
        cap = limits.cap
        kept = sum(math.sqrt(m) <= cap + 1e-12 for m in moments)
        ties = sum(abs(math.sqrt(m) - cap) < 1e-12 for m in moments)
        assert brute_force_kept(moments, tau) <= kept <= brute_force_kept(moments, tau) + ties
        assert cap >= math.sqrt(tau) - 1e-12
        if moments and sum(moments) / len(moments) > tau:
            inside = [math.sqrt(m) for m in moments if math.sqrt(m) <= cap + 1e-9]
            assert cap == pytest.approx(max([math.sqrt(tau), *inside]))


@settings(max_examples=150, deadline=None)
@given(tokens, st.sampled_from([0.01, 0.04, 0.25]))
def test_waterfill_equals_bisection(data: list[tuple[float, float]], tau: float) -> None:
    log_ratio, advantage = [d[0] for d in data], [d[1] for d in data]
    moments = [r * r for r in candidates(log_ratio, advantage)]
    if not moments or sum(moments) / len(moments) <= tau:
        return
    low, high = 0.0, 2.0
    for _ in range(80):
        t = (low + high) / 2
        low, high = (t, high) if sum(min(m, t * t) for m in moments) < tau * len(moments) else (low, t)
    assert m2po.water_level(torch.tensor(moments, dtype=torch.float64), tau) == pytest.approx(low, abs=1e-9)


def test_limits_do_not_depend_on_the_order_of_tokens() -> None:
    torch.manual_seed(0)
    log_ratio, advantage = torch.randn(500) * 0.3, torch.randn(500)
    order = torch.randperm(500)
    for variant in ("mask", "waterfill", "clip"):
        chosen = m2po.Settings(variant=variant, m2_threshold=0.02)
        assert M2PO.prepare(log_ratio, advantage, chosen) == M2PO.prepare(log_ratio[order], advantage[order], chosen)


def test_k3_by_hand() -> None:
    logprob = tensors(-1.0, -1.0, -1.0).requires_grad_()
    kl = k3(logprob, tensors(-1.0, 0.0, 9.0))
    assert kl.tolist() == pytest.approx([0.0, math.e - 2.0, 10.0])
    kl.sum().backward()
    assert logprob.grad is not None
    assert logprob.grad.tolist() == pytest.approx([0.0, -(math.e - 1.0), 0.0])
