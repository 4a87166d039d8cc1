"""What the figures of a run are called for people. One figure has one name everywhere: in the live view, the report,
the status page and the messages; docs/run-directory.md says what each counts.

`reward` is that of all groups that arrived, dropped ones included: what the model earns now. `reward_mean`, of the
trained batch, leaves out groups whose samples earned the same.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

REWARD = "arrived_reward_mean"
"""The metric that is called reward."""


class Figure(NamedTuple):
    words: str
    unit: str = ""
    form: str = "{:.3g}"


FIGURES: dict[str, Figure] = {
    REWARD: Figure("reward", "all that arrived"),
    "reward_mean": Figure("reward of the trained batch", "dropped groups left out"),
    "step_s": Figure("seconds a step", "", "{:.2f}"),
    "tokens_per_s": Figure("trained tokens a second", "tokens/s", "{:,.0f}"),
    "rollout_tokens_per_s": Figure("generated tokens a second", "tokens/s, an engine", "{:,.0f}"),
    "staleness_mean": Figure("staleness", "versions, mean", "{:.2f}"),
    "parity_mean_abs": Figure("trainer against engine", "|log p|, mean", "{:.1e}"),
    "ratio_mean": Figure("ratio policy / behaviour", "mean", "{:.4f}"),
    "clip_fraction": Figure("clipped tokens", "share", "{:.2%}"),
    "kl": Figure("KL to the initial model", "nats"),
    "loss": Figure("loss", "", "{:.4g}"),
    "epoch": Figure("epoch", "examples seen / examples", "{:.2f}"),
    "entropy": Figure("entropy", "nats a token"),
    "grad_norm": Figure("gradient norm", "mean over updates"),
    "lr": Figure("learning rate", "", "{:g}"),
    "completion_tokens_mean": Figure("completion length", "tokens, mean", "{:.1f}"),
    "length_stop_fraction": Figure("cut off at the token limit", "share of the trained batch", "{:.1%}"),
    "delta_density": Figure("changed weights", "share", "{:.2%}"),
    "delta_bytes": Figure("delta", "bytes", "{:,.0f}"),
    "full_bytes": Figure("full version", "bytes", "{:,.0f}"),
    "pause_s": Figure("engine pause", "s", "{:.3f}"),
}


def words(name: str) -> str:
    """What a metric is called; its own name when it is none of these."""
    return FIGURES[name].words if name in FIGURES else name


def said(name: str, value: float) -> str:
    """`reward 0.412`"""
    return f"{words(name)} {FIGURES.get(name, Figure(name)).form.format(value)}"


def recent(history: Sequence[tuple[int, Mapping[str, float]]]) -> list[str]:
    """Lines with reward, entropy, gradient norm and learning rate of the last steps, for the message of a run that
    ends. `history`: (step, metrics)."""
    lines = []
    for name in (REWARD, "entropy", "grad_norm", "lr"):
        points = [f"step {step} {figures[name]:.3g}" for step, figures in history if name in figures]
        if points:
            lines.append(f"{words(name)}: {', '.join(points)}")
    return lines
