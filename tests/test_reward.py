"""Grading: the rules, the processes that are killed, the user's own rewards, and the speed."""

import asyncio
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from astracli.errors import RunFailed, UserError
from astracli.rl import answer_forms, grader
from astracli.rl.reward import GradeItem, GradePool, grade_all, probe_grades, validate_reward

FIXTURES = Path(__file__).parent / "fixtures"
HOSTILE = "\\boxed{9^{9^{9^{9}}}}"


def items(*pairs: tuple[str, str]) -> list[GradeItem]:
    return [GradeItem("", gold, text) for gold, text in pairs]


@pytest.mark.parametrize(
    ("gold", "text", "verdict"),
    [
        ("82", "12 08 \\boxed{82}", "right"),
        ("82", "12 08 \\boxed{082}", "right"),
        ("82", "12 08 \\boxed{ +82 }", "right"),
        ("1024", "\\boxed{1,024}", "right"),
        ("1024", "\\boxed{1{,}024}", "right"),
        ("12", "\\boxed{1,2}", None),
        ("-3", "x = -\\boxed{3}", "right"),
        ("3", "7 - 4 is 3, so \\boxed{3}", "right"),
        ("0", "\\boxed{-0}", "right"),
        ("82", "\\boxed{83}", "wrong"),
        ("82", "first \\boxed{82}, no: \\boxed{83}", "wrong"),
        ("83", "first \\boxed{82}, no: \\boxed{83}", "right"),
        ("82", "\\boxed{82", "no_answer"),
        ("82", "\\boxed{82} then \\boxed{8", "no_answer"),
        ("82", "\\boxed{}", "no_answer"),
        ("82", "", "no_answer"),
        ("82", "+ - =", "no_answer"),
        ("82", "12 08 82", "right"),
        ("5", "so the result is $\\sqrt{5}$", None),
        ("9" * 6000, "\\boxed{" + "9" * 6000 + "}", "right"),
        ("\\frac{1}{2}", "\\boxed{\\frac{1}{2}}", "right"),
        ("2", "\\boxed{\\frac{4}{2}}", None),
    ],
)
def test_quick_rules(gold: str, text: str, verdict: str | None) -> None:
    assert grader.quick(gold, text) == verdict


@pytest.mark.parametrize(
    ("gold", "text", "verdict"),
    [
        ("2", "\\boxed{\\frac{4}{2}}", "right"),
        ("0.5", "\\boxed{\\frac12}", "right"),
        ("4.5 \\times 10^{33}", "\\boxed{4.5 \\times 10^{33}}", "right"),
        ("\\left( 3, \\frac{\\pi}{2} \\right)", "\\boxed{(3, \\pi/2)}", "right"),
        ("(1,2)", "\\boxed{(2,1)}", "wrong"),
        ("5", "so the result is $\\sqrt{5}$", "wrong"),
        ("{1,2}", "both \\boxed{1} and \\boxed{2}", "right"),
        ("x+1", "The answer is $1+x$.", "right"),
        ("50", "\\boxed{50.0\\%}", "right"),
        ("50", "\\boxed{0.5}", "wrong"),
        ("[3, 5]", "\\boxed{3, 5}", "right"),
        ("[3, 5]", "\\boxed{5, 3}", "wrong"),
        ("[1, 2]", "\\boxed{(1, 2)}", "wrong"),
        ("(1, 2)", "\\boxed{1 < x < 2}", "right"),
        ("(1, 2)", "\\boxed{1 \\le x < 2}", "wrong"),
        ("4.5e33", "\\boxed{4.5 \\times 10^{33}}", "right"),
        ("1.04e-3", "\\boxed{1.04 \\times 10^{3}}", "wrong"),
        ("B", "\\boxed{\\textbf{(B)}\\ 12}", "right"),
        ("(B)", "\\boxed{B. twelve}", "right"),
        ("B", "\\boxed{\\text{(C)}}", "wrong"),
        ("B", "\\boxed{Bob}", "wrong"),
        ("A", "\\boxed{\\text{A}pple}", "wrong"),
        ("\\frac{\\sqrt{3}}{3}", "\\boxed{\\frac{\\sqrt{3}}{3} \\approx 0.577}", "right"),
        (
            "10455",
            "it is $\\boxed{255}$ more. Final Answer: The final answer is $10,455$. I hope it is correct.",
            "right",
        ),
        (
            "255",
            "it is $\\boxed{255}$ more. Final Answer: The final answer is $10,455$. I hope it is correct.",
            "wrong",
        ),
        ("\\frac{1}{3}", "\\dfrac{1}{3}", "right"),
        ("x^2+2x+1", "x^2 + 2*x + 1", "right"),
        ("3", "there are 3 of them", "right"),
        ("-2", "so y is 10 ** (-2)", "wrong"),
    ],
)
def test_thorough_rules(gold: str, text: str, verdict: str) -> None:
    assert grader.grade_math(gold, text) == verdict


def test_a_box_can_be_required() -> None:
    assert grader.grade_math("82", "the answer is 82") == "right"
    assert grader.grade_math("82", "the answer is 82", "boxed") == "no_answer"
    with GradePool("math_boxed") as pool:
        verdicts = [g.verdict for g in pool.grade(items(("82", "82"), ("82", "\\boxed{82}")))]
    assert verdicts == ["no_answer", "right"]


def test_agrees_with_published_verdicts() -> None:
    rows = [json.loads(line) for line in (FIXTURES / "graded_outputs.jsonl").read_text().splitlines()]
    assert grade_all([(row["gold"], row["output"]) for row in rows]) == [row["correct"] for row in rows]


def test_integer_answers_need_no_algebra_library() -> None:
    code = (
        "import sys; from astracli.rl.grade_worker import grade_one\n"
        "print(grade_one('math', None, ['', '82', r'\\boxed{82}'], print)[1],"
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
        assert 2.0 <= took < 12.0
        assert pool.counts == {"right": 4, "timeout": 1, "wrong": 1}


def test_a_killed_process_loses_nothing() -> None:
    with GradePool() as pool:
        assert pool.grade(items(("1", "\\boxed{1}")))[0].verdict == "right"
        process = pool._all[0]._process
        assert process is not None
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        assert [g.verdict for g in pool.grade(items(("1", "\\boxed{1}"), ("2", "\\boxed{3}")))] == ["right", "wrong"]


def test_closing_ends_processes_and_what_they_grade() -> None:
    pool = GradePool(timeout_s=60.0)
    pool.grade(items(("1", "\\boxed{1}")))
    process = pool._all[0]._process
    assert process is not None
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
    thread.join(10)
    assert [type(f) for f in failures] == [RunFailed]
    assert process.poll() is not None
    with pytest.raises(RunFailed):
        pool.grade(items(("1", "1")))


def test_a_worker_ends_when_its_owner_is_gone() -> None:
    code = (
        "import os, time; from astracli.rl.reward import *\n"
        "pool = GradePool(); pool.grade([GradeItem('', '1', '1')])\n"
        "print(pool._all[0]._process.pid, flush=True); os.kill(os.getpid(), 9)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    pid = int(done.stdout)
    deadline = time.monotonic() + 10
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

def moody(problem, answer, completion):
    if completion == "hang":
        time.sleep(3600)
    if completion == "exit":
        import os
        os._exit(7)
    return {"none": None, "nan": float("nan"), "raise": 1}[completion] / (completion != "raise")

def two(problem, answer):
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
        assert [(g.reward, g.verdict) for g in found] == [(0.5, "right"), (0.0, "wrong")]
    with GradePool("moodlib:moody", timeout_s=1.0) as pool:
        texts = ("none", "hang", "nan", "exit", "raise")
        found = pool.grade(items(*(("", text) for text in texts)))
    assert [g.verdict for g in found] == ["error", "timeout", "error", "error", "error"]
    assert [g.reward for g in found] == [0.0] * 5
    assert "exit code 7" in found[3].detail and "ZeroDivisionError" in found[4].detail
    for spec, message in (
        ("moodlib:nothing", "`moodlib` has no `nothing`"),
        ("moodlib:constant", "is no function but int"),
        ("moodlib:two", "cannot be called with"),
        ("nolib:f", "importing `nolib` failed: ModuleNotFoundError"),
        ("moodlib:", "not of the form"),
        ("lenght", "there is no reward `lenght`"),
    ):
        with pytest.raises(UserError, match=message):
            validate_reward(spec)
    with pytest.raises(UserError) as caught:
        validate_reward("lenght")
    assert "did you mean `length`?" in str(caught.value.hint)
    with GradePool("lenght") as pool, pytest.raises(UserError, match="there is no reward"):
        pool.grade(items(("", "x")))


def test_a_reward_beside_the_recipe_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "beside.py").write_text("def half(problem, answer, completion):\n    return 0.5\n")
    monkeypatch.chdir(tmp_path)
    validate_reward("beside:half")
    with GradePool("beside:half") as pool:
        assert pool.grade(items(("", "")))[0].reward == 0.5


def test_builtin_rewards_validate_without_a_process() -> None:
    started = time.monotonic()
    for spec in ("math", "math_boxed", "probe"):
        validate_reward(spec)
    assert time.monotonic() - started < 0.1


def test_the_last_announcement_behind_the_last_box_counts() -> None:
    said = "the final answer is $10$"
    assert grader.announced(f"{said}, so \\boxed{{7}}", "boxed_or_last_number") is None
    assert grader.announced(f"\\boxed{{7}}; {said}. No: {said[:-4]}$12$.", "boxed_or_last_number") == (
        "final answer is $12$."
    )
    assert grader.announced(f"\\boxed{{7}}; {said}", "boxed") is None


def test_a_box_ends_where_its_brace_does_whatever_is_escaped() -> None:
    assert grader.read_answer(r"\boxed{\left\{1, 2\right.} and so on}", "boxed") == (r"\left\{1, 2\right.", True)
    assert grader.read_answer(r"\boxed{1, 2\} or so} 3", "boxed") == (r"1, 2\} or so", True)


@pytest.mark.parametrize(
    ("gold", "text", "verdict"),
    [
        ("149", "90+59 is a mathematical expression", "wrong"),  # its value is the answer; math-verify says right
        ("149", "\\boxed{90+59}", "wrong"),
        ("149", "90 + 59 = 149.", "right"),
        ("149", "12 08 \\boxed{149}", "right"),
        ("31", "90-59=31", "right"),
        ("-31", "59-90 = -31", "right"),
        ("-31", "59-90 = −31", "right"),
        ("1149", "it is 1,149", "right"),
        ("149", "149 or 150", "wrong"),
        ("329", "\\boxed{329}590}", "right"),
        ("149", "none", "no_answer"),
    ],
)
def test_a_number_is_read_as_it_is_written_and_nothing_is_worked_out(gold: str, text: str, verdict: str) -> None:
    with GradePool("number") as pool:
        assert pool.grade([GradeItem("", gold, text)])[0].verdict == verdict


def test_math_works_a_repeated_question_out() -> None:
    """Why generated arithmetic is not judged by it."""
    with GradePool("math") as pool:
        assert pool.grade([GradeItem("90+59", "149", "90+59 is a mathematical expression")])[0].verdict == "right"


def test_forms_are_rewritten_only_where_one_side_has_them() -> None:
    assert list(answer_forms.rewritten(r"50\%", r"50\%")) == []
    assert list(answer_forms.rewritten(r"50\%", "50")) == [("50", "50")]
    assert list(answer_forms.rewritten("[1,2]", "1,2")) == [("(1,2)", "(1,2)")]
    assert list(answer_forms.rewritten("[1,2],[3,4]", "1,2,3,4")) == []


def test_probe_rewards_the_upper_half_of_a_group() -> None:
    group = [GradeItem("", "", "", tokens) for tokens in ([2, 4], [2, 3], [1, 3], [1, 3, 5, 2])]
    # shares of even ids 1, 1/2, 0, 1/4; median 3/8
    assert [g.reward for g in probe_grades(group)] == [1.0, 1.0, 0.0, 0.0]
    # of three the median is one of them: 0, 1/2, 1
    odd = [GradeItem("", "", "", tokens) for tokens in ([1], [1, 2], [2])]
    assert [g.reward for g in probe_grades(odd)] == [0.0, 1.0, 1.0]
    with GradePool("probe") as pool:
        assert [g.verdict for g in pool.grade_group(group)] == ["right", "right", "wrong", "wrong"]
    with pytest.raises(ValueError, match="token ids"):
        probe_grades(items(("", "")))
