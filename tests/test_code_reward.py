"""Rewards `code` and `code_share`: programs against unit tests, and programs that do what they should not."""

from pathlib import Path
from typing import Any

import pytest

from astracli.rewards.code import program
from astracli.rewards.grade_process import RewardSetting
from astracli.rewards.reward import Grade, GradeItem, GradePool, Rewards

ADD = "Here it is:\n```python\ndef add(a, b):\n    return a + b\n```\nDone."
DOUBLE = "```\nprint(int(input()) * 2)\n```"
LIMITS = {"tests": "tests", "memory_gib": 0.5, "file_mb": 1.0, "processes": 8}


def grades(*pairs: tuple[str, dict[str, Any]], spec: str = "code", timeout_s: float = 20.0, **more: Any) -> list[Grade]:
    setting = RewardSetting(spec, timeout_s=timeout_s, code=LIMITS | more)
    with GradePool(rewards=Rewards([setting])) as pool:
        return pool.grade([GradeItem("", row.pop("answer", ""), text, None, (), row) for text, row in pairs])


def test_the_last_python_block_counts() -> None:
    assert program("```python\na\n```\ntext\n```py\nb\n```\n```bash\nc\n```") == "b\n"
    assert program("<think>```\na\n```</think> no code") is None
    assert program("```python\nnever closed") is None


def test_forms_of_tests() -> None:
    check = "def check(candidate):\n    assert candidate(1, 2) == 3\n    assert candidate(0, 0) == 0\n"
    found = grades(
        (ADD, {"tests": ["assert add(1, 2) == 3", "assert add(1, 1) == 2"]}),
        (ADD, {"tests": ["assert add(1, 2) == 3", "assert add(1, 1) == 3"]}),
        (ADD, {"tests": check, "entry_point": "add"}),
        (ADD, {"answer": "assert add(2, 2) == 4"}),
        (ADD, {"answer": '["assert add(2, 2) == 5"]'}),
        (ADD, {"tests": {"inputs": [[1, 2], [3, 4]], "outputs": [3, 7], "fn_name": "add"}}),
        (DOUBLE, {"tests": '{"inputs": ["2\\n", "21"], "outputs": ["4", "42\\n"]}'}),
        ("no code", {"tests": ["assert True"]}),
        (ADD, {}),
    )
    verdicts = ["right", "wrong", "right", "right", "wrong", "right", "right", "no_answer", "error"]
    assert [g.verdict for g in found] == verdicts
    assert [g.reward for g in found] == [float(v == "right") for v in verdicts]
    assert found[1].parts == {"tests_passed": 0.5} and "AssertionError" in found[1].detail
    assert "no tests in `tests`" in found[-1].detail


def test_the_share_of_tests() -> None:
    tests = ["assert add(1, 2) == 3", "assert add(1, 1) == 3", "import sys; sys.exit()", "assert add(0, 1) == 1"]
    (found,) = grades((ADD, {"tests": tests}), spec="code_share")
    assert (found.reward, found.verdict) == (0.5, "wrong")


def test_a_program_cannot_pass_by_ending_or_breaking_the_runner(tmp_path: Path) -> None:
    tests = {"tests": ["assert add(1, 2) == 3"]}
    tricks = [
        "import os; os._exit(0)",
        "import sys; sys.exit(0)",
        "print('0' * 32, 0)",
        "def add(a, b):\n    import os; os._exit(0)",
        "raise SystemExit(0)",
        "import os; os.close(0); os.close(1); os.close(2)",
    ]
    found = grades(*((f"```python\n{trick}\n```", dict(tests)) for trick in tricks))
    assert {(g.reward, g.verdict) for g in found} == {(0.0, "wrong")}
    # what it defined before its own exception is still tested
    (kept,) = grades(("```python\ndef add(a, b):\n    return a + b\nadd(1)\n```", dict(tests)))
    assert kept.verdict == "right"


def test_a_limit_makes_a_program_wrong_and_the_next_is_graded() -> None:
    fine = {"tests": ["assert True"]}
    bad = [
        "while True: pass",
        "x = bytearray(1 << 30)\nok = 1",
        "import os\nwhile True: os.fork()",
        "open('f', 'wb').write(b'x' * 2_000_000)\nok = 1",
    ]
    tests = [dict(fine), {"tests": ["assert ok"]}, dict(fine), {"tests": ["assert ok"]}]
    pairs = [(f"```python\n{code}\n```", row) for code, row in zip(bad, tests, strict=True)]
    found = grades(*pairs, (ADD, dict(fine)), timeout_s=2.0)
    assert [g.verdict for g in found] == ["wrong"] * 4 + ["right"]
    reasons = ["passed its time limit", "MemoryError", "too many processes", "File too large"]
    assert all(reason in g.detail for reason, g in zip(reasons, found[:4], strict=True)), [g.detail for g in found]


def test_a_program_sees_an_empty_directory_and_none_of_our_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET_TOKEN", "x")
    code = "import os\nfound = [os.listdir('.'), 'SECRET_TOKEN' in os.environ, os.environ['HOME'] == os.getcwd()]"
    (found,) = grades((f"```python\n{code}\n```", {"tests": ["assert found == [[], False, True], found"]}))
    assert found.verdict == "right", found.detail
