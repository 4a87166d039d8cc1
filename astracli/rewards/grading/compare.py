"""Is a typed answer the gold one? One rule per pair of types; the conventions are in docs/grading.md."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from astracli.rewards.grading import sets, values
from astracli.rewards.grading.answer_types import (
    Answer,
    Assigned,
    Dots,
    Joined,
    Ratio,
    RealLine,
    Relation,
    Several,
    Value,
    Words,
    is_interval,
    variables,
)
from astracli.rewards.grading.answers import name_like
from astracli.rewards.grading.conventions import Conventions
from astracli.rewards.grading.equations import same_chain, same_equation
from astracli.rewards.grading.quantities import has_sign_choice, quotient, same_quantity, same_time, with_sign
from astracli.rewards.grading.trees import canonical, symbols, unknowns


def equal(gold: Answer, answer: Answer, conventions: Conventions) -> bool:
    """Whether an answer says the same as the gold. Raises Undefined where a value cannot be worked out."""
    gold, answer = _spread(gold), _spread(answer)
    if gold == answer:
        return True
    if _set_like(gold, conventions):
        answer = _united(answer)
    if _set_like(gold, conventions) or _set_like(answer, conventions):
        verdict = _as_sets(gold, answer, conventions)
        if verdict is not None:
            return verdict
    if isinstance(gold, Joined):
        return _joined(gold, answer, conventions)
    if isinstance(answer, Joined):
        if answer.how == "or" and all(equal(gold, part, conventions) for part in answer.parts):
            return True  # one value in several spellings
        answer = _listed(answer)
        if isinstance(answer, Joined):
            return False
    if isinstance(gold, Assigned) or isinstance(answer, Assigned):
        return _assigned(gold, answer, conventions)
    if isinstance(gold, Relation) or isinstance(answer, Relation):
        return _relations(gold, answer, conventions)
    if isinstance(gold, Several) or isinstance(answer, Several):
        return _several(gold, answer, conventions)
    if isinstance(gold, Ratio) or isinstance(answer, Ratio):
        return _ratios(gold, answer, conventions)
    if isinstance(gold, Value) and isinstance(answer, Value):
        return same_quantity(gold, answer, conventions)
    return False


def _spread(answer: Answer) -> Answer:
    """Both values of a plus-minus, side by side."""
    if isinstance(answer, Value) and has_sign_choice(answer.node):
        pair = tuple(replace(answer, node=with_sign(answer.node, upper)) for upper in (True, False))
        return Several(pair)
    if isinstance(answer, Assigned):
        spread = _spread(answer.value)
        return replace(answer, value=spread) if spread != answer.value else answer
    if isinstance(answer, Several):
        items: list[Answer] = []
        for item in answer.items:
            spread = _spread(item)
            value = spread.value if isinstance(spread, Assigned) else spread
            if isinstance(value, Several) and not value.brackets and answer.brackets in ("", "{}") and value != item:
                items.extend(value.items)
            else:
                items.append(item)
        return replace(answer, items=tuple(items)) if tuple(items) != answer.items else answer
    return answer


def _set_like(answer: Answer, conventions: Conventions) -> bool:
    if isinstance(answer, (RealLine, Relation)):
        return isinstance(answer, RealLine) or any(operator != "=" for operator in answer.operators)
    if isinstance(answer, Joined):
        return any(_set_like(part, conventions) or is_pair(part) for part in answer.parts)
    return is_interval(answer) and not conventions.list_asked


def is_pair(answer: Answer) -> bool:
    return isinstance(answer, Several) and answer.brackets == "()" and len(answer.items) == 2


def _as_sets(gold: Answer, answer: Answer, conventions: Conventions) -> bool | None:
    """The verdict when both are sets of reals; None when symbols stand in the way."""
    if isinstance(gold, RealLine) and isinstance(answer, RealLine):
        return gold.letter == answer.letter
    both_pairs = (is_pair(gold) and is_interval(answer)) or (is_interval(gold) and is_pair(answer))
    if both_pairs and _pair_of_numbers(gold) and _pair_of_numbers(answer):
        return False
    first, second = (sets.real_set(each, pairs_are_intervals=True) for each in (gold, answer))
    if first is not None and second is not None:
        if isinstance(answer, Assigned) or isinstance(gold, Assigned):
            return False
        return sets.equal_sets(first, second)
    if first is not None or second is not None:
        numeric = not variables(gold) or first is not None
        return False if numeric and not isinstance(answer, Words) else None
    if is_interval(gold) and is_interval(answer):
        assert isinstance(gold, Several) and isinstance(answer, Several)
        return _in_turn(gold.items, answer.items, conventions) and gold.brackets == answer.brackets
    return None


def _pair_of_numbers(answer: Answer) -> bool:
    return isinstance(answer, Several) and all(isinstance(item, Value) for item in answer.items)


def _united(answer: Answer) -> Answer:
    """Intervals with commas between them, where a union is the gold."""
    intervals = isinstance(answer, Several) and not answer.brackets and len(answer.items) > 1
    if intervals and all(is_pair(item) or is_interval(item) for item in answer.items):  # type: ignore[union-attr]
        return Joined("or", answer.items)  # type: ignore[union-attr]
    return answer


def _listed(answer: Joined) -> Answer:
    """`2 or 3` as a list."""
    if answer.how != "or":
        return answer
    items: list[Answer] = []
    for part in answer.parts:
        part = _spread(part)
        if isinstance(part, Several) and not part.brackets:
            items.extend(part.items)
        else:
            items.append(part)
    return Several(tuple(items), "{}")


def _joined(gold: Joined, answer: Answer, conventions: Conventions) -> bool:
    listed = _listed(gold)
    if isinstance(listed, Several):
        if all(equal(listed.items[0], item, conventions) for item in listed.items[1:]):
            return equal(listed.items[0], answer, conventions)  # one value in several spellings
        other = _listed(answer) if isinstance(answer, Joined) else answer
        return not isinstance(other, Joined) and equal(listed, other, conventions)
    if not isinstance(answer, Joined) or answer.how != gold.how or len(answer.parts) != len(gold.parts):
        return False
    return _matched(gold.parts, answer.parts, conventions)


def _assigned(gold: Answer, answer: Answer, conventions: Conventions) -> bool:
    if isinstance(gold, Assigned) and isinstance(answer, Assigned):
        names = gold.name, answer.name
        if names[0] != names[1] and all(name in ("x", "y", "z") for name in names):
            return same_equation(gold, answer)
        if equal(gold.value, answer.value, conventions):
            return True
        return names[0] != names[1] and same_equation(gold, answer)
    if isinstance(answer, Relation) or isinstance(gold, Relation):
        return same_equation(gold, answer)
    if isinstance(gold, Assigned):
        return equal(gold.value, answer, conventions)
    assert isinstance(answer, Assigned)
    if isinstance(answer.value, Value) and answer.value.node == answer.left:
        return False
    return equal(gold, answer.value, conventions)


def _relations(gold: Answer, answer: Answer, conventions: Conventions) -> bool:
    if isinstance(answer, Relation) and isinstance(gold, Relation):
        if set(gold.operators) == set(answer.operators) == {"="} and len(gold.sides) == len(answer.sides) == 2:
            return same_equation(gold, answer)
        return same_chain(gold, answer)
    if isinstance(answer, Relation) and set(answer.operators) == {"="} and isinstance(gold, Value):
        return _worked_out(answer, gold, conventions)
    return False


def _worked_out(answer: Relation, gold: Value, conventions: Conventions) -> bool:
    """`2 + 3 = 5`: a chain of equal values that ends in the answer."""
    first, last = answer.sides[0], answer.sides[-1]
    if unknowns(first) and not name_like(first) and not _steps(answer):
        return False
    if canonical(first) == canonical(last):
        return False
    return same_quantity(gold, Value(last), conventions)


def _steps(chain: Relation) -> bool:
    """Whether the last steps of a chain are a calculation: `5 \\star 1 = 45 + 2 = 47`."""
    last_two = chain.sides[-2:]
    return len(chain.sides) > 2 and not symbols(last_two[0]) and values.same(last_two[0], last_two[1])


def _several(gold: Answer, answer: Answer, conventions: Conventions) -> bool:
    if not isinstance(gold, Several):
        assert isinstance(answer, Several)
        alone = len(answer.items) == 1 and answer.brackets in ("{}", "[]", "")
        return alone and equal(gold, answer.items[0], conventions)
    if not isinstance(answer, Several):
        return len(gold.items) == 1 and equal(gold.items[0], answer, conventions)
    gold, answer = _distinct(gold), _distinct(answer)
    if len(gold.items) != len(answer.items):
        return False
    if not gold.items:
        return True
    if gold.brackets != answer.brackets and any(_unbounded(item) for item in (*gold.items, *answer.items)):
        return False
    if not _compatible(gold.brackets, answer.brackets, len(gold.items), conventions):
        return False
    ordered = gold.brackets not in ("", "{}") or answer.brackets not in ("", "{}") or conventions.ordered_lists
    if gold.brackets == "{}" or (answer.brackets == "{}" and not gold.brackets):
        ordered = False
    mine, theirs = _by_name(gold), _by_name(answer)
    if mine and theirs:
        same = (equal(mine[name].value, theirs[name].value, conventions) for name in mine if name in theirs)
        return mine.keys() == theirs.keys() and all(same)
    if not ordered:
        return _matched(gold.items, answer.items, conventions)
    first, second = (
        tuple(named[name] for name in sorted(named)) if named else each.items
        for named, each in ((mine, gold), (theirs, answer))
    )  # `y = 4, x = 2` is (2, 4)
    return _in_turn(first, second, conventions)


def _in_turn(gold: Sequence[Answer], answer: Sequence[Answer], conventions: Conventions) -> bool:
    """Whether each item is equal to the one at its place."""
    return len(gold) == len(answer) and all(equal(a, b, conventions) for a, b in zip(gold, answer, strict=True))


def _unbounded(item: Answer) -> bool:
    """An infinite end: the pair is an interval and its brackets count."""
    node = item.node if isinstance(item, Value) else None
    return node in (("fn", "infty"), ("neg", ("fn", "infty")))


def _distinct(answer: Several) -> Several:
    """A set without repeated elements, a list without repeated pairs; repeated numbers stay, as in prime factors."""
    if answer.brackets == "{}" or (not answer.brackets and all(isinstance(item, Several) for item in answer.items)):
        return replace(answer, items=tuple(dict.fromkeys(answer.items)))
    return answer


_VECTORS = ("()", "<>", "column", "row", "[]")


def _compatible(gold: str, answer: str, size: int, conventions: Conventions) -> bool:
    """Whether two kinds of brackets may stand for the same thing."""
    if gold == answer or not gold or not answer:
        interval = size == 2 and not conventions.list_asked
        return gold == answer or not (interval and "[" in gold + answer and not (gold and answer))
    if gold in _VECTORS and answer in _VECTORS:
        return not (size == 2 and {gold, answer} == {"()", "[]"})
    return False


def _by_name(answer: Several) -> dict[str, Assigned] | None:
    """The items by their names, when all have different ones."""
    named = {item.name: item for item in answer.items if isinstance(item, Assigned)}
    return named if len(named) == len(answer.items) else None


def _matched(gold: tuple[Answer, ...], answer: tuple[Answer, ...], conventions: Conventions) -> bool:
    """Whether the items pair up in some order. Equality is transitive enough for a greedy search."""
    if any(isinstance(item, Dots) for item in (*gold, *answer)):
        return _in_turn(gold, answer, conventions)
    left = list(answer)
    for item in gold:
        place = next((k for k, other in enumerate(left) if equal(item, other, conventions)), None)
        if place is None:
            return False
        del left[place]
    return not left


def _ratios(gold: Answer, answer: Answer, conventions: Conventions) -> bool:
    if isinstance(gold, Ratio) and isinstance(answer, Ratio):
        if gold.time or answer.time:
            return same_time(gold, answer)
        if any(isinstance(part, Dots) for part in (*gold.parts, *answer.parts)) or len(gold.parts) > 2:
            return _in_turn(gold.parts, answer.parts, conventions)
    quotients = [quotient(each) for each in (gold, answer)]
    return quotients[0] is not None and quotients[1] is not None and values.same(quotients[0], quotients[1])
