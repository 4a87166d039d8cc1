"""The references in docs/ are what the code says, and what the how-tos show works."""

import ast
import json
import os
import re
import shlex
import shutil
import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest
import warm
from conftest import Ran

ROOT = Path(__file__).resolve().parent.parent


def test_references_are_up_to_date() -> None:
    done = warm.run([str(ROOT / "scripts" / "make_docs.py"), "--check"], cwd=ROOT)
    assert done.returncode == 0, done.stderr


def test_every_command_and_recipe_key_is_there() -> None:
    from astracli.config.recipe import Recipe

    cli, recipe = ((ROOT / "docs" / name).read_text() for name in ("cli.md", "recipe.md"))
    assert "--compare" in cli and "### astra runs report" in cli
    tables = {
        "expected": "`expected.source`",
        "lora": "`lora.rank`",
        "sft": "`sft.completion_field`",
    }  # that may be absent
    for key, field in Recipe.model_fields.items():
        inner = getattr(field.annotation, "model_fields", None)
        for name in inner or [None]:
            wanted = f"`{key}.{name}`" if name else tables.get(key, f"`{key}`")
            assert wanted in recipe or f"[{key}.{name}" in recipe, wanted


def said_by_the_code() -> str:
    """Every string constant of the package, the constant parts of formatted ones joined by `...`."""
    found = []
    for file in (ROOT / "astracli").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                found.append("".join(str(p.value) if isinstance(p, ast.Constant) else "..." for p in node.values))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return "\n".join(found).replace("`", "")


def test_troubleshooting_quotes_what_the_code_says() -> None:
    """Messages in the first column, cut at their values, stand in the code; renamed ones must be renamed here."""
    said = said_by_the_code()
    rows = [line.split(" | ")[0] for line in (ROOT / "docs" / "troubleshooting.md").read_text().splitlines()]
    quoted = [text for row in rows if row.startswith("| ") for text in re.findall(r"`([^`]*(?:\.\.\.| )[^`]*)`", row)]
    assert len(quoted) > 35
    for text in quoted:
        for part in text.removeprefix("| ").split("..."):
            assert part.strip(" ;,()") in said, (text, part)


def anchors(page: Path) -> set[str]:
    """What `#...` may name in a page: its headings as GitHub writes them."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_links_between_documents_lead_somewhere() -> None:
    for page in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]:
        for target, anchor in re.findall(r"\]\(([^)#]*)(?:#([^)]*))?\)", page.read_text(encoding="utf-8")):
            if target.startswith("http"):
                continue
            place = page.parent / target if target else page
            assert place.exists(), (page.name, target)
            assert not anchor or anchor in anchors(place), (page.name, target, anchor)
    linked = (ROOT / "README.md").read_text() + "".join(p.read_text() for p in (ROOT / "docs").glob("*.md"))
    for page in (ROOT / "docs").glob("*.md"):
        assert f"{page.name})" in linked, f"nothing leads to docs/{page.name}"


def test_the_adapter_of_the_howto_passes_its_check(tmp_path: Path) -> None:
    """The package of docs/adapters-howto.md, its two files as they stand there."""
    blocks = re.findall(r"```(toml|python)\n(.*?)```", (ROOT / "docs" / "adapters-howto.md").read_text(), re.S)
    files = dict(blocks)
    (tmp_path / "astra_seed_oss.py").write_text(files["python"])
    points = tomllib.loads(files["toml"])["project"]["entry-points"]["astra.adapters"]
    info = tmp_path / "astra_seed_oss-0.1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: astra-seed-oss\nVersion: 0.1\n")
    (info / "entry_points.txt").write_text("[astra.adapters]\n" + "".join(f"{k} = {v}\n" for k, v in points.items()))
    words = ["-m", "astracli", "adapters", "check", "seed_oss", "--json"]
    done = warm.run(words, env={**os.environ, "PYTHONPATH": str(tmp_path)})
    report = json.loads(done.stdout)
    assert done.returncode == 0 and report["ok"], report
    assert [check["name"] for check in report["checks"]] == [
        "load", "block classes", "wire names", "parameter count", "output head", "padded rows == separate",
        "packed row == separate",
    ]  # fmt: skip


def write_files(page: str, folder: Path) -> None:
    """The blocks of a page that are marked as files."""
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    for name, content in re.findall(r"<!-- file: (\S+) -->\n```\w*\n(.*?)```", text, re.S):
        (folder / name).write_text(content)


@pytest.fixture
def howto(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory with the files of docs/recipes-howto.md, and the data that its recipes name."""
    write_files("recipes-howto.md", tmp_path)
    facts = [{"context": f"{n} and 2.", "problem": f"{n}+2", "answer": n + 2} for n in (11, 12, 13, 14)]
    many = [{"problem": f"{n}+10", "answer": n + 10} for n in range(10, 90)]
    for name, rows in {"facts": facts, "many": many, "my_set/train": many, "my_set/test": facts}.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    return tmp_path


def test_prompts_of_the_howto_are_what_it_says(howto: Path) -> None:
    from astracli.config import recipe_io
    from astracli.data import benchmarks, datasets
    from astracli.data.prompts import PromptSource

    def problems(name: str, n: int = 4) -> list:
        recipe = recipe_io.load(f"./{name}.toml")
        source = PromptSource(recipe.data, 0, datasets.fetch(recipe))
        benchmarks.fetch_all(recipe.eval.benchmarks, None, recipe)
        return [source.problem(i) for i in range(n)]

    chat = {problem.question: problem for problem in problems("chat")}
    assert len(chat) == 4 and chat["12+34"].messages[0] == {"role": "system", "content": "Be brief."}
    assert chat["80-17"].row["topic"] == "differences" and chat["80-17"].answer == "63"
    assert len({problem.id for problem in problems("splits", 80)}) == 80
    turns = next(p.messages for p in problems("prompt") if p.answer == "13")
    assert [turn["role"] for turn in turns] == ["system", "user", "assistant", "user"]
    assert turns[3]["content"] == "11 and 2.\n\nQuestion: 11+2"
    mixed = problems("mix", 4)
    assert [problem.source for problem in mixed].count("sums") == 3
    asked = {p.source: p.messages[-1]["content"] for p in mixed}
    assert re.fullmatch(r"\d\d\+\d\d", asked["sums"]) and re.fullmatch(r"\d\d and 2\. \d\d\+2", asked["facts"])
    held = recipe_io.load("./heldout.toml")
    items = benchmarks.load("holdout", "many.jsonl", recipe=held).items
    trained = {problem.question for problem in datasets.load(held.data, "many.jsonl")}
    assert "holdout" in held.eval.benchmarks and len(items) + len(trained) == 80
    assert 1 < len(items) < 20 and not trained & {item.question for item in items}
    own = recipe_io.load("./benchmarks.toml")
    assert benchmarks.load("facts", "facts.jsonl", recipe=own).samples == 8
    thinking = recipe_io.load("./thinking.toml")
    assert (thinking.model.thinking, thinking.rollout.stop) == ("on", ["</answer>"])
    assert 'thinking = "on"' in recipe_io.to_toml(thinking)


def test_a_base_model_of_the_howto_is_asked_in_bare_text(howto: Path, astra: Callable[..., Ran]) -> None:
    """The shipped model without its chat template, as a directory of a base model would be."""
    from astracli.config import recipe_io
    from astracli.data import datasets, fetch
    from astracli.data.prompts import PromptSource
    from astracli.models.chat import bare_text

    shutil.copytree(fetch.bundled("astra:tiny"), howto / "base-model")
    (howto / "base-model" / "chat_template.jinja").unlink()
    config = howto / "base-model" / "tokenizer_config.json"
    config.write_text(json.dumps({k: v for k, v in json.loads(config.read_text()).items() if k != "chat_template"}))
    ran = astra("train", "./base.toml", "--dry-run")
    assert ran.code == 0 and "warning: no chat template in" in ran.err, ran.err
    recipe = recipe_io.load("./base.toml")
    problem = PromptSource(recipe.data, 0, datasets.fetch(recipe)).problem(0)
    asked = f"Question: {problem.question}\nAnswer:"
    assert bare_text(problem.messages) == f"Question: 11+22\nAnswer: 33\n\n{asked}"
    assert recipe.rollout.stop == ["\nQuestion:"] and "holdout" in recipe.eval.benchmarks


WISHES = """train on chat messages; choose splits; use extra columns in a reward; add several rewards by weight; ask a
judge over HTTP; add a system prompt; show examples before every question (few-shot); let the model think; end answers
at a stop string; evaluate with other sampling; train on several sets; hold out questions for evaluation; keep the
checkpoint with the best score; change the learning rate on a resume; compare several runs; use astra from Python; send
metrics to other tools; log figures of a reward; add a model family as a package; add a loss as a package; train a base
model on your own set; export and serve the trained model"""
MARKED = r"<!-- (?:file: \S+|test: \w+|\w+\.py|examples/\S+) -->\n```"
"""A block that a test takes from the page."""


def test_every_wish_has_an_example_that_a_test_runs() -> None:
    text = (ROOT / "docs" / "recipes-howto.md").read_text(encoding="utf-8")
    table = text.split("## Wishes")[1].split("## More")[0]
    rows = re.findall(r"^\| (.*?) \| \[.*?\]\(([^)#]*)#([^)]*)\) \|$", table, re.M)
    assert [wish for wish, *_ in rows] == " ".join(WISHES.split()).split("; ") and len(rows) == 22
    for wish, page, anchor in rows:
        said = (ROOT / "docs" / (page or "recipes-howto.md")).read_text(encoding="utf-8")
        parts = re.split(r"^#+ (.*)$", said, flags=re.M)
        (section,) = (
            body
            for heading, body in zip(parts[1::2], parts[2::2], strict=True)
            if re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") == anchor
        )
        assert re.search(MARKED, section), wish


def test_the_path_from_rows_to_a_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, astra: Callable[..., Ran]
) -> None:
    """docs/own-data.md as it stands there; commands that start processes are run to their plan."""
    from astracli.config import recipe_io
    from astracli.data import datasets
    from astracli.rewards.reward import GradeItem, GradePool, Rewards

    monkeypatch.chdir(tmp_path)
    write_files("own-data.md", tmp_path)
    exec(compile((tmp_path / "make_rows.py").read_text(), "make_rows.py", "exec"), {})
    page = (ROOT / "docs" / "own-data.md").read_text(encoding="utf-8")
    blocks = re.findall(r"<!-- test: commands -->\n```bash\n(.*?)```", page, re.S)
    commands = [shlex.split(line)[1:] for block in blocks for line in block.splitlines()]
    assert [words[0] for words in commands] == ["recipes", "train", "rollout", "runs", "train", "runs", "runs", "eval"]
    for words in commands:
        if words[0] in ("recipes", "train"):
            ran = astra(*words, *(["--dry-run"] if words[0] == "train" and "--dry-run" not in words else []))
            assert ran.code == 0, (words, ran.err)
    recipe = recipe_io.load("./sums.toml")
    rows = datasets.load(recipe.data, tmp_path / "sums.csv")
    problem = rows[0]
    limit = int(problem.row["limit"])
    texts = [f"\\boxed{{{problem.answer}}}".rjust(limit)[-limit:], f"{problem.answer} " * 9, "no", "1 " * limit]
    asked = [GradeItem(problem.question, problem.answer, text, None, problem.messages, problem.row) for text in texts]
    with GradePool(rewards=Rewards.of(recipe.data)) as pool:
        found = pool.grade(asked)
    assert [round(grade.reward, 6) for grade in found] == [1.0, 0.8, 0.2, 0.0]
    assert [grade.verdict for grade in found] == ["right", "right", "wrong", "wrong"]
    assert found[2].notes == {"read": "nothing"} and found[1].parts == {"right": 1.0, "short": 0.0}


def test_a_mix_of_the_howto_trains_and_is_evaluated_apart(howto: Path) -> None:
    """A whole run: two sources with their rewards, a held-out question, a stop string."""
    small = {
        "train.steps": 2,
        "train.batch_groups": 4,
        "train.minibatches": 1,
        "rollout.group_size": 4,
        "eval.every": 2,
    }
    small |= {"rollout.max_new_tokens": 12, "eval.samples": 4, "checkpoint.every": 0, "data.reward": "probe"}
    small |= {"eval.benchmarks": "[]", "rollout.stop": '["1", "7"]', "launch.deterministic": "true"}
    given = [word for key, value in small.items() for word in ("--set", f"{key}={value}")]
    words = ["-m", "astracli", "train", "./mix.toml", *given, "--set", "metrics.samples_per_step=16", "--run-dir", "r"]
    done = warm.run(words, cwd=howto)
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for file in (howto / "r" / "samples").glob("*.jsonl") for line in file.open()]
    assert {line["source"] for line in lines} >= {"sums"}
    texts = {line["completion"]: line["finish_reason"] for line in lines}
    assert any("1" in text or "7" in text for text in texts)
    for text, reason in texts.items():
        ends = [i for i, letter in enumerate(text) if letter in "17"]
        assert ends in ([], [len(text) - 1]) and (reason == "stop" or not ends), (text, reason)
    summary = json.loads((howto / "r" / "summary.json").read_text())
    assert [row["benchmark"] for row in summary["benchmarks"]] == ["holdout:facts"]
    assert summary["prompts"]["sources"] == "sums 75.0%, facts 25.0%"
    assert set(summary["training"]["reward_means_by_source"]) == {"facts", "sums"}
