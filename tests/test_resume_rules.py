"""What a resume may change, what it refuses and why; and that no hint of a failed run names a key that is refused."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from astracli.config.schema import at, dotted_keys
from astracli.launch import resume_rules
from astracli.launch.resume_rules import refusal

PACKAGE = Path(__file__).parents[1] / "astracli"
FAILS = {"RunFailed", "MayPass", "EngineLost", "FailureHint", "_known", "_failure"}
"""What makes an error of a run that has started. Its hint is followed by `go on with astra train --resume RUN`."""
KEY = re.compile(r"(?<![\w./-])([a-z]\w*(?:\.[a-z]\w*)+)(?![\w(/-]|\.\w)")


def leaves() -> list[str]:
    return [key for key in dotted_keys() if (slot := at(key.split("."))) is not None and slot.table is None]


@pytest.mark.parametrize(
    "key",
    [
        "train.steps", "train.learning_rate", "train.schedule", "train.warmup_steps", "train.final_lr_fraction",
        "train.parity_tolerance", "train.packing", "train.tokens_per_microbatch", "eval.every", "eval.benchmarks",
        "eval.temperature", "checkpoint.every", "checkpoint.keep", "checkpoint.best", "metrics.sinks",
        "launch.heartbeat_timeout_s", "launch.max_restarts", "resources.train_gpus", "weights.keep",
        "rollout.max_new_tokens", "rollout.context_length", "rollout.max_dropped_batches", "rollout.running_ceiling.48",
        "rollout.sglang.mem_fraction_static", "data.reward_timeout_s", "data.max_prompt_tokens",
    ],
)  # fmt: skip
def test_what_may_change(key: str) -> None:
    assert refusal(key) is None


@pytest.mark.parametrize(
    ("key", "why"),
    [
        ("seed", "draws"),
        ("model.path", "weights of the run's own model"),
        ("model.adapter", "weights of the run's own model"),
        ("data.source", "place in the order"),
        ("data.reward", "keep their reward"),
        ("data.prompt", "asked"),
        ("rollout.group_size", "own size"),
        ("rollout.temperature", "drawn with it"),
        ("rollout.engine", "log-probabilities"),
        ("train.batch_groups", "batches"),
        ("train.betas", "moments"),
        ("algorithm.name", "two objectives"),
        ("algorithm.m2po.m2_threshold", "two objectives"),
        ("launch.deterministic", "other mode"),
        ("a.table.of.tomorrow", "learns from"),
    ],
)
def test_what_may_not_and_why(key: str, why: str) -> None:
    assert why in str(refusal(key))


def test_every_key_of_the_schema_is_decided_by_an_entry_of_its_own_table() -> None:
    undecided = [key for key in leaves() if refusal(key) == resume_rules.OTHER]
    assert undecided == ["name"], "a resumed run keeps its name"


def strings(node: ast.AST) -> Iterator[str]:
    """String constants below a node, the parts of a formatted one joined by `...`."""
    if isinstance(node, ast.JoinedStr):
        yield "".join(str(p.value) if isinstance(p, ast.Constant) else "..." for p in node.values)
    elif isinstance(node, ast.Constant) and isinstance(node.value, str):
        yield node.value
    else:
        for child in ast.iter_child_nodes(node):
            yield from strings(child)


def fails(node: ast.AST) -> bool:
    return isinstance(node, ast.Call) and getattr(node.func, "id", getattr(node.func, "attr", "")) in FAILS


def said_when_a_run_fails() -> Iterator[tuple[str, str]]:
    """(file, text) of messages and hints of every failure of a run that has started, with the texts that the function
    around it puts into variables."""
    for file in sorted(PACKAGE.rglob("*.py")):
        tree = ast.parse(file.read_text(encoding="utf-8"))
        scopes = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
        for scope in scopes:
            if any(fails(node) for node in ast.walk(scope)):
                for node in scope.body[ast.get_docstring(scope) is not None :]:
                    yield from ((str(file.relative_to(PACKAGE)), text) for text in strings(node))
        for node in tree.body:
            if isinstance(node, ast.Assign):
                yield from (
                    (str(file.relative_to(PACKAGE)), text) for n in ast.walk(node) if fails(n) for text in strings(n)
                )


def recipe_keys(text: str) -> set[str]:
    return {key for key in KEY.findall(text) if at(key.split(".")) is not None and key not in ("model.py",)}


def new_run(text: str) -> bool:
    """Whether a text says that what it names takes a new run."""
    return "--from" in text or "a new run" in text


def test_no_hint_of_a_failed_run_names_a_key_that_a_resume_refuses() -> None:
    found = [(file, text, recipe_keys(text)) for file, text in said_when_a_run_fails()]
    named = set().union(*(keys for _, _, keys in found))
    assert {"train.learning_rate", "train.packing", "weights.keep", "rollout.context_length"} <= named
    wrong = [(file, text) for file, text, keys in found if not new_run(text) and any(map(refusal, keys))]
    assert wrong == [], "say that it takes a new run (`astra train --from`), or let resume_rules take the key"


def test_the_search_sees_a_hint_that_is_wrong() -> None:
    assert recipe_keys("take `--set train.batch_groups=4`, or raise weights.keep.") == {
        "train.batch_groups",
        "weights.keep",
    }
    call = ast.parse('raise RunFailed(f"no {x}", "raise " + f"{n} data.reward" if x else "seed")').body[0]
    assert list(strings(call)) == ["no ...", "raise ", "... data.reward", "seed"]
