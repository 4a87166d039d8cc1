"""Do trainer and engine agree? Measured at every step, on the tokens that the engine drew under the trainer's weights.

On those tokens both should give the same log-probability. A difference comes from another kernel's rounding, or from a
wrong weight. Per token, with r = trainer's probability / engine's: |log r|, the ratio r, and two estimates of
KL(engine || trainer), k1 = -log r and k3 = r - 1 - log r (http://joschu.net/blog/kl-approx.html). Shape letter: N
tokens.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from astracli.errors import RunFailed
from astracli.training.fsdp import Ranks

ENOUGH_TOKENS = 64
"""Fewer tokens are judged as if they were this many, because single tokens differ far more than the mean: on a GPU one
differed by 0.46 where the mean was 0.0024."""
TIMES_NOISE = 2.0
"""The engine may differ from the trainer by this many times what rounding alone changes (`RowCheck.logprob_noise`)."""
CEILING = 0.1
"""The largest tolerance that this may give."""


@dataclass
class Agreement:
    """Sums over tokens of the trainer's own version, on one rank."""

    tokens: int = 0
    largest: float = 0.0
    sums: list[float] = field(default_factory=lambda: [0.0] * 4)
    """|log r|, r, k1, k3"""
    _unread: list[Tensor] = field(default_factory=list)
    """Of each micro-batch its sums and its largest, on the device."""

    @torch.no_grad()
    def add(self, log_ratio_N: Tensor) -> None:
        """`log_ratio_N`: trainer's log-probability - engine's, of such tokens only. Does not wait for the device."""
        if not len(log_ratio_N):
            return
        log_N = log_ratio_N.double()
        ratio_N = log_N.exp()
        parts = (log_N.abs(), ratio_N, -log_N, ratio_N - 1.0 - log_N)
        self._unread.append(torch.stack([*(part.sum() for part in parts), parts[0].max()]))
        self.tokens += len(log_N)

    def _read(self) -> None:
        """Add what is still on the device. Waits for it."""
        unread, self._unread = self._unread, []
        for *sums, largest in torch.stack(unread).tolist() if unread else ():
            self.sums = [total + part for total, part in zip(self.sums, sums, strict=True)]
            self.largest = max(self.largest, largest)

    def over(self, ranks: Ranks) -> Agreement:
        """The sums of all ranks together. A collective."""
        self._read()
        tokens, *sums = ranks.sum([float(self.tokens), *self.sums])
        (largest,) = ranks.max([self.largest])
        return Agreement(int(tokens), largest, sums)

    @property
    def figures(self) -> dict[str, float]:
        """The step's metrics; {} when no token was of the trainer's version."""
        if not self.tokens:
            return {}
        self._read()
        absolute, ratio, k1, k3 = (total / self.tokens for total in self.sums)
        return {
            "parity_mean_abs": absolute,
            "parity_max_abs": self.largest,
            "parity_kl": k3,
            "parity_kl_k1": k1,
            "parity_ratio_mean": ratio,
            "parity_tokens": float(self.tokens),
        }

    def within(self, tolerance: float) -> bool:
        """Whether the mean |difference| is at most `tolerance`. A mean that is not a number is not."""
        self._read()
        return not self.tokens or self.sums[0] / self.tokens <= self._allowed(tolerance)

    def _allowed(self, tolerance: float) -> float:
        return tolerance * max(1.0, ENOUGH_TOKENS / self.tokens)

    def require(self, tolerance: float, version: int) -> None:
        """Raise RunFailed when the mean |difference| is over `tolerance`."""
        if not self.within(tolerance):
            mean, allowed = self.sums[0] / self.tokens, self._allowed(tolerance)
            raise RunFailed(
                f"trainer and engine disagree at version {version}: mean |log-probability difference| {mean:.2e}, "
                f"largest {self.largest:.2e}, over {self.tokens} tokens of that version; allowed mean {allowed:.1e}",
                "the engine's weights or kernels are not the trainer's; compare them with `astra doctor`, or raise "
                "train.parity_tolerance if the difference is understood",
            )
