"""Figures of merit of repeated sampling: avg@n with its standard error, and the unbiased pass@k.

pass@k of one item with c right of n samples is 1 - C(n-c, k) / C(n, k), the share of k-subsets that hold a right one
(Chen et al. 2021, arXiv 2107.03374). All figures are fractions in [0, 1].
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

Z95 = 1.96
"""Standard errors on either side that hold 95 % of a normal distribution."""


def pass_at_k(n: int, c: int, k: int) -> float:
    """Probability that k of the n samples, drawn without replacement, hold at least one of the c right ones."""
    if not (0 <= c <= n and 1 <= k <= n):
        raise ValueError(f"pass@{k} of {c} right among {n} samples")
    return 1.0 - math.comb(n - c, k) / math.comb(n, k)


def interval(mean: float, stderr: float, items: int) -> tuple[float, float]:
    """95 % interval of a share, inside [0, 1]: Wilson's, for as many draws as the standard error is worth.

    That number is mean (1 - mean) / stderr^2; without a spread over items it is `items`, so that 0 of 30 right says
    0 to 0.114 and not 0 to 0. Source: Wilson 1927, with the effective sample size of Korn and Graubard 1998.
    """
    draws = mean * (1.0 - mean) / stderr**2 if stderr > 0.0 else float(items)
    middle = (mean + Z95**2 / (2 * draws)) / (1 + Z95**2 / draws)
    half = Z95 / (1 + Z95**2 / draws) * math.sqrt(mean * (1 - mean) / draws + Z95**2 / (4 * draws**2))
    return max(0.0, middle - half), min(1.0, middle + half)


@dataclass(frozen=True)
class Score:
    """One benchmark's result."""

    items: int
    n: int
    """Samples per item."""
    avg_at_n: float
    """Mean over items of the share of right samples."""
    stderr: float
    """Standard error of `avg_at_n` over items: sd (unbiased) / sqrt(items); 0 for a single item."""
    k: int
    pass_at_k: float
    pass_at: tuple[float, ...] = ()
    """pass@1 to pass@n; empty in an overall score of benchmarks with different n."""

    @property
    def interval(self) -> tuple[float, float]:
        """95 % interval of `avg_at_n`, see `interval`."""
        return interval(self.avg_at_n, self.stderr, self.items)


def score(right: Sequence[Sequence[bool]], k: int) -> Score:
    """Score of right[item][sample]; every item has the same number of samples. `k` is cut to that number.

    Raises ValueError without items, or with ragged ones.
    """
    sizes = {len(samples) for samples in right}
    if len(sizes) != 1 or sizes == {0}:
        raise ValueError(f"{len(right)} items with {sorted(sizes)} samples")
    (n,) = sizes
    k = min(k, n)
    counts = [sum(map(bool, samples)) for samples in right]
    shares = [c / n for c in counts]
    spread = statistics.stdev(shares) / math.sqrt(len(shares)) if len(shares) > 1 else 0.0
    passed = tuple(statistics.fmean(pass_at_k(n, c, size) for c in counts) for size in range(1, n + 1))
    return Score(len(right), n, statistics.fmean(shares), spread, k, passed[k - 1], passed)


def overall(scores: Sequence[Score]) -> Score:
    """Unweighted mean over benchmarks: each counts the same, however many items it has. Raises ValueError without any.

    `items` is the sum; `n` and `k` are the smallest among them (the benchmarks' own rows say theirs).
    """
    if not scores:
        raise ValueError("no benchmarks")
    same_n = len({len(s.pass_at) for s in scores}) == 1
    return Score(
        items=sum(s.items for s in scores),
        n=min(s.n for s in scores),
        avg_at_n=statistics.fmean(s.avg_at_n for s in scores),
        stderr=math.sqrt(sum(s.stderr**2 for s in scores)) / len(scores),
        k=min(s.k for s in scores),
        pass_at_k=statistics.fmean(s.pass_at_k for s in scores),
        pass_at=tuple(map(statistics.fmean, zip(*(s.pass_at for s in scores), strict=True))) if same_n else (),
    )
