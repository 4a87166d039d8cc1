"""Grading: the processes that are killed, the user's own rewards, and the speed. The rules: test_grading."""

import asyncio
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from children import children, kill

from astracli.errors import RunFailed, UserError
from astracli.rewards.reward import GradeItem, GradePool, probe_grades, validate_reward

HOSTILE = "\\boxed{\\sum_{n=1}^{10^{9}} n^{1000}}"
"""Only math-verify reads it, and it adds a milliard powers."""


def items(*pairs: tuple[str, str]) -> list[GradeItem]:
    return [GradeItem("", gold, text) for gold, text in pairs]


def test_integer_answers_need_no_algebra_library() -> None:
    code = (
        "import sys; from astracli.rewards.grade_worker import grade_math\n"
        "print(grade_math('math', ['', '82', r'\\boxed{82}'], print).state,"
        " [m for m in ('torch', 'numpy', 'sympy', 'pydantic') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split("\n")[0] == "right []"


def test_a_hostile_answer_costs_its_time_limit_and_its_neighbours_nothing() -> None:
    batch = items(
        ("1", "\\boxed{1}"), ("2", HOSTILE), ("3", "\\boxed{3}"), ("1/2", "\\boxed{0.5}"), ("4", "\\boxed{5}")
    )
    with GradePool(timeout_s=2.0) as pool:
        pool.grade(items(("2", "\\boxed{4/2}")))  # algebra is loaded from here on
        started = time.monotonic()
        grades = pool.grade(batch)
        took = time.monotonic() - started
        assert [g.verdict for g in grades] == ["right", "timeout", "right", "right", "wrong"]
        assert [g.reward for g in grades] == [1.0, 0.0, 1.0, 1.0, 0.0]
        assert 2.0 <= took < 60.0
        assert pool.counts == {"right": 4, "timeout": 1, "wrong": 1}


def test_a_killed_process_loses_nothing() -> None:
    before = children()
    with GradePool() as pool:
        assert pool.grade(items(("1", "\\boxed{1}")))[0].verdict == "right"
        (child,) = children() - before
        kill(child)
        assert [g.verdict for g in pool.grade(items(("1", "\\boxed{1}"), ("2", "\\boxed{3}")))] == ["right", "wrong"]


def test_closing_ends_processes_and_what_they_grade() -> None:
    before, pool = children(), GradePool(timeout_s=60.0)
    pool.grade(items(("1", "\\boxed{1}")))
    assert children() > before
    failures: list[BaseException] = []

    def grade() -> None:
        try:
            pool.grade(items(("2", HOSTILE), ("2", HOSTILE)))
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=grade)
    thread.start()
    time.sleep(0.3)
    pool.close()
    thread.join(60)
    assert [type(f) for f in failures] == [RunFailed]
    assert children() == before
    with pytest.raises(RunFailed):
        pool.grade(items(("1", "1")))


def test_a_worker_ends_when_its_owner_is_gone() -> None:
    code = (
        "import os, time; from astracli.rewards.reward import *\n"
        "pool = GradePool(); pool.grade([GradeItem('', '1', '1')])\n"
        "print(pool._graders[0]._drivers[0].process.sandbox.pid(), flush=True); os.kill(os.getpid(), 9)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    pid = int(done.stdout)
    deadline = time.monotonic() + 60
    while _alive(pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not _alive(pid)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    stat = Path(f"/proc/{pid}/stat")
    return not (stat.exists() and stat.read_text().rsplit(")", 1)[1].split()[0] == "Z")


def test_asyncio_and_several_workers_keep_the_order() -> None:
    batch = items(*[(str(i), f"\\boxed{{{i + i % 3 // 2}}}") for i in range(500)])

    async def both() -> tuple[list[str], list[str]]:
        with GradePool(workers=2) as pool:
            first, second = await asyncio.gather(pool.agrade(batch), pool.agrade(batch[:7]))
        return [g.verdict for g in first], [g.verdict for g in second]

    expected = ["wrong" if i % 3 == 2 else "right" for i in range(500)]
    assert asyncio.run(both()) == (expected, expected[:7])


def test_speed_on_short_integer_answers() -> None:
    batch = items(*[(str(i), f"12 08 \\boxed{{{i + i % 2}}}") for i in range(4000)])
    with GradePool() as pool:
        pool.grade(batch[:1])
        started = time.monotonic()
        grades = pool.grade(batch)
        per_s = len(batch) / (time.monotonic() - started)
    assert sum(g.verdict == "right" for g in grades) == 2000
    assert per_s > 1000, per_s


REWARDS = """
import time

def length(problem, answer, completion):
    print("prints go to the log, not into the frames")
    return len(completion) / 10

def two(problem, anser):
    return 1.0

constant = 3
"""


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A little package with a reward and its entry point, really installed."""
    source = tmp_path / "source"
    source.mkdir()
    (source / "moodlib.py").write_text(REWARDS)
    (source / "pyproject.toml").write_text(
        '[build-system]\nrequires = ["setuptools"]\nbuild-backend = "setuptools.build_meta"\n'
        '[project]\nname = "moodlib"\nversion = "1"\n'
        '[project.entry-points."astra.rewards"]\nlength = "moodlib:length"\n'
        '[tool.setuptools]\npy-modules = ["moodlib"]\n'
    )
    target = tmp_path / "site"
    command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([*command, "--target", str(target), str(source)], check=True, stdin=subprocess.DEVNULL)
    monkeypatch.setenv("PYTHONPATH", str(target))


def test_own_rewards_by_entry_point_and_by_name(installed: None) -> None:
    for spec in ("length", "moodlib:length"):
        validate_reward(spec)
        with GradePool(spec) as pool:
            found = pool.grade(items(("", "12345"), ("", "")))
        assert [(g.reward, g.verdict) for g in found] == [(0.5, "wrong"), (0.0, "wrong")]
    for spec, message in (
        ("moodlib:nothing", "`moodlib` has no `nothing`"),
        ("moodlib:constant", "is no function but int"),
        ("moodlib:two", r"parameter `anser`, which is no column of the data \(columns: `level`\)"),
        ("nolib:f", "importing `nolib` failed: ModuleNotFoundError"),
        ("moodlib:", "not of the form"),
        ("lenght", "there is no reward `lenght`"),
    ):
        with pytest.raises(UserError, match=message):
            validate_reward(spec, ["level"])
    with pytest.raises(UserError) as caught:
        validate_reward("lenght")
    assert "did you mean `length`?" in str(caught.value.hint)
    with GradePool("lenght") as pool, pytest.raises(UserError, match="there is no reward"):
        pool.grade(items(("", "x")))


def test_a_reward_that_ends_its_process_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "ends.py").write_text("import os\nos._exit(9)\n")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="reward `ends:f` died while it started: exit code 9"):
        validate_reward("ends:f")


def test_builtin_rewards_validate_without_a_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subprocess, "Popen", lambda *_, **__: pytest.fail("a process was started"))
    for spec in ("math", "math_boxed", "probe"):
        validate_reward(spec)


def test_probe_rewards_the_upper_half_of_a_group() -> None:
    group = [GradeItem("", "", "", tokens) for tokens in ([2, 4], [2, 3], [1, 3], [1, 3, 5, 2])]
    # shares of even ids 1, 1/2, 0, 1/4; median 3/8
    assert [g.reward for g in probe_grades(group)] == [1.0, 1.0, 0.0, 0.0]
    # of three the median is one of them: 0, 1/2, 1
    odd = [GradeItem("", "", "", tokens) for tokens in ([1], [1, 2], [2])]
    assert [g.reward for g in probe_grades(odd)] == [0.0, 1.0, 1.0]
    with GradePool("probe") as pool:
        assert [g.verdict for g in pool.grade(group)] == ["right", "right", "wrong", "wrong"]
    with pytest.raises(ValueError, match="token ids"):
        probe_grades(items(("", "")))
