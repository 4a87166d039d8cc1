"""Tests use what is public. The exceptions stand here with their reasons; the list may only shrink."""

from __future__ import annotations

import ast
from collections import Counter
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
OTHERS = {
    "_exit", "_schema", "_cdata", "_python_dispatch", "_attn_implementation", "_forward_pre_hooks", "_distributed_args",
}  # fmt: skip
"""Names of Python, torch, transformers and vLLM that have no public counterpart."""

ALLOWED = {
    "test_hub_curriculum.py": 1,  # `_weight`: the ends of the band, which counts of draws cannot tell apart
    "test_launches.py": 1,  # `_norm`: one kernel, run without a GPU
    "test_single_rank.py": 1,  # `_away`: bytes that wait on the host
    "test_supervise.py": 1,  # `_looked`: the supervisor's own clock stands still
    "test_weights_changes.py": 4,  # Triton kernels, compiled without a GPU
    "test_weights_gpu.py": 1,  # `_triton`: which of two ways a digest takes
    "test_weights_transfer.py": 2,  # `_source`, `_await`: a listing that is out of date
}


def private(name: object) -> bool:
    return isinstance(name, str) and name.startswith("_") and not name.startswith("__") and name not in OTHERS


def uses(source: str) -> int:
    """Private attributes that are read, set, patched by name or imported; an object's own are no others'."""
    count = 0
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Attribute) and private(node.attr):
            count += not (isinstance(node.value, ast.Name) and node.value.id in ("self", "cls"))
        elif isinstance(node, ast.ImportFrom):
            count += sum(private(name.name) for name in node.names)
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and len(node.args) > 1:
            patches = node.func.attr in ("setattr", "delattr", "object") and isinstance(node.args[1], ast.Constant)
            count += patches and private(node.args[1].value)  # type: ignore[attr-defined]
    return count


def test_no_test_but_these_uses_what_is_private() -> None:
    found = Counter({path.name: uses(path.read_text()) for path in sorted(TESTS.rglob("*.py"))})
    assert +found == ALLOWED, "fewer: shorten the list; more: use what is public"


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("a._b", 1),
        ("a.b._c = self._d", 1),
        ("from a import _b, c", 1),
        ("m.setattr(a, '_b', 1)", 1),
        ("os._exit(1); a.__class__; m.setattr(a, 'b', '_c')", 0),
    ],
)
def test_what_counts(source: str, expected: int) -> None:
    assert uses(source) == expected
