"""Supervised training: which tokens an example trains, the loss of a step by hand, kills, ranks, and who is served."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import configs
import numpy as np
import pytest
import torch
from chat_models import ENDS, tokenizer
from hub_tools import open_store
from launch_tools import tiny
from machines import facts
from safetensors.torch import load_file
from test_hub_api import TOKEN, Server
from test_plan import TINY, load, planned
from trainer_job import FakeReporter
from training_tools import make_trainer, recipe, save_model, spawn

from astracli.adapters.qwen3_5 import ADAPTER
from astracli.cli.main import run as astra
from astracli.config.recipe import Recipe
from astracli.data import arithmetic, datasets, fetch
from astracli.data.examples import Example, ExampleTokens
from astracli.errors import RunFailed, UserError
from astracli.launch import example_inputs, from_run
from astracli.models.adapter import load_tokenizer
from astracli.models.chat import ChatFormat
from astracli.process.config import SampleFile, TrainerConfig
from astracli.rl.batch import Row, pad_rows
from astracli.rl.types import Group, Sample, Segment
from astracli.rollout.groups import SampleWriter
from astracli.runs import metrics
from astracli.runs.run_dir import RunDir
from astracli.training import checkpoint, packing, random_weights
from astracli.training.batches import group_of
from astracli.training.fsdp import Ranks
from astracli.training.loop import TrainLoop
from astracli.training.supervised import Targets, train_on_examples

GOOD = ("qwen3_5", "qwen2_5", "llama3", "smollm")
STEPS = 5


def asking(**tables: dict[str, Any]) -> Recipe:
    return recipe(**({"sft": {}} | tables))


def examples(tmp_path: Path, rows: Sequence[dict[str, Any]], name: str = "qwen3_5", **tables: Any) -> list[Example]:
    """The rows of a file as examples, by a chat template's name."""
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    table = {"source": str(file)} | tables.pop("data", {})
    chosen = asking(data=table, **tables)
    made = ExampleTokens(chosen, tokenizer(name))
    return [made(problem) for problem in datasets.load(chosen.training_data, file)]


def trained(example: Example, name: str) -> list[str]:
    return [tokenizer(name).decode(ids) for ids, learned in example.parts if learned]


def whole(example: Example) -> list[int]:
    return [*example.prompt, *(token for ids, _ in example.parts for token in ids)]


TALK = [
    {"role": "system", "content": "be brief"},
    {"role": "user", "content": "1+1"},
    {"role": "assistant", "content": "two"},
    {"role": "user", "content": "and 2+2"},
    {"role": "assistant", "content": "four"},
]


@pytest.mark.parametrize("name", GOOD)
def test_assistant_turns_are_trained_with_the_token_that_ends_them(name: str, tmp_path: Path) -> None:
    (one,) = examples(tmp_path, [{"messages": TALK}], name)
    end, coder = ENDS.get(name, "<|im_end|>"), tokenizer(name)
    assert trained(one, name) == [f"two{end}", f"four{end}"]
    chat = ChatFormat()
    assert one.prompt == chat.tokens(coder, TALK[:2]), "asked as a rollout asks"
    (last,) = examples(tmp_path, [{"messages": TALK}], name, sft={"loss_on": "last"})
    assert trained(last, name) == [f"four{end}"]
    assert last.prompt == chat.tokens(coder, TALK[:4])


def test_a_column_of_answers_comes_before_the_rows_own_last_turn_and_shown_examples_are_not_trained(
    tmp_path: Path,
) -> None:
    rows = [
        {"problem": "1+1", "completion": "two <|im_end|>"},
        {"problem": TALK[:4], "completion": [{"role": "assistant", "content": "4"}]},
        {"problem": TALK},
    ]
    shots = [{"question": "0+0", "answer": "zero"}]
    first, second, third = examples(
        tmp_path, rows, data={"few_shot": shots, "template": "say {question}", "system": "sum"}
    )
    assert trained(first, "qwen3_5") == ["two <|im_end|><|im_end|>"]
    letters = first.parts[0][0]
    special = tokenizer("qwen3_5").convert_tokens_to_ids("<|im_end|>")
    assert letters.count(special) == 1 and letters[-1] == special, "markup in an answer is letters"
    said = tokenizer("qwen3_5").decode(first.prompt)
    assert "zero" in said and "say 1+1" in said and "sum" in said
    assert trained(second, "qwen3_5") == ["two<|im_end|>", "4<|im_end|>"]
    assert trained(third, "qwen3_5") == ["two<|im_end|>", "four<|im_end|>"]


def test_a_base_model_without_a_template_learns_its_end_of_sequence(tmp_path: Path) -> None:
    (one,) = examples(tmp_path, [{"problem": "1+1=", "completion": "2"}], "")
    assert tokenizer("").decode(whole(one)) == "1+1=2<|im_end|>" and trained(one, "") == ["2<|im_end|>"]


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"problem": "1+1"}, "there is no column `completion`, and no chat turns that end with one"),
        ({"problem": "1+1", "completion": " "}, "`completion` is empty"),
        ({"problem": TALK[:2]}, "no chat turns that end with one"),
    ],
)
def test_a_row_without_an_answer_is_named_before_a_start(row: dict[str, Any], said: str, tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(each) + "\n" for each in ({"problem": "0", "completion": "0", "id": "a"}, row)))
    chosen = asking(data={"source": str(file)}, model={"path": "astra:tiny"})
    with pytest.raises(UserError, match=said) as raised:
        example_inputs.check(chosen, fetch.bundled("astra:tiny"), {"": file})
    assert "row `1`" in raised.value.message


def test_a_template_that_cannot_be_rendered_in_parts_trains_the_last_turn_alone(tmp_path: Path) -> None:
    numbered = "{% for m in messages %}{{ loop.length }}{{ m.role }}: {{ m.content }}<|im_end|>{% endfor %}"
    with pytest.raises(UserError, match="in parts") as raised:
        examples(tmp_path, [{"messages": TALK}], numbered)
    assert raised.value.hint is not None and "sft.loss_on=last" in raised.value.hint
    (last,) = examples(tmp_path, [{"messages": TALK}], numbered, sft={"loss_on": "last"})
    assert trained(last, numbered) == ["four<|im_end|>"]


def test_examples_that_are_too_long_are_told_before_a_start(tmp_path: Path) -> None:
    chosen = asking(rollout={"context_length": 12, "max_new_tokens": 8}, model={"path": "astra:tiny"})
    with pytest.raises(UserError, match=r"none of the first 64 examples fits into rollout.context_length = 12"):
        example_inputs.check(chosen, fetch.bundled("astra:tiny"), {"": None})


# ---- a step ----------------------------------------------------------------------------------------------------------


def made_up(count: int, seed: int = 0, vocab: int = 64) -> list[Group]:
    """Examples of random tokens with one or two trained turns."""
    draw = np.random.default_rng(seed)
    found = []
    for index in range(count):
        parts = []
        for number in range(draw.integers(1, 3)):
            if number:
                parts.append(Segment(None, draw.integers(2, vocab, 3).astype(np.int32), np.zeros(0, np.float32)))
            size = int(draw.integers(2, 9))
            parts.append(Segment(0, draw.integers(2, vocab, size).astype(np.int32), np.zeros(size, np.float32)))
        prompt = draw.integers(2, vocab, draw.integers(2, 6)).astype(np.int32)
        found.append(Group(index, f"e{index}", prompt, [Sample(0, parts, "stop")]))
    return found


def rows_of(groups: Sequence[Group]) -> list[Row]:
    return [Row(index, group, group.samples[0], 0.0) for index, group in enumerate(groups)]


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("model"))


@torch.no_grad()
def cross_entropy(model: Any, groups: Sequence[Group]) -> float:
    """The mean over all trained tokens, row by row, from the logits."""
    total, count = 0.0, 0
    for row in rows_of(groups):
        ids = torch.from_numpy(row.tokens.astype(np.int64))
        logprobs = model(input_ids=ids[None]).logits[0].float().log_softmax(-1)
        mask = np.concatenate([np.zeros(row.prompt_length, bool), row.sample.loss_mask])
        for place in np.flatnonzero(mask):
            total -= float(logprobs[place - 1, ids[place]])
            count += 1
    return total / count


@pytest.mark.parametrize("way", ["packed", "padded"])
def test_the_loss_is_the_mean_cross_entropy_of_trained_tokens(model_dir: Path, way: str) -> None:
    chosen = asking(train={"minibatches": 1, "batch_groups": 6, "packing": way}, rollout={"temperature": 0.5})
    trainer, groups = make_trainer(model_dir, chosen), made_up(6)
    expected = cross_entropy(trainer.policy.model, groups)
    result = train_on_examples(trainer, groups, 0, None)
    assert result.metrics["loss"] == pytest.approx(expected, abs=1e-5), "the rollout's temperature plays no part"
    assert result.metrics["tokens"] == sum(row.loss_tokens for row in rows_of(groups))
    assert result.metrics["updates"] == 1 and result.metrics["rows_max_abs"] < 1e-4
    assert cross_entropy(trainer.policy.model, groups) < expected


def test_smoothed_labels_are_drawn_for_a_share_of_the_targets_whatever_the_packing() -> None:
    groups = made_up(200)
    rows, targets = rows_of(groups), Targets(0.25, [7, 9], seed=3)
    micro = packing.pack_rows(rows)
    drawn, own = targets.of(micro, 5), micro.target_N
    changed = drawn != own
    assert set(drawn[changed].tolist()) == {7, 9}
    assert np.mean(changed) == pytest.approx(0.25, abs=0.04)
    padded = [targets.of(pad_rows([row], 0), 5) for row in rows]
    assert (np.concatenate(padded) == drawn).all()
    assert not (targets.of(micro, 6) == drawn).all()


def test_the_tokens_of_smoothed_labels_are_those_of_texts_and_the_end() -> None:
    coder = load_tokenizer(fetch.bundled("astra:tiny"))
    found = ExampleTokens(asking(), coder).writable
    assert found == [1, *range(3, len(coder))], "neither <pad> nor <unk>"


SCRIPT = """
import json, sys
from pathlib import Path
from test_sft import asking, made_up
from training_tools import make_trainer
from astracli.training import fsdp
from astracli.training.supervised import Targets, train_on_examples
ranks = fsdp.join("cpu")
trainer = make_trainer(Path(sys.argv[1]), asking(train={"batch_groups": 7}), ranks)
found = [train_on_examples(trainer, made_up(7, step), step, Targets(0.1, [5, 6], 0)).metrics for step in range(2)]
print(json.dumps([[one[name] for name in ("loss", "grad_norm", "tokens", "entropy")] for one in found]))
ranks.close()
"""


def test_two_ranks_train_as_one_does(model_dir: Path) -> None:
    alone = make_trainer(model_dir, asking(train={"batch_groups": 7}))
    each = [train_on_examples(alone, made_up(7, step), step, Targets(0.1, [5, 6], 0)).metrics for step in range(2)]
    expected = [[one[name] for name in ("loss", "grad_norm", "tokens", "entropy")] for one in each]
    first, second = (json.loads(text) for text in spawn(SCRIPT, [str(model_dir)], 2))
    assert first == second
    assert np.array(first) == pytest.approx(np.array(expected), rel=1e-4)


# ---- the loop --------------------------------------------------------------------------------------------------------


class Job:
    """A hub, a run directory and a trainer in this process, on generated examples."""

    def __init__(self, directory: Path, *, engines: bool, **tables: dict[str, Any]):
        self.run_dir = directory / "run"
        self.run_dir.mkdir(parents=True)
        self.model = fetch.bundled("astra:tiny")
        self.recipe = asking(
            train={"steps": STEPS, "batch_groups": 4, "minibatches": 1, "learning_rate": 1e-3},
            checkpoint={"every": 2},
            weights={"transfer": "delta", "background": "off"},
            eval={"benchmarks": ["arithmetic-heldout"], "every": 2},
            model={"path": "astra:tiny"},
            **({"sft": {"label_smoothing": 0.1}} | tables),
        )
        self.names = ("engine0",) if engines else ()
        settings: dict[str, Any] = {"steps": STEPS, "eval_every": 2 * engines, "engines": self.names}
        self.store = open_store(directory, own_batches=True, batch_groups=4, history_steps=2, **settings)
        self.server, self.reporter = Server(self.store, directory), FakeReporter()

    def config(self, **changes: Any) -> TrainerConfig:
        engines = tuple({"name": name, "url": "http://x", "stage_dir": self.run_dir} for name in self.names)
        return configs.trainer(
            run_dir=self.run_dir, hub_url=self.server.url, token=TOKEN, recipe=self.recipe, model_path=self.model,
            engines=engines, data_paths={"": None}, **changes,
        )  # fmt: skip

    def loop(self, **changes: Any) -> TrainLoop:
        made = TrainLoop(self.config(**changes), self.reporter, Ranks())  # type: ignore[arg-type]
        made.start()
        return made

    def resume(self) -> TrainLoop:
        newest = checkpoint.latest(self.run_dir / "checkpoints")
        step = newest.step if newest else 0
        self.store.rewind(step, step)
        return self.loop(attempt=2, resume_step=step)

    def records(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.server.metrics.read_text().splitlines()]

    def versions(self) -> list[int]:
        return [int(path.name[1:]) for path in sorted((self.run_dir / "weights").glob("v*"))]


def finished(loop: TrainLoop) -> dict[str, torch.Tensor]:
    while loop.step < STEPS:
        assert loop.advance()
    loop.finish()
    return loop.trainer.masters.wire_full()


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    """Weights of a run that nothing interrupted, with nobody to serve."""
    job = Job(tmp_path_factory.mktemp("whole"), engines=False)
    found = finished(job.loop())
    job.server.thread.stop()
    assert job.versions() == [], "nobody is there to evaluate: nothing is published"
    lines = [line for line in job.records() if "loss" in line]
    assert [line["step"] for line in lines] == list(range(STEPS))
    assert {"loss", "tokens", "lr", "grad_norm", "tokens_per_s", "epoch", "too_long", "step_s"} <= lines[0].keys()
    assert (job.run_dir / "export" / "model.safetensors").is_file()
    assert job.store.state().counts.consumed_steps == STEPS
    return found


class Killed(BaseException):
    """The process is gone: nothing after it runs."""


@pytest.mark.parametrize("where", ["train", "save", "ack"])
def test_a_kill_at_any_point_changes_nothing(
    expected: dict[str, torch.Tensor], where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def die(*arguments: Any, **options: Any) -> Any:
        raise Killed

    job = Job(tmp_path, engines=False)
    loop = job.loop()
    while loop.step < 3:
        assert loop.advance()
    assert loop.hub is not None
    targets: dict[str, tuple[Any, str]] = {
        "train": (loop.source, "train"),
        "save": (loop.saver, "begin"),
        "ack": (loop.hub, "ack"),
    }
    with monkeypatch.context() as patch:
        patch.setattr(*targets[where], die)
        with pytest.raises(Killed):
            loop.advance()
    loop.saver.wait()  # a process that is gone writes no more
    again = job.resume()
    assert again.step == (4 if where == "ack" else 2)
    found = finished(again)
    job.server.thread.stop()
    assert found.keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in found.items())
    assert job.store.state().counts.consumed_steps == STEPS


def test_engines_get_the_versions_that_are_evaluated_and_a_stop_ends_the_loop(tmp_path: Path) -> None:
    job = Job(tmp_path, engines=True)
    loop = job.loop()
    assert job.versions() == [0]
    while loop.step < 4:
        assert loop.advance()
    assert job.versions() == [0, 2, 4]
    assert [one.due_step for one in job.store.state().evals] == [0, 2], "the one that waits stands for step 4 too"
    assert job.store.target("engine0").version == 0, "pinned there by the evaluation of step 0"
    job.reporter.stop_requested.set()
    assert not loop.advance()
    job.server.thread.stop()


def test_in_a_deterministic_run_a_version_waits_for_the_evaluation_before(tmp_path: Path) -> None:
    job = Job(tmp_path, engines=True, launch={"deterministic": True})
    loop = job.loop()
    assert loop.advance()
    done: list[bool] = []
    thread = threading.Thread(target=lambda: done.append(loop.advance()))
    thread.start()
    while "the evaluation before to end" not in job.reporter.said:
        thread.join(0.05)
        assert thread.is_alive()
    assert job.versions() == [0]
    job.store.eval_done(0, 0, {"overall": {}})
    thread.join()
    job.server.thread.stop()
    assert done == [True] and job.versions() == [0, 2]


# ---- commands --------------------------------------------------------------------------------------------------------


def test_without_evaluations_no_engine_is_planned() -> None:
    chosen = asking(eval={"benchmarks": ["arithmetic-heldout"], "every": 2}, model={"path": "astra:tiny"})
    every = planned(chosen, facts(), TINY, command="sft")
    assert [process.name for process in every.processes] == ["engine0", "rollout", "trainer", "eval"]
    assert [process.children for process in every.processes] == [0, 0, 0, 1], "nothing is graded but evaluations"
    alone = planned(asking(model={"path": "astra:tiny"}), facts(), TINY, command="sft")
    assert [process.name for process in alone.processes] == ["trainer"]
    words = (
        "sft.label_smoothing=0.0",
        "algorithm.kl_coef=0.0",
        "eval.every=0",
        "resources.train_gpus=2",
        "resources.rollout_gpus=1",
    )
    on_gpus = planned(load("qwen3.5-4b-m2po-delta", *words), facts("9.0", 3, host_gib=512), command="sft")
    assert [(process.name, process.gpus) for process in on_gpus.processes] == [("trainer", (0,)), ("trainer1", (1,))]
    assert not [problem for problem in on_gpus.problems if problem.kind in ("gpus", "memory")]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["train", "tiny-sft"], "recipe `tiny-sft` has a table [sft]"),
        (["rollout", "tiny-sft"], "recipe `tiny-sft` has a table [sft]"),
        (["sft", "qwen3.5-tiny-m2po-delta"], "recipe `qwen3.5-tiny-m2po-delta` has no table [sft]"),
        (["sft", "tiny-sft", "--set", "algorithm.kl_coef=0.1"], "algorithm.kl_coef is for reinforcement learning"),
        (["sft"], "no recipe given"),
    ],
)
def test_a_recipe_of_the_other_kind_is_refused(words: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert astra(words) == 2
    assert said in capsys.readouterr().err


def test_a_row_that_breaks_later_ends_the_run_with_its_name(tmp_path: Path) -> None:
    """Products have no worked solution."""
    job = Job(tmp_path, engines=False, data={"levels": ["mul2"]})
    loop = job.loop()
    with pytest.raises(RunFailed, match="has no worked solution"):
        loop.advance()
    job.server.thread.stop()


def test_generated_examples_are_the_worked_solutions() -> None:
    coder = load_tokenizer(fetch.bundled("astra:tiny"))
    problem = arithmetic.draw(3, 0)
    one = ExampleTokens(asking(), coder)(replace(problem, messages=({"role": "user", "content": problem.question},)))
    text = f"{problem.question}={arithmetic.worked_text(problem.question)}"
    assert coder.decode(whole(one)) == f"{text}<eos>"
    group = group_of(8, problem, one)
    assert group.samples[0].drawn == len(one.parts[0][0]) and group.lease_id == 8


def blocks(kind: str) -> list[str]:
    page = (Path(__file__).parents[1] / "docs" / "sft-howto.md").read_text(encoding="utf-8")
    return re.findall(rf"<!-- test: {kind} -->\n```\w*\n(.*?)```", page, re.S)


def right_and_wrong(path: Path, groups: int) -> None:
    """What `astra rollout --keep right` writes: of each group one right sample and one that is left out."""
    writer = SampleWriter(SampleFile(path=path, groups=groups, keep="right"))
    for index in range(groups):
        problem = arithmetic.draw(index, 0)
        drawn = Segment(0, np.zeros(1, np.int32), np.zeros(1, np.float32))
        right = Sample(0, [drawn], "stop", verdict="right", text=arithmetic.worked_text(problem.question))
        samples = [right, Sample(1, [drawn], "stop", verdict="wrong", text="0")]
        writer.write(Group(index, problem.id, np.zeros(1, np.int32), samples, problem.question, problem.answer))


def test_the_three_commands_of_the_howto(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Supervised training is run as it stands there; what starts engines, to its plan."""
    monkeypatch.chdir(tmp_path)
    (text,), (commands,) = blocks("recipe"), blocks("commands")
    (tmp_path / "warm.toml").write_text(text)
    rollout, sft, train = (line.split()[1:] for line in commands.strip().splitlines())
    assert astra([*rollout, "--dry-run"]) == 0
    right_and_wrong(tmp_path / "solved.jsonl", 16)
    assert astra(sft) == 0
    said = capsys.readouterr().err
    assert "run warm: trainer;" in said and "loss" in said
    run = RunDir(tmp_path / "warm")
    assert run.shown_state() == "done" and (run.export / "model.safetensors").is_file()
    summary = json.loads(run.summary_json.read_text())
    assert summary["steps"] == 3 and summary["training"]["loss"] is not None and summary["bottleneck"] is None
    assert summary["training"]["tokens"] == sum(
        line["tokens"] for line in metrics.read(run.metrics_jsonl) if "loss" in line
    )
    assert astra([*train, "--dry-run"]) == 0
    source = from_run.find(str(run.path))
    assert (source.step, source.kind) == (3, "export")
    taken = from_run.take(from_run.checked(tiny(), source), source, RunDir(tmp_path / "rl"), keep_optimizer=False)
    assert Path(taken.model.path) == tmp_path / "rl" / "initial"
    for words in (["runs", "status", "warm"], ["runs", "list", "--root", "."], ["runs", "report", "warm"]):
        assert astra(words) == 0
    assert "sft, recipe warm" in capsys.readouterr().out
    assert astra(["train", "--from", "warm", "--dry-run"]) == 2
    assert "has a table [sft]" in capsys.readouterr().err
    assert astra(["sft", "--resume", "warm", "--set", "sft.label_smoothing=0.1", "--dry-run"]) == 2
    assert "trained on other examples" in capsys.readouterr().err


def test_random_weights_have_the_names_of_the_checkpoint_and_other_values(tmp_path: Path) -> None:
    source = fetch.bundled("astra:tiny")
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        random_weights.write(source, tmp_path / name, ADAPTER, seed)
    a, b, c, own = (load_file(place / "model.safetensors") for place in (*map(tmp_path.joinpath, "abc"), source))
    assert a.keys() == own.keys() and all(a[name].dtype == own[name].dtype for name in own)
    assert all(torch.equal(a[name], b[name]) for name in own)
    assert not torch.equal(a["model.embed_tokens.weight"], c["model.embed_tokens.weight"])
    assert not torch.equal(a["model.embed_tokens.weight"], own["model.embed_tokens.weight"])
    assert (tmp_path / "a" / "tokenizer.json").is_file()
