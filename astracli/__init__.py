"""Post-training of language models with RL on verifiable rewards. The command is `astra`.

The same from Python (docs/recipes-howto.md): `load`, `train`, `resume`, `evaluate`, `list_runs`, `compare` and `Run`.
Importing this package imports nothing else; a name is looked up when it is used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from astracli.config.recipe import Recipe
    from astracli.errors import AstraError, RunFailed, UserError
    from astracli.launch.api import Run, compare, evaluate, list_runs, load, resume, sft, train

__all__ = [
    "AstraError", "Recipe", "Run", "RunFailed", "UserError", "compare", "evaluate", "list_runs", "load", "resume",
    "sft", "train",
]  # fmt: skip

_HOME = {
    "Recipe": "astracli.config.recipe",
    **dict.fromkeys(("AstraError", "RunFailed", "UserError"), "astracli.errors"),
    **dict.fromkeys(
        ("Run", "compare", "evaluate", "list_runs", "load", "resume", "sft", "train"), "astracli.launch.api"
    ),
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module `astracli` has no attribute `{name}`")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
