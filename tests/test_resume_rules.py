"""What a resume may change, what it refuses and why; and that no hint of a failed run names a key that is refused."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from astracli.config.schema import at, dotted_keys
from astracli.launch import resume_rules
from astracli.launch.resume_rules import completed, keys_in, refusal

PACKAGE = Path(__file__).parents[1] / "astracli"
FAILS = {"RunFailed": 1, "MayPass": 1, "EngineLost": 1, "FailureHint": 2, "_known": 2, "kind": 1, "_failure": 1}
"""What makes an error of a run that has started, and which of its arguments is the hint."""
DIAGNOSES = ("report/no_signal.py",)
"""Files whose every text may become a hint of a run that has failed."""
ADVICE = ("report/alerts.py", "report/bottleneck.py")
"""Files whose texts say what to change in a run that goes on, or that is done and may go on."""


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
        "data.max_reward_errors", "eval.samples.gsm8k",
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
        ("data.rewards", "keep their reward"),
        ("data.code.tests", "keep their reward"),
        ("data.template", "asked"),
        ("model.thinking", "asked"),
        ("data.mix", "place in the order"),
        ("rollout.env", "environment"),
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


def hints_of(scope: ast.AST) -> Iterator[str]:
    """The texts of every hint that is made in a scope: as they stand there, or as a variable got them."""
    names: set[str] = set()
    for call in (node for node in ast.walk(scope) if isinstance(node, ast.Call)):
        place = FAILS.get(getattr(call.func, "id", getattr(call.func, "attr", "")))
        if place is not None:
            for hint in [*call.args[place:], *(k.value for k in call.keywords if k.arg == "hint")]:
                yield from strings(hint)
                names |= {node.id for node in ast.walk(hint) if isinstance(node, ast.Name)}
    for node in ast.walk(scope):
        if isinstance(node, ast.Assign):
            targets = {name.id for target in node.targets for name in ast.walk(target) if isinstance(name, ast.Name)}
            if targets & names:
                yield from strings(node.value)


def hints_of_failed_runs() -> Iterator[tuple[str, str]]:
    """(file, text)"""
    for file in sorted(PACKAGE.rglob("*.py")):
        name, tree = file.relative_to(PACKAGE).as_posix(), ast.parse(file.read_text(encoding="utf-8"))
        yield from ((name, text) for text in (strings(tree) if name in DIAGNOSES else hints_of(tree)))


@pytest.mark.parametrize("weights", [True, False])
def test_no_hint_of_a_failed_run_recommends_what_a_resume_refuses(weights: bool) -> None:
    found = {(file, text): keys_in(text) for file, text in hints_of_failed_runs()}
    named = {key for keys in found.values() for key in keys}
    assert {"train.learning_rate", "train.packing", "weights.keep", "rollout.context_length"} <= named
    assert any(map(refusal, named)), "some are refused, and what is said of them is looked at"
    for (file, hint), keys in found.items():
        fixed = [key for key in keys if refusal(key) is not None]
        said = completed(hint, "", Path("runs/a"), weights=weights)
        if not fixed:
            assert said == hint, file
            continue
        begin = "--from runs/a" if weights else "--recipe runs/a/recipe.json"
        sets = " ".join(f"--set {key}=..." for key in fixed)
        assert str(said).endswith(f"takes a new run, --resume refuses it: `astra train {begin} {sets}`"), file
        assert not any(re.search(rf"--resume [^;]*--set {key}", hint) for key in fixed), file


def test_advice_on_a_run_that_may_go_on_says_what_takes_a_new_one() -> None:
    named = set()
    for file in ADVICE:
        for text in strings(ast.parse((PACKAGE / file).read_text(encoding="utf-8"))):
            fixed = [key for key in keys_in(text) if refusal(key) is not None]
            named |= set(fixed)
            assert not fixed or "in a new run" in text, (file, text)
    assert named == {"algorithm.kl_coef", "train.batch_groups"}


def test_a_hint_that_a_worker_gave_is_completed_too() -> None:
    said = "`trainer` ended with exit code 1; its last lines in log:\n  error: no\n  hint: lower rollout.temperature"
    assert completed("go on with X", said, Path("r"), weights=True) == (
        "go on with X; another value of `rollout.temperature` takes a new run, --resume refuses it: "
        "`astra train --from r --set rollout.temperature=...`"
    )
    both = completed("take another model.path or seed", "", Path("r"), weights=True)
    assert str(both).endswith("`astra train --recipe r/recipe.json --set model.path=...`"), "--from has that model"
    assert completed(None, "data.reward = x failed", Path("r"), weights=True) is None, "that is no recommendation"
    assert completed(None, "", Path("r"), weights=True) is None


def test_the_search_sees_keys_and_hints() -> None:
    text = "take `--set train.batch_groups=4`, or raise weights.keep; see docs/recipe.md and trainer.log, not eval"
    assert keys_in(text) == ["train.batch_groups", "weights.keep"]
    scope = ast.parse(
        'def f():\n    way = "a" if x else f"b {y}"\n    other = "no"\n    raise RunFailed("message", f"{way}; c")'
    )
    assert list(hints_of(scope)) == ["...; c", "a", "b ..."]
