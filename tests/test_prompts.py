"""Order of problems, files of every kind, and messages for data that does not fit."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from astracli.config.benchmarks import MATH_PROMPT
from astracli.config.recipe_data import DataTable
from astracli.data import datasets
from astracli.data.prompts import PromptSource, stop_token_ids
from astracli.data.turns import render
from astracli.errors import UserError

FIXTURE = Path(__file__).parent / "fixtures" / "problems.jsonl"


def write_rows(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def numbered(tmp_path: Path, n: int) -> Path:
    return write_rows(tmp_path / "n.jsonl", [{"problem": f"q{i}", "answer": str(i)} for i in range(n)])


def test_arithmetic_source_is_the_generated_family() -> None:
    source = PromptSource(DataTable(source="arithmetic", levels=["add2"]), seed=7)
    assert source.problem(10**9).meta["level"] == "add2"
    assert source.problem(3) == source.problem(3)
    assert source.problem(0).messages == ({"role": "user", "content": source.problem(0).question},)


def test_every_epoch_is_a_new_permutation_addressed_by_index(tmp_path: Path) -> None:
    path = numbered(tmp_path, 20)
    data = DataTable(source=str(path))
    source = PromptSource(data, 1, path)
    assert len(source) == 20
    epochs = [[source.problem(e * 20 + i).answer for i in range(20)] for e in range(3)]
    assert all(sorted(epoch) == sorted(map(str, range(20))) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    resumed = PromptSource(data, 1, path)
    assert [resumed.problem(i).answer for i in (59, 41, 3)] == [epochs[2][19], epochs[2][1], epochs[0][3]]
    assert [PromptSource(data, 2, path).problem(i).answer for i in range(20)] != epochs[0]


def test_prompt_keeps_braces(tmp_path: Path) -> None:
    assert render(MATH_PROMPT, "what is {x}?").endswith("within \\boxed{}.")
    assert render("{question}!", "{question}") == "{question}!"


def test_fixture_rows_of_math500_and_gsm8k() -> None:
    loaded = datasets.load(DataTable(source=str(FIXTURE)))
    assert len(loaded) == 7 and loaded.duplicates == 0
    assert loaded[0].answer == "\\left( 3, \\frac{\\pi}{2} \\right)"
    assert [p.answer for p in loaded[4:]] == ["18", "3", "70000"]


def test_parquet_and_datasets_directories_read_the_same(tmp_path: Path) -> None:
    import datasets as hf
    import pyarrow
    import pyarrow.parquet

    rows = {"q": ["1+1", "2+2"], "a": [2, 4.0]}
    pyarrow.parquet.write_table(pyarrow.table({"q": rows["q"], "a": [2.0, 4.0]}), tmp_path / "t.parquet")
    hf.DatasetDict({"train": hf.Dataset.from_dict({"q": rows["q"], "a": [2, 4]})}).save_to_disk(str(tmp_path / "saved"))
    for name in ("t.parquet", "saved"):
        table = DataTable(source=str(tmp_path / name), question_field="q", answer_field="a")
        assert [(p.question, p.answer) for p in datasets.load(table)] == [("1+1", "2"), ("2+2", "4")]
    table = DataTable(source=str(tmp_path / "saved"), split="test", question_field="q", answer_field="a")
    with pytest.raises(UserError, match="has no split `test`: train"):
        datasets.load(table)


def test_nested_fields_lists_ids_and_duplicates(tmp_path: Path) -> None:
    rows = [
        {"unique_id": "x", "problem": "a", "reward_model": {"ground_truth": ["1", "2"]}},
        {"unique_id": "x", "problem": "a", "reward_model": {"ground_truth": 3}},
    ]
    path = write_rows(tmp_path / "d.jsonl", rows)
    loaded = datasets.load(DataTable(source=str(path), answer_field="reward_model.ground_truth"))
    assert [(p.id, p.answer) for p in loaded] == [("x", "1, 2"), ("x#1", "3")]
    assert loaded.duplicates == 1


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"question": "q", "answer": "1"}\n', "row 1 of .* has no field `problem`; its fields: `question`, `answer`"),
        ('{"problem": "q", "answer": "1"}\n{"problem": "q", "answer": " "}\n', "row 2 of .*field `answer` is empty"),
        ('{"problem": "q", "answer": {"a": 1}}\n', "field `answer` is dict, not text"),
        ('{"problem": "q", "answer": true}\n', "field `answer` is bool, not text"),
        ('{"problem": "q"\n', "line 1 is not JSON"),
        ("[1]\n", "line 1 is no JSON object but list"),
        ("\n", "holds no rows"),
    ],
)
def test_bad_rows_are_named(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text(content)
    with pytest.raises(UserError, match=message):
        datasets.load(DataTable(source=str(path)))


def test_sources_that_are_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ASTRA_DATA_DIR", raising=False)

    def fetch(source: str) -> str | None:
        return datasets.fetch(SimpleNamespace(training_data=DataTable(source=source)))[""]  # type: ignore[arg-type]

    assert fetch("arithmetic") is None
    with pytest.raises(UserError, match="no data at"):
        fetch("missing.jsonl")
    with pytest.raises(UserError) as caught:
        fetch("deepscalar")
    assert caught.value.hint == "did you mean `deepscaler`?"
    (tmp_path / "train").mkdir()
    monkeypatch.setenv("ASTRA_DATA_DIR", str(tmp_path))
    path = numbered(tmp_path / "train", 3)
    assert fetch("n") == str(path)
    table = DataTable(source="n", path=str(tmp_path / "train"))
    assert datasets.fetch(SimpleNamespace(training_data=table)) == {"": str(path)}  # type: ignore[arg-type]
    monkeypatch.setenv("ASTRA_DATA_DIR", str(tmp_path / "no"))
    with pytest.raises(UserError, match="is no directory"):
        fetch("n")


def test_known_sets_bring_their_own_fields(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "g.jsonl", [{"question": "q", "answer": "so 9*9=81\n#### 1,081"}])
    for source in ("gsm8k", "openai/gsm8k"):
        assert datasets.load(DataTable(source=source), path)[0].answer == "1081"
    path = write_rows(tmp_path / "d.jsonl", [{"prompt": "q", "solution": "34"}])
    assert datasets.load(DataTable(source="dapo"), path)[0].answer == "34"


def test_hub_set_becomes_one_local_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import astracli.data.fetch as hub

    snapshot = tmp_path / "0123456789abcdef"
    (snapshot / "main").mkdir(parents=True)
    write_rows(snapshot / "main" / "train-00000.jsonl", [{"question": "q", "answer": "#### 5"}])
    write_rows(snapshot / "main" / "test-00000.jsonl", [{"question": "t", "answer": "#### 6"}])
    asked = []
    monkeypatch.setattr(hub, "fetch_dataset", lambda name, revision: asked.append((name, revision)) or snapshot)
    monkeypatch.setenv("ASTRA_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.delenv("ASTRA_DATA_DIR", raising=False)
    path = datasets.fetch(SimpleNamespace(training_data=DataTable(source="gsm8k", revision="v1")))[""]  # type: ignore[arg-type]
    assert asked == [("openai/gsm8k", "v1")]
    assert path is not None and Path(path).name == "openai--gsm8k-main-train-0123456789ab.jsonl"
    assert PromptSource(DataTable(source="gsm8k"), 0, path).problem(4).answer == "5"


def test_stop_tokens_of_tokenizer_and_generation_config(tmp_path: Path) -> None:
    tokenizer = SimpleNamespace(eos_token_id=2)
    assert stop_token_ids(tokenizer, tmp_path) == [2]
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [7, 2]}')
    assert stop_token_ids(tokenizer, tmp_path) == [2, 7]
