"""Rewards: what is graded, what comes of it, and the pool of processes that does it."""

from astracli.rewards.builtin import BUILTIN, probe_grades
from astracli.rewards.pool import GradePool, Rewards, open_pools, validate_reward, validate_rewards
from astracli.rewards.types import Grade, GradeItem

__all__ = [
    "BUILTIN",
    "Grade",
    "GradeItem",
    "GradePool",
    "Rewards",
    "open_pools",
    "probe_grades",
    "validate_reward",
    "validate_rewards",
]
