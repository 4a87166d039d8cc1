"""Memory of the process of a reward: address space, which `data.reward_memory_gib` limits, and what it holds of it.

    python bench/grading/reward_memory.py

A row a reward: built in, plain Python, sympy with numpy, torch, a model of transformers (the shipped tiny one). Each
grades one completion; the figures are the most that its process ever had.
"""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path
from typing import Any

import psutil

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from shared import folder, options, show

from astracli.data.fetch import BUNDLED_PREFIX, bundled
from astracli.rewards.grade_process import RewardSetting
from astracli.rewards.pool import GradePool, Rewards
from astracli.rewards.types import GradeItem

OWN = {
    "plain": "def reward(completion):\n    return 1.0\n",
    "with_sympy": "import numpy, sympy\ndef reward(completion):\n    return float(sympy.sympify('1+1') == 2)\n",
    "with_torch": "import torch\ndef reward(completion):\n    return float(torch.ones(9).sum() > 0)\n",
    "with_model": "from transformers import AutoModelForCausalLM\nmodel = AutoModelForCausalLM.from_pretrained(TINY)\n"
    "def reward(completion):\n    return 1.0\n",
}  # fmt: skip
BUILT_IN = ("number", "math", "code")
ANSWER = "```python\nx = 2\n```\nThe answer is \\boxed{\\frac{\\sqrt{2}}{2}}."
ITEM = GradeItem("What is sin 45?", "\\frac{1}{\\sqrt{2}}", ANSWER, row={"tests": ["assert x == 2"]})
"""Only math-verify finds the two equal."""


def measured(spec: str) -> dict[str, Any]:
    with GradePool(rewards=Rewards([RewardSetting(spec, timeout_s=60.0)])) as pool:
        (grade,) = pool.grade([ITEM])
        held = [_most(process.pid) for process in psutil.Process().children(recursive=True)]
    space, resident = (max(column) for column in zip(*held, strict=True))
    return {"reward": spec, "verdict": grade.verdict, "address_space_mib": space, "resident_mib": resident}


def _most(pid: int) -> tuple[int, int]:
    """MiB of address space, and of memory, that a process had at most."""
    found = dict(re.findall(r"(\w+):\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text()))
    return int(found["VmPeak"]) >> 10, int(found["VmHWM"]) >> 10


def main() -> None:
    args = options(__doc__).parse_args()
    with folder() as place:
        for name, text in OWN.items():
            (place / f"{name}.py").write_text(text.replace("TINY", repr(str(bundled(f"{BUNDLED_PREFIX}tiny")))))
        sys.path.insert(0, str(place))
        os.environ["PYTHONPATH"] = os.pathsep.join([str(place), os.environ.get("PYTHONPATH", "")])
        rows = [measured(spec) for spec in (*BUILT_IN, *(f"{name}:reward" for name in OWN))]
    show(args, {"rows": rows})


if __name__ == "__main__":
    main()
