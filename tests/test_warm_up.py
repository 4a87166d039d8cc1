"""Made-up rows before the first batch: what they are, and that nothing is changed by them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from training_tools import make_trainer, recipe, sample_groups, save_model

from astracli.training import parity
from astracli.training.fsdp import Ranks
from astracli.training.warm_up import lengths, rows_of, sizes, warm_up


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("model"))


def test_lengths_are_those_that_kernels_are_compiled_for() -> None:
    assert lengths(8192, 8192, packed=True) == [8192, 7168, 6144, 5120, 4096]
    assert lengths(8192, 2000, packed=False) == [2000, 1024]
    assert lengths(8192, 700, packed=True) == [8192, 7168, 6144, 5120, 4096], "several samples fill a packed row"
    assert lengths(64, 64, packed=True) == [64]


@pytest.mark.parametrize(("length", "longest"), [(8192, 8192), (8192, 700), (64, 64), (200, 40), (41, 40), (11, 10)])
def test_rows_fill_their_length(length: int, longest: int) -> None:
    rows = rows_of(sizes(length, longest), 100)
    found = [len(row) for row in rows]
    assert sum(found) == length and max(found) <= longest and min(found) >= 2
    assert all(row.loss_tokens == len(row) - row.prompt_length > 0 for row in rows)
    assert len(found) > 1
    assert all(row.tokens.min() >= 0 and row.tokens.max() < 100 for row in rows)


@pytest.mark.parametrize("compute", [None, torch.bfloat16])
@pytest.mark.parametrize("packing", ["packed", "padded"])
def test_a_trainer_that_was_warmed_up_trains_the_same_bytes(
    model_dir: Path, packing: str, compute: torch.dtype | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = recipe(algorithm={"kl_coef": 0.01}, train={"packing": packing, "parity_tolerance": 100.0})
    warmed, cold = (make_trainer(model_dir, chosen, Ranks(compute=compute)) for _ in range(2))
    said: list[str | None] = []
    shapes = set()
    real = parity.logprobs

    def seen(policy, adapter, micro, device):  # type: ignore[no-untyped-def]
        shapes.add(micro.tokens_BL.shape)
        return real(policy, adapter, micro, device)

    random = torch.get_rng_state()
    monkeypatch.setattr(parity, "logprobs", seen)
    assert warm_up(warmed, said.append) > 0
    assert torch.equal(torch.get_rng_state(), random)
    assert said[0] == "the compiler: kernels for rows of 64 tokens (1 of 1 lengths)" and said[-1] is None
    assert (1, 64) in shapes
    assert not warmed.masters.grads.found()
    for trainer in (warmed, cold):
        trainer.first_step = False
        trainer.train(sample_groups(None, 4, seed=1), 1, 0)
    for name, tensor in cold.masters.wire_full().items():
        assert torch.equal(tensor, warmed.masters.wire_full()[name]), name
    assert all(map(torch.equal, cold.masters.split_masters.rests, warmed.masters.split_masters.rests))
    with cold.masters.split_masters.whole(), warmed.masters.split_masters.whole():
        assert all(map(torch.equal, cold.masters.values.values(), warmed.masters.values.values()))
