"""examples/one_file_rl.py, shortened: batches are as stale as asked, it learns, and a wrong delta is refused."""

import importlib.util
import math
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

EXAMPLE = Path(__file__).resolve().parent.parent / "examples" / "one_file_rl.py"


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The file as a module; few questions, and a temperature at which the model is right often enough to learn."""
    spec = importlib.util.spec_from_file_location("one_file_rl", EXAMPLE)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "one_file_rl", module)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "P", 4)
    monkeypatch.setattr(module, "TEMPERATURE", 1.0)
    monkeypatch.setattr(module, "EVALUATED", 2)
    return module


def test_batches_wait_until_they_are_as_stale_as_asked(example: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    log = example.train(steps=2, seed=0, staleness=1, kind="ppo")
    assert log["staleness"] == [0, 1] and set(log["held_out"]) == {0, 2}
    assert capsys.readouterr().out.count("staleness 1") == 1


def test_one_step_makes_right_answers_likelier_and_wrong_ones_less_likely(example: ModuleType) -> None:
    torch.manual_seed(0)
    tokenizer = example.transformers.AutoTokenizer.from_pretrained(example.MODEL)
    model = example.transformers.AutoModelForCausalLM.from_pretrained(example.MODEL, dtype=torch.float32)
    trainer = example.Trainer(model, steps=1)
    batch = example.sample(model, tokenizer, [(f"{a}+{a + 1}=", 2 * a + 1) for a in (23, 34, 45, 56)], version=0)
    advantage_B = example.group_advantages(batch.rewards_PG).flatten()
    assert advantage_B.abs().sum() > 0
    rows = list(range(len(batch.prompts)))
    before_N, _ = example.log_ratios(model, batch, rows)
    assert before_N.abs().max() < 1e-4, "the trainer computes what the engine drew"
    trainer.step(batch, "m2po")
    after_N, row_N = example.log_ratios(model, batch, rows)
    assert (after_N.detach() * advantage_B[row_N]).mean() > 0.005


def test_the_range_of_m2po_by_hand(example: ModuleType) -> None:
    """The risky tokens are the first two: 0.05^2 alone is under 0.01 in the mean, with 0.2^2 it is 0.02125."""
    low, high = example.m2po_range(torch.tensor([0.05, -0.2, -0.3]), torch.tensor([1.0, -1.0, 1.0]))
    assert low == pytest.approx(1 - math.exp(-0.1)) and high == pytest.approx(math.exp(0.1) - 1)
    assert example.m2po_range(torch.tensor([0.05, -0.3]), torch.tensor([1.0, 1.0])) == (0.95, 20.0)


def test_a_delta_holds_what_changed_and_a_wrong_base_is_found(example: ModuleType) -> None:
    engine, trainer = torch.nn.Linear(4, 1, bias=False), torch.nn.Linear(4, 1, bias=False)
    for model in (engine, trainer):
        model.weight.data = torch.tensor([[1.0, 2.0, 3.0, 4.0]])
    old = example.bf16_weights(trainer)
    trainer.weight.data[0, 2] = 5.0
    delta = example.make_delta(old, example.bf16_weights(trainer))
    places, values = delta[0]["weight"]
    assert places.tolist() == [2] and values.tolist() == [5.0]
    example.apply_delta(engine, delta)
    assert engine.weight.tolist() == [[1.0, 2.0, 5.0, 4.0]]
    engine.weight.data[0, 0] = 1.5
    with pytest.raises(ValueError, match="`weight` is not what the trainer published"):
        example.apply_delta(engine, delta)
