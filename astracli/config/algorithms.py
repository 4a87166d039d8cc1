"""The algorithms by name, and what each one's source uses where it differs from `AlgorithmTable`."""

from __future__ import annotations

from typing import Any

ALGORITHMS: dict[str, dict[str, Any]] = {
    "m2po": {},
    "grpo": {},
    "dapo": {"clip_low": 0.2, "clip_high": 0.28, "overlong_fraction": 0.2},
    "dr_grpo": {"advantage": "mean"},
    "gspo": {"clip_low": 3e-4, "clip_high": 4e-4},
    "cispo": {"clip_high": 4.0},
    "decoupled": {"weight_cap": 5.0},
    "tis": {"weight_cap": 2.0},
}
"""Name -> its own defaults, filled in where a recipe says nothing. `astracli/rl/losses/NAME.py` holds the algorithm."""
