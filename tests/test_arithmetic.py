"""The generated task: worked solutions by hand, counter-based draws, and held-out pairs that never train."""

import pytest

from astracli.data import arithmetic
from astracli.data.arithmetic import LEVELS, draw, held_out, is_held_out, worked, worked_text


@pytest.mark.parametrize(
    ("question", "solution"),
    [
        ("37+45", r"12 08 \boxed{82}"),
        ("52-37", r"05 11 \boxed{15}"),
        ("40-40", r"10 10 \boxed{0}"),
        ("99+99", r"18 19 \boxed{198}"),
        ("999+101", r"10 10 11 \boxed{1100}"),
        ("500-123", r"07 07 13 \boxed{377}"),
    ],
)
def test_worked_solution_by_hand(question: str, solution: str) -> None:
    assert worked_text(question) == solution


@pytest.mark.parametrize(
    ("question", "solution"),
    [
        ("(37+48)*6", r"37+48 15 08=85 85*6 30 51=510 \boxed{510}"),
        ("90*4-52", r"90*4 00 36=360 360-52 08 10 13=308 \boxed{308}"),
        ("(28-24)*2+10", r"28-24 14 10=4 4*2 08=8 8+10 08 01=18 \boxed{18}"),
    ],
)
def test_solution_of_several_steps_by_hand(question: str, solution: str) -> None:
    assert worked_text(question) == solution


def test_problems_of_several_steps_are_right_bounded_and_apart_from_the_held_out_ones() -> None:
    held = arithmetic.held_out(levels=arithmetic.STEP_LEVELS)
    assert held == arithmetic.held_out(levels=arithmetic.STEP_LEVELS) and len({p.question for p in held}) == 256
    assert {p.meta["level"]: 0 for p in held}.keys() == set(arithmetic.STEP_LEVELS)
    drawn = [draw(i, 7, arithmetic.STEP_LEVELS) for i in range(2000)]
    for problem in [*drawn, *held]:
        operators = [c for c in problem.question if c in "+-*"]
        assert len(operators) == int(problem.meta["level"][-1])
        assert eval(problem.question) == int(problem.answer) <= 999  # Python knows precedence; digits and signs alone
        assert worked_text(problem.question).endswith(f"\\boxed{{{problem.answer}}}")
    assert not {p.question for p in drawn} & {p.question for p in held}
    assert [draw(i, 0, ["steps3"]) for i in range(5)] == [draw(i, 0, ["steps3"]) for i in range(5)]


def test_columns_rebuild_the_answer() -> None:
    for index in range(300):
        p = draw(index, seed=5)
        op, a, b = p.meta["op"], p.meta["a"], p.meta["b"]
        *columns, box = worked(op, a, b).split()
        assert box == f"\\boxed{{{p.answer}}}"
        total = sum(int(c) % 10 * 10**i for i, c in enumerate(columns))
        carry = 10 ** len(columns) if op == "+" and int(columns[-1]) >= 10 else 0
        assert str(total + carry) == p.answer


@pytest.mark.parametrize(
    "question",
    [
        "37/45",
        "2+3*4",  # 14, and 20 from left to right
        "(2+3)*4+5*6",
        "(12+(3))*4",
        "((12+3))*4",
        "12+3)*4",
        "12*34",  # a column is a digit's product
        "12*34+5",
        "12-34",
        "12-34+56",
        "012*3+4",
    ],
)
def test_other_text_has_no_worked_solution(question: str) -> None:
    with pytest.raises(ValueError, match="is no problem"):
        worked_text(question)


def test_draws_depend_on_seed_and_index_alone() -> None:
    forward = [draw(i, 3) for i in range(200)]
    assert [draw(i, 3) for i in reversed(range(200))] == forward[::-1]
    assert len({p.question for p in forward}) > 190
    assert [p.question for p in forward] != [draw(i, 4).question for i in range(200)]


def test_first_draws_are_the_same_for_ever() -> None:
    assert [draw(i, 0).question for i in range(4)] == ["19+88", "13+74", "82+32", "82-48"]
    assert [p.question for p in held_out()[:4]] == ["90+59", "46-24", "775+545", "477-386"]


def test_levels_are_drawn_uniformly_and_only_those_asked_for() -> None:
    counts = {level: 0 for level in LEVELS}
    for i in range(4000):
        counts[draw(i, 1).meta["level"]] += 1
    assert all(abs(n - 1000) < 120 for n in counts.values()), counts
    assert {draw(i, 1, ["sub3"]).meta["level"] for i in range(50)} == {"sub3"}


def test_operands_have_the_level_s_digits_and_subtraction_stays_at_or_over_zero() -> None:
    for i in range(1000):
        p = draw(i, 2)
        digits = int(p.meta["level"][3])
        assert len(str(p.meta["a"])) == len(str(p.meta["b"])) == digits
        assert int(p.answer) >= 0


def test_held_out_items_are_fixed_distinct_balanced_and_never_trained() -> None:
    items = held_out()
    assert items == held_out() and len(items) == 256
    pairs = {(p.meta["op"], *sorted((p.meta["a"], p.meta["b"]))) for p in items}
    assert len(pairs) == len({p.id for p in items}) == 256
    assert [sum(p.meta["level"] == level for p in items) for level in LEVELS] == [64] * 4
    assert all(is_held_out(p.meta["op"], p.meta["a"], p.meta["b"]) for p in items)
    trained = {(p.meta["op"], *sorted((p.meta["a"], p.meta["b"]))) for p in (draw(i, 0) for i in range(5000))}
    assert not trained & pairs


def test_a_tenth_is_held_out_and_the_order_of_a_sum_does_not_matter() -> None:
    pairs = [(a, b) for a in range(10, 100) for b in range(10, a + 1)]
    share = sum(is_held_out("+", a, b) for a, b in pairs) / len(pairs)
    assert 0.08 < share < 0.12
    assert all(is_held_out("+", a, b) == is_held_out("+", b, a) for a, b in pairs)


def test_more_items_extend_the_same_list() -> None:
    assert held_out(1000)[:256] == held_out()
    with pytest.raises(ValueError):
        held_out(1201)
    assert arithmetic.LEVELS == ("add2", "sub2", "add3", "sub3")
