"""The rules of grading: labelled pairs, published verdicts, and where the answer of a completion stands."""

import json
from pathlib import Path

import pytest

from astracli.config.recipe_rewards import GradingTable
from astracli.rewards import grader
from astracli.rewards.grading.conventions import Conventions
from astracli.rewards.reward import GradeItem, GradePool

FIXTURES = Path(__file__).parent / "fixtures"


def items(*pairs: tuple[str, str]) -> list[GradeItem]:
    return [GradeItem("", gold, text) for gold, text in pairs]


@pytest.mark.parametrize("name", ["grading_pairs", "grading_pairs_held_out", "grading_pairs_independent"])
def test_no_labelled_pair_is_graded_otherwise(name: str) -> None:
    """Each row: gold, problem (often empty), completion, the label, its kind and the label's reason."""
    rows = [json.loads(line) for line in (FIXTURES / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]
    assert {row["right"] for row in rows} == {True, False}
    with GradePool() as pool:
        grades = pool.grade([GradeItem(row["problem"], row["gold"], row["completion"]) for row in rows])
    wrong = [
        f"{row['kind']}: {row['gold']!r}, {row['completion']!r} is {grade.verdict}, but {row['reason']}"
        for row, grade in zip(rows, grades, strict=True)
        if (grade.verdict == "right") != row["right"]
    ]
    assert not wrong, "\n".join(wrong)
    assert not {"error", "timeout"} & {grade.verdict for grade in grades}


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
        ("82", "12 08 82", None),
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
        ("[3, 5]", "\\boxed{3, 5}", "wrong"),
        ("[3, 5, 7]", "\\boxed{3, 5, 7}", "right"),
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
        ("82", "12 08 82", "right"),
        ("\\frac{1}{3}", "\\boxed{0.333333}", "right"),
        ("\\frac{1}{3}", "\\boxed{0.33333}", "wrong"),
        ("\\frac{1}{3}", "\\boxed{0.333334}", "wrong"),
        ("\\pi", "\\boxed{3.14159}", "wrong"),
        ("\\pi", "\\boxed{3.141593}", "right"),
        ("\\frac{1}{8103}", "\\boxed{0.000123}", "wrong"),
        ("0.333333", "\\boxed{\\frac{1}{3}}", "right"),
        ("0.333333", "\\boxed{0.3333333}", "wrong"),
        ("82", "+ - =", "no_answer"),
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
    with GradePool() as pool:
        grades = pool.grade(items(*((row["gold"], row["output"]) for row in rows)))
    assert [grade.verdict == "right" for grade in grades] == [row["correct"] for row in rows]


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


def test_square_brackets_are_a_list_where_the_problem_asks_for_one() -> None:
    factors, range_ = "What are the prime factors of 15?", "Find the range of f(x)."
    assert grader.grade_math("[3, 5]", "\\boxed{3, 5}", problem=factors) == "right"
    assert grader.grade_math("[3, 5]", "\\boxed{5, 3}", problem=factors) == "wrong"
    assert grader.grade_math("[3, 5]", "\\boxed{3, 5}", problem=range_) == "wrong"
    assert grader.grade_math("[3, 5]", "\\boxed{3 \\le x \\le 5}", problem=range_) == "right"


def graded(settings: dict[str, object], *pairs: tuple[str, str]) -> list[str]:
    with GradePool("math", grading=settings) as pool:
        return [grade.verdict for grade in pool.grade(items(*pairs))]


def test_three_conventions_can_be_changed() -> None:
    near = [
        ("9.8", "\\boxed{9.81}"),
        ("9.8", "\\boxed{10}"),
        ("\\sqrt{2}", "\\boxed{1.41}"),
        ("(2, 3.14)", "\\boxed{(2, 3.15)}"),
    ]
    assert graded({}, *near) == ["wrong"] * 4
    assert graded({"relative_tolerance": 0.01}, *near) == ["right", "wrong", "right", "right"]
    lists = [("1, 2", "\\boxed{2, 1}"), ("1, 2", "\\boxed{1, 2}"), ("\\{1, 2\\}", "\\boxed{\\{2, 1\\}}")]
    assert graded({}, *lists) == ["right"] * 3
    assert graded({"ordered_lists": True}, *lists) == ["wrong", "right", "right"]
    units = [
        ("5 \\text{ m}", "\\boxed{5}"),
        ("5 \\text{ m}", "\\boxed{500 \\text{ cm}}"),
        ("5", "\\boxed{5 \\text{ m}}"),
    ]
    assert graded({}, *units) == ["right"] * 3
    assert graded({"units": "required"}, *units) == ["wrong", "right", "right"]


def test_a_recipe_that_says_nothing_keeps_the_conventions() -> None:
    assert Conventions(**GradingTable().model_dump()) == Conventions()
    changed = GradingTable(relative_tolerance=0.01, ordered_lists=True, units="required")
    assert Conventions(**changed.model_dump()) == Conventions(0.01, True, "required")


@pytest.mark.parametrize(
    "answer",
    ["9^{9^{9^{9}}}", "5 " + "m/" * 1800 + "q", "(((9!)!)!)!", "0^0", "\\frac{1}{0}", "(" * 5000 + "1" + ")" * 5000],
)
def test_what_cannot_be_worked_out_is_wrong_at_once(answer: str) -> None:
    assert grader.grade_math("2", f"\\boxed{{{answer}}}") in ("wrong", "no_answer", "error")


def test_letter_and_text_of_a_choice_stand_for_each_other() -> None:
    problem = "What is 3 * 4?\n(A) 10\n(B) 12\n(C) 14"
    pairs = [("B", "12"), ("B", "14"), ("B", "C"), ("12", "B"), ("12", "C"), ("12", "(B)"), ("12", "B, C")]
    with GradePool("math") as pool:
        grades = pool.grade([GradeItem(problem, gold, f"\\boxed{{{answer}}}") for gold, answer in pairs])
    assert [g.verdict for g in grades] == ["right", "wrong", "wrong", "right", "wrong", "right", "wrong"]
