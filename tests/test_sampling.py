"""Sampling: frequencies, independence of the batch, top-p by brute force, greedy, log-probabilities."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from astracli.engines.embedded.sampling import choose, nucleus, seed_bits, uniforms


def _choose(logits: torch.Tensor, temperature: float, top_p: float, draws: np.ndarray) -> np.ndarray:
    rows = len(draws)
    tokens, _ = choose(logits.expand(rows, -1), np.full(rows, temperature), np.full(rows, top_p), draws)
    return tokens


def test_uniforms_are_uniform_over_seeds_and_over_positions() -> None:
    n = 100_000
    across_seeds = uniforms(np.arange(n, dtype=np.uint64), np.zeros(n, np.int64))
    across_positions = uniforms(np.full(n, 7, np.uint64), np.arange(n))
    for draws in (across_seeds, across_positions):
        assert draws.min() >= 0 and draws.max() < 1
        counts, _ = np.histogram(draws, bins=100, range=(0, 1))
        # chi-square, 99 degrees of freedom: 148.2 is the 0.999 quantile
        assert ((counts - n / 100) ** 2 / (n / 100)).sum() < 148.2
    assert abs(np.corrcoef(across_seeds[:-1], across_seeds[1:])[0, 1]) < 0.02
    assert abs(np.corrcoef(across_positions[:-1], across_positions[1:])[0, 1]) < 0.02


def test_uniforms_are_frozen_and_negative_seeds_are_seeds() -> None:
    draws = uniforms(np.array([0, 1, seed_bits(-1)], np.uint64), np.array([0, 5, 2**40]))
    assert draws.tolist() == [0.6524484863740322, 0.7743991716672016, 0.5440041384053076]
    assert len(set(draws.tolist())) == 3
    assert seed_bits(-1) == 2**64 - 1


@pytest.mark.parametrize("temperature", [0.5, 1.0, 1.7])
def test_frequencies_follow_the_tempered_distribution(temperature: float) -> None:
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0, 0.5, -30.0]])
    n = 40_000
    draws = uniforms(np.arange(n, dtype=np.uint64) * np.uint64(1_000_003), np.arange(n) % 50)
    counts = np.bincount(_choose(logits, temperature, 1.0, draws), minlength=6)
    expected = (logits[0].double() / temperature).softmax(-1).numpy() * n
    assert counts[5] == 0
    # chi-square, 4 degrees of freedom: 18.5 is the 0.999 quantile
    assert ((counts[:5] - expected[:5]) ** 2 / expected[:5]).sum() < 18.5


def test_rows_do_not_depend_on_each_other() -> None:
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(32, 50, generator=generator)
    temperature = np.tile([0.0, 0.6, 1.0, 1.3], 8)
    top_p = np.tile([1.0, 0.9, 1.0, 0.5, 0.95], 7)[:32]
    draws = uniforms(np.arange(32, dtype=np.uint64), np.arange(32))
    together, logprobs = choose(logits, temperature, top_p, draws)
    order = np.random.default_rng(0).permutation(32)
    shuffled, _ = choose(logits[torch.from_numpy(order)], temperature[order], top_p[order], draws[order])
    assert (shuffled == together[order]).all()
    for row in range(32):
        one = slice(row, row + 1)
        token, logprob = choose(logits[one], temperature[one], top_p[one], draws[one])
        assert token[0] == together[row]
        assert logprob[0] == pytest.approx(logprobs[row], abs=1e-6)


def test_log_probability_is_tempered_and_unfiltered_and_greedy_takes_the_largest() -> None:
    logits = torch.randn(5, 11, generator=torch.Generator().manual_seed(0)) * 3
    for temperature, top_p in ((0.0, 1.0), (0.3, 0.5), (2.0, 0.9)):
        reference = (logits.double() / (temperature or 1.0)).log_softmax(-1)
        tokens, logprobs = choose(logits, np.full(5, temperature), np.full(5, top_p), np.linspace(0, 0.99, 5))
        assert logprobs == pytest.approx(reference[np.arange(5), tokens].numpy(), abs=1e-6)
        if temperature == 0:
            assert (tokens == logits.argmax(-1).numpy()).all()


@pytest.mark.parametrize("top_p", [0.05, 0.3, 0.62, 0.9, 0.999, 1.0])
def test_nucleus_is_the_smallest_set_that_reaches_top_p(top_p: float) -> None:
    probs = torch.randn(40, 9, generator=torch.Generator().manual_seed(1)).mul(2).softmax(-1)
    kept, order = nucleus(probs, torch.full((40,), top_p, dtype=torch.float64))
    for row in range(40):
        ranked = sorted(range(9), key=lambda token: (-probs[row, token].item(), token))
        mass, expected = 0.0, []
        for token in ranked:
            if mass >= top_p:
                break
            expected.append(token)
            mass += probs[row, token].item()
        assert order[row][kept[row] > 0].tolist() == expected


def test_a_nucleus_that_reaches_top_p_exactly_is_whole() -> None:
    kept, _ = nucleus(torch.tensor([[0.25, 0.5, 0.25]]), torch.tensor([0.5], dtype=torch.float64))
    assert kept.tolist() == [[0.5, 0.0, 0.0]]


def test_top_p_frequencies_are_renormalised_inside_the_set() -> None:
    probs = np.array([0.5, 0.3, 0.15, 0.05])
    draws = uniforms(np.arange(20_000, dtype=np.uint64), np.zeros(20_000, np.int64))
    counts = np.bincount(_choose(torch.tensor(probs).log()[None], 1.0, 0.75, draws), minlength=4)
    assert counts[2:].sum() == 0
    assert counts[0] / counts.sum() == pytest.approx(0.5 / 0.8, abs=0.012)


def test_extreme_draws_stay_inside_the_support() -> None:
    logits = torch.tensor([[-200.0, 0.0, 0.0, -200.0]])
    tokens = _choose(logits, 1.0, 1.0, np.array([0.0, 1 - 2.0**-53]))
    assert tokens.tolist() == [1, 2]
