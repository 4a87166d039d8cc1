"""Finding, extending, overriding and writing recipes; and what the shipped ones say."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path
from typing import Any

import pytest

from astracli.config import recipe_io
from astracli.config.recipe_rollout import RUNNING
from astracli.errors import UserError

TINY = "qwen3.5-tiny-m2po-delta"
MATH = ["qwen3.5-4b-m2po-full", "qwen3.5-4b-m2po-delta", "qwen3.5-0.8b-m2po-delta", "qwen3-1.7b-m2po-delta"]
QWEN2 = ["qwen2.5-0.5b-gsm8k-m2po-delta", "qwen2.5-1.5b-math-m2po-delta"]
SMALL = ["qwen3.5-small-m2po-delta", "smollm2-135m-m2po-delta"]
LORA = ["tiny-lora-m2po-delta", "qwen3.5-0.8b-lora", "qwen3.5-4b-lora-24gb", "qwen2.5-0.5b-gsm8k-lora"]
SHIPPED = sorted(
    [
        *MATH,
        *QWEN2,
        *SMALL,
        "qwen3.5-tiny-m2po-full",
        TINY,
        "tiny-sft",
        "tiny-tool-m2po-delta",
        *LORA,
        "llama3-8b-instruct-m2po-delta",
    ]
)


def refused(name: str, *overrides: str) -> UserError:
    with pytest.raises(UserError) as caught:
        recipe_io.load(name, overrides)
    return caught.value


def differing(a: dict[str, Any], b: dict[str, Any]) -> set[str]:
    return {key for key in a.keys() | b.keys() if a.get(key) != b.get(key)}


def test_shipped_names_and_descriptions() -> None:
    found = {info.name: info.description for info in recipe_io.shipped()}
    assert sorted(found) == SHIPPED
    assert found["qwen3-1.7b-m2po-delta"] == "Qwen3-1.7B learns math on 1 + 1 GPUs; delta weight transfer"
    assert all(found.values())


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_recipes_load_under_their_own_name(name: str) -> None:
    recipe = recipe_io.load(name)
    assert recipe.name == name
    named = {name: "adapter" for name in LORA[1:]} | {"tiny-sft": "full"}
    assert recipe.weights.transfer == named.get(name, name.rpartition("-")[2])
    assert (recipe.lora is not None) == (name in LORA)
    assert tomllib.loads(recipe_io.to_toml(recipe))["train"]["steps"] == recipe.train.steps


@pytest.mark.parametrize("family", ["qwen3.5-tiny-m2po", "qwen3.5-4b-m2po"])
def test_full_and_delta_differ_in_the_weights_table_only(family: str) -> None:
    full, delta = (recipe_io.to_document(recipe_io.load(f"{family}-{kind}")) for kind in ("full", "delta"))
    assert differing(full, delta) == {"name", "description", "weights"}
    assert differing(full["weights"], delta["weights"]) == {"transfer"}
    assert delta["weights"]["full_interval"] == 10


def test_4b_has_the_published_settings() -> None:
    recipe = recipe_io.load("qwen3.5-4b-m2po-delta")
    assert recipe.batch_sequences == 256
    assert (recipe.train.steps, recipe.train.minibatches, recipe.train.tokens_per_microbatch) == (800, 4, 8192)
    assert (recipe.train.learning_rate, recipe.train.betas, recipe.train.weight_decay) == (5e-6, (0.9, 0.999), 0.01)
    assert (recipe.train.max_staleness, recipe.train.schedule, recipe.train.grad_clip) == (8, "constant", 1.0)
    assert (recipe.algorithm.own.m2_threshold, recipe.algorithm.kl_coef) == (0.01, 0.001)
    assert recipe.algorithm.batch_norm_advantage and recipe.algorithm.drop_equal_groups
    assert (recipe.rollout.max_new_tokens, recipe.rollout.context_length, recipe.rollout.group_size) == (4000, 8192, 8)
    assert (recipe.rollout.max_running_requests, recipe.rollout.sglang.mem_fraction_static) == ("auto", 0.7)
    assert recipe.rollout.running_ceiling == {"48": 32}
    assert recipe.eval.benchmarks == ["aime24", "aime25", "amc", "minerva", "math500"]
    assert (recipe.eval.every, recipe.eval.temperature, recipe.eval.max_concurrency) == (10, 0.6, "auto")
    assert (recipe.resources.rollout_gpus, recipe.resources.train_gpus) == (4, 4)
    assert recipe.data.template.endswith("final answer within \\boxed{}.")
    expected = recipe.expected
    assert expected is not None
    assert (expected.avg_at_n_first, expected.avg_at_n_last) == (0.478, 0.574)
    assert (expected.pass_at_k_first, expected.pass_at_k_last, expected.steps) == (0.565, 0.674, 80)


def test_other_math_recipes_have_their_own_lengths_and_gpus() -> None:
    small, llama = recipe_io.load("qwen3-1.7b-m2po-delta"), recipe_io.load("llama3-8b-instruct-m2po-delta")
    shared = recipe_io.load("qwen3.5-0.8b-m2po-delta")
    assert (small.rollout.context_length, small.rollout.max_new_tokens) == (7168, 4000)
    assert (small.resources.rollout_gpus, small.resources.train_gpus) == (1, 1)
    assert (llama.rollout.context_length, llama.rollout.max_new_tokens) == (8192, 6000)
    assert shared.resources.share_gpus and shared.expected is None


def test_extends_a_path_beside_the_file_and_merges_tables(tmp_path: Path) -> None:
    (tmp_path / "base.toml").write_text(
        'description = "base"\nmodel.path = "m"\ntrain.steps = 5\n'
        '[data]\nsource = "arithmetic"\nlevels = ["add2", "sub2"]\n'
    )
    (tmp_path / "sub").mkdir()
    child = tmp_path / "sub" / "child.toml"
    child.write_text('extends = "../base.toml"\n[train]\nbatch_groups = 3\n[data]\nlevels = ["add3"]\n')
    recipe = recipe_io.load(str(child))
    assert (recipe.name, recipe.description) == ("child", "")
    assert (recipe.train.steps, recipe.train.batch_groups, recipe.data.levels) == (5, 3, ["add3"])


def test_extends_a_shipped_name(tmp_path: Path) -> None:
    mine = tmp_path / "mine.toml"
    mine.write_text(f'extends = "{TINY}"\nseed = 7\n')
    recipe, parent = recipe_io.load(str(mine)), recipe_io.load(TINY)
    assert differing(recipe_io.to_document(recipe), recipe_io.to_document(parent)) == {"name", "description", "seed"}


def test_extends_undoes_a_number_and_what_is_shown_says_auto(tmp_path: Path) -> None:
    mine = tmp_path / "mine.toml"
    mine.write_text('extends = "llama3-8b-instruct-m2po-delta"\nrollout.max_running_requests = "auto"\n')
    assert recipe_io.load("llama3-8b-instruct-m2po-delta").rollout.max_running_requests == 32
    recipe = recipe_io.load(str(mine))
    assert recipe.rollout.max_running_requests == "auto" and recipe.rollout.running == RUNNING
    shown = recipe_io.to_toml(recipe_io.load("qwen3.5-4b-m2po-delta"))
    assert 'max_running_requests = "auto"' in shown and "[rollout.running_ceiling]\n48 = 32\n" in shown
    again = tmp_path / "again.toml"
    again.write_text(shown)
    assert recipe_io.load(str(again)).rollout == recipe_io.load("qwen3.5-4b-m2po-delta").rollout
    old = recipe_io.to_document(recipe)
    old["rollout"]["max_running_requests"] = None  # as a run directory of an earlier version says it
    assert recipe_io.check(old, "old").rollout.max_running_requests == "auto"


def test_a_circle_of_extends_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.toml").write_text('extends = "b.toml"\n')
    (tmp_path / "b.toml").write_text('extends = "a.toml"\n')
    error = refused(str(tmp_path / "a.toml"))
    assert error.message == f"recipe `{tmp_path / 'a.toml'}` extends itself: a -> b -> a"


@pytest.mark.parametrize(
    ("override", "path", "value"),
    [
        ("train.steps=7", "train.steps", 7),
        ("train.learning_rate=1", "train.learning_rate", 1.0),
        ("train.learning_rate=3e-5", "train.learning_rate", 3e-5),
        ("weights.transfer=full", "weights.transfer", "full"),
        ('weights.transfer="full"', "weights.transfer", "full"),
        ("model.path=a=b", "model.path", "a=b"),
        ("model.revision=12", "model.revision", "12"),
        ("eval.benchmarks=aime24,amc", "eval.benchmarks", ["aime24", "amc"]),
        ("eval.benchmarks=[aime24, amc]", "eval.benchmarks", ["aime24", "amc"]),
        ('eval.benchmarks=["aime24"]', "eval.benchmarks", ["aime24"]),
        ("eval.benchmarks=[]", "eval.benchmarks", []),
        ("data.levels=add2", "data.levels", ["add2"]),
        ("launch.deterministic=true", "launch.deterministic", True),
        ("launch.deterministic=True", "launch.deterministic", True),
        ("launch.max_restarts=none", "launch.max_restarts", None),
        ("resources.engine.env.A=3", "resources.engine.env", {"A": "3"}),
        ("train.betas=[0.9, 0.95]", "train.betas", (0.9, 0.95)),
        ("rollout.max_running_requests=auto", "rollout.max_running_requests", "auto"),
        ("rollout.max_running_requests=none", "rollout.max_running_requests", "auto"),
        ("rollout.max_running_requests=7", "rollout.max_running_requests", 7),
        ("rollout.running_ceiling.48=16", "rollout.running_ceiling", {"48": 16}),
    ],
)
def test_set_reads_a_value_as_its_field_takes_it(override: str, path: str, value: Any) -> None:
    found: Any = recipe_io.load(TINY, [override])
    for key in path.split("."):
        found = getattr(found, key)
    assert found == value and type(found) is type(value)


def test_later_overrides_win() -> None:
    assert recipe_io.load(TINY, ["train.steps=7", "train.steps=9"]).train.steps == 9


@pytest.mark.parametrize(
    ("override", "message", "hint"),
    [
        ("train.stepz=3", f"recipe `{TINY}`: unknown key `train.stepz` (= 3)", "did you mean `train.steps`?"),
        ("group_size=4", f"recipe `{TINY}`: unknown key `group_size` (= 4)", "did you mean `rollout.group_size`?"),
        ("trian.steps=4", f'recipe `{TINY}`: unknown key `trian` (= {{"steps": 4}})', "did you mean `train`?"),
        (
            "train.foo=1",  # nothing is like it: its own table is no suggestion
            f"recipe `{TINY}`: unknown key `train.foo` (= 1)",
            "`astra recipes show NAME` prints every key of a recipe with its value",
        ),
        (
            "train.steps=many",
            f'recipe `{TINY}`: `train.steps` = "many" is not allowed: it takes a whole number greater than 0',
            "`astra recipes show NAME` prints every key of a recipe with its value",
        ),
        (
            "weights.transfer=delt",
            f'recipe `{TINY}`: `weights.transfer` = "delt" is not allowed: it takes `full` or `delta` or `adapter`',
            "`astra recipes show NAME` prints every key of a recipe with its value",
        ),
        (
            "algorithm.name=m3po",
            f'recipe `{TINY}`: `algorithm.name` = "m3po" is not allowed: there is no such algorithm',
            "did you mean `m2po`? known: cispo, dapo, decoupled, distill, dr_grpo, grpo, gspo, m2po, tis",
        ),
        (
            "algorithm.m2po.m2_treshold=0.01",
            f"recipe `{TINY}`: unknown key `algorithm.m2po.m2_treshold` (= 0.01)",
            "did you mean `algorithm.m2po.m2_threshold`?",
        ),
        (
            "algorithm.m2po.m2_threshold=0",
            f"recipe `{TINY}`: `algorithm.m2po.m2_threshold` = 0 is not allowed: it takes a number greater than 0",
            "`astra recipes show NAME` prints every key of a recipe with its value",
        ),
        (
            "algorithm.tis.weight_cap=big",  # not the algorithm of the recipe, and checked all the same
            f'recipe `{TINY}`: `algorithm.tis.weight_cap` = "big" is not allowed: it takes a number greater than 0',
            "`astra recipes show NAME` prints every key of a recipe with its value",
        ),
        (
            "algorithm.m3po.variant=clip",
            f'recipe `{TINY}`: unknown key `algorithm.m3po` (= {{"variant": "clip"}})',
            "did you mean `algorithm.m2po`?",
        ),
        (
            "algorithm.m2_threshold=0.01",  # where it stood before algorithms had tables
            f"recipe `{TINY}`: `algorithm.m2_threshold` = 0.01 is a setting of one algorithm: "
            "it is now `algorithm.m2po.m2_threshold`",
            "`astra recipes show NAME` prints every key of a recipe with its value",
        ),
        (
            "algorithm.weight_cap=2",
            f"recipe `{TINY}`: `algorithm.weight_cap` = 2 is a setting of one algorithm: "
            "it is now `algorithm.decoupled.weight_cap` or `algorithm.tis.weight_cap`",
            "`astra recipes show NAME` prints every key of a recipe with its value",
        ),
        ("train.steps", "`--set train.steps` is not of the form key.name=value", "for example `--set train.steps=20`"),
        ("train.steps.x=1", "`--set train.steps.x=1`: `train.steps` is a value, not a table", None),
    ],
)
def test_bad_overrides(override: str, message: str, hint: str | None) -> None:
    error = refused(TINY, override)
    assert (error.message, error.hint) == (message, hint)


def test_every_key_that_moved_is_told_at_once() -> None:
    error = refused(TINY, "algorithm.variant=mask", "algorithm.clip_high=0.3", "algorithm.name=dapo")
    assert error.message.count("is a setting of one algorithm: it is now") == 2
    assert "`algorithm.m2po.variant`" in error.message and "`algorithm.dapo.clip_high`" in error.message


def test_an_unknown_benchmark_gets_the_nearest_name() -> None:
    error = refused(TINY, "eval.benchmarks=arithmetic-held")
    assert error.message.endswith('`eval.benchmarks` = "arithmetic-held" is not allowed: there is no such benchmark')
    assert error.hint is not None and error.hint.startswith("did you mean `arithmetic-heldout`")


def test_one_suggestion_for_two_keys_stands_once(tmp_path: Path) -> None:
    mine = tmp_path / "mine.toml"
    mine.write_text(f'extends = "{TINY}"\n[train]\nstep = 1\nstepz = 1\n')
    assert refused(str(mine)).hint == "did you mean `train.steps`?"


def test_a_file_of_that_name_is_pointed_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine.toml").write_text(f'extends = "{TINY}"\n')
    monkeypatch.chdir(tmp_path)
    assert refused("mine").hint == "a file is meant by its path: `mine.toml`"
    assert recipe_io.load("mine.toml").name == "mine"


def test_unknown_recipe_names_the_nearest() -> None:
    error = refused("qwen3.5-tiny-m2po-detla")
    assert error.message == "there is no recipe `qwen3.5-tiny-m2po-detla`"
    assert error.hint is not None
    assert error.hint.startswith("did you mean `qwen3.5-tiny-m2po-delta`")
    assert error.hint.endswith("`astra recipes list`")


def test_a_parent_that_is_unknown_is_said_with_the_file_that_names_it(tmp_path: Path) -> None:
    child = tmp_path / "mine.toml"
    child.write_text('extends = "qwen3.5-tiny-m2po-detla"\n')
    error = refused(str(child))
    assert error.message == f"recipe `{child}`, `extends`: there is no recipe `qwen3.5-tiny-m2po-detla`"
    assert error.hint is not None and error.hint.startswith("did you mean `qwen3.5-tiny-m2po-delta`")


def test_own_samples_bound_pass_k() -> None:
    assert "`gsm8k` is asked 4 samples" in refused(TINY, "eval.pass_k=5", 'eval.benchmarks=["gsm8k"]').message
    assert recipe_io.load(TINY, ["eval.pass_k=9", "eval.samples=9"]).eval.pass_k == 9


def test_unreadable_files(tmp_path: Path) -> None:
    (tmp_path / "bad.toml").write_text("[model\n")
    (tmp_path / "latin.toml").write_bytes(b'description = "\xe9"\n')
    (tmp_path / "list.json").write_text("[]")
    assert refused(str(tmp_path / "bad.toml")).message.startswith(
        f"recipe `{tmp_path / 'bad.toml'}` is not valid TOML:"
    )
    assert "is not UTF-8 text" in refused(str(tmp_path / "latin.toml")).message
    assert refused(str(tmp_path / "none.toml")).message == f"there is no recipe file `{tmp_path / 'none.toml'}`"
    assert refused(f"{tmp_path}/").message == f"cannot read recipe file `{tmp_path}`: is a directory"
    assert refused(str(tmp_path / "list.json")).message.endswith("holds no recipe: a JSON object is needed")


def test_resolved_json_and_toml_read_back_equal(tmp_path: Path) -> None:
    recipe = recipe_io.load("qwen3.5-4b-m2po-delta", ["resources.engine.env.A_B=x y", "data.template=é {question}"])
    (tmp_path / "recipe.json").write_text(recipe_io.to_json(recipe))
    (tmp_path / "r.toml").write_text(recipe_io.to_toml(recipe))
    assert recipe_io.load(tmp_path / "recipe.json") == recipe
    assert recipe_io.load(str(tmp_path / "r.toml")) == recipe
    longer = recipe_io.load(tmp_path / "recipe.json", ["train.steps=900"])
    assert longer.train.steps == 900
    assert json.loads(recipe_io.to_json(recipe))["resources"]["engine"]["env"] == {"A_B": "x y"}


def test_source_text_keeps_comments() -> None:
    text = recipe_io.source_text(TINY)
    assert text.startswith("# As qwen3.5-tiny-m2po-full")
    with pytest.raises(UserError, match="there is no recipe `nope`"):
        recipe_io.source_text("nope")
