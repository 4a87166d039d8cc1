"""A loss mask from an episode to its gradient: only drawn tokens are trained, measured and aged; all are seen."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgpack
import numpy as np
import pytest
import torch
from training_tools import divided, make_trainer, recipe, save_model

from astracli.rl.batch import build_batch, pad_rows
from astracli.rl.sample_log import group_line
from astracli.rl.types import DIGEST_BYTES, Group, Sample, Segment, pack_group, unpack_group
from astracli.training import parity
from astracli.training.packing import pack_rows
from astracli.training.step import Trainer


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("model"))


def drawn(version: int, *tokens: int) -> Segment:
    return Segment(version, np.array(tokens, np.int32), np.full(len(tokens), -2.0, np.float32))


def told(*tokens: int) -> Segment:
    return Segment(None, np.array(tokens, np.int32), np.zeros(0, np.float32))


def by_hand() -> list[Group]:
    """Two groups; what is drawn is 20 and more, what is told is under 20."""
    first = Sample(0, [drawn(4, 20, 21), told(11, 12, 13), drawn(5, 22)], "stop", 1.0, "right", parts={"turns": 2.0})
    second = Sample(1, [told(14), drawn(5, 23, 24), told(15)], "length", 0.0)
    plain = Sample(0, [drawn(5, 25, 26, 27)], "stop", 0.0)
    silent = Sample(1, [told(16, 17)], "stop", 1.0)
    return [
        Group(0, "p0", np.array([2, 3], np.int32), [first, second]),
        Group(1, "p1", np.array([4], np.int32), [plain, silent]),
    ]


def test_a_sample_by_hand() -> None:
    first, second = by_hand()[0].samples
    assert first.tokens.tolist() == [20, 21, 11, 12, 13, 22]
    assert first.loss_mask.tolist() == [1, 1, 0, 0, 0, 1] and second.loss_mask.tolist() == [0, 1, 1, 0]
    assert (first.drawn, first.versions.tolist(), len(first.logprobs)) == (3, [4, 4, 5], 3)
    assert [group.oldest_version for group in by_hand()] == [4, 5], "of drawn tokens"
    assert Sample(0, [], "stop").loss_mask.tolist() == [] and Sample(0, [told(5)], "stop").oldest_version is None


def test_masks_travel_and_a_single_turn_takes_no_byte_more() -> None:
    group, plain = by_hand()
    found = unpack_group(pack_group(group)).samples
    assert [s.loss_mask.tolist() for s in found] == [s.loss_mask.tolist() for s in group.samples]
    assert [s.parts for s in found] == [{"turns": 2.0}, {}]
    plain.samples = plain.samples[:1]
    (sample,) = msgpack.unpackb(pack_group(plain)[:-DIGEST_BYTES])["samples"]
    assert set(sample) == {"index", "finish", "reward", "verdict", "text", "segments"}
    assert [len(part) if isinstance(part, bytes) else part for part in sample["segments"][0]] == [5, 12, 12]
    group.samples[1].segments[0].logprobs = np.zeros(1, np.float32)
    with pytest.raises(ValueError, match="masked segment with 1 tokens and 1 log-probabilities"):
        unpack_group(pack_group(group))


def test_positions_by_hand() -> None:
    """The hidden state before each drawn token predicts it, whether a drawn or a told one stands there."""
    chosen = recipe(train={"minibatches": 1})
    batch = build_batch(by_hand(), chosen, step=0)
    assert [row.tokens.tolist() for row in batch.rows] == [
        [2, 3, 20, 21, 11, 12, 13, 22], [2, 3, 14, 23, 24, 15], [4, 25, 26, 27],
    ]  # fmt: skip
    assert [row.predict.tolist() for row in batch.rows] == [[1, 2, 6], [2, 3], [0, 1, 2]]
    for micro in (pad_rows(batch.rows, 0), pack_rows(batch.rows)):
        assert micro.target_N.tolist() == [20, 21, 22, 23, 24, 25, 26, 27]
        assert micro.sequence_N.tolist() == [0, 0, 0, 1, 1, 2, 2, 2]
        assert micro.version_N.tolist() == [4, 4, 5, 5, 5, 5, 5, 5]
    assert pad_rows(batch.rows, 0).predict_N.tolist() == [1, 2, 6, 8 + 2, 8 + 3, 16, 17, 18]
    assert pack_rows(batch.rows).predict_N.tolist() == [1, 2, 6, 8 + 2, 8 + 3, 14, 15, 16]
    assert batch.minibatch_tokens == [8] and batch.staleness(6) == (10 / 8, 2)
    # rewards 1 and 0 in both groups: an episode without a drawn token counts in its group, and trains nothing
    assert [round(row.advantage, 3) for row in batch.rows] == [0.707, -0.707, -0.707]


def test_lengths_are_of_the_whole_episode_and_means_of_drawn_tokens() -> None:
    """The room is 16: 6 tokens behind the prompt are not over 16 - 8, of 12 tokens 4 are: half of the penalty."""
    groups = by_hand()
    groups[0].samples[1].segments.append(told(*[15] * 8))
    batch = build_batch(groups, recipe(algorithm={"overlong_fraction": 0.5, "overlong_penalty": 0.5}), step=0)
    assert [row.penalty for row in batch.rows] == [0.0, 0.25, 0.0]
    normalised = build_batch(by_hand(), recipe(algorithm={"batch_norm_advantage": True}), step=0)
    assert sum(row.advantage * row.loss_tokens for row in normalised.rows) == pytest.approx(0.0, abs=1e-9)


def test_a_line_of_the_samples_says_what_was_drawn() -> None:
    group, plain = by_hand()
    line = group_line(group, group.samples[1])
    assert (line["tokens"], line["loss_mask"]) == ([14, 23, 24, 15], [0, 1, 1, 0])
    assert (line["logprobs"], line["version"]) == ([None, -2.0, -2.0, None], 5)
    assert group_line(group, group.samples[0])["parts"] == {"turns": 2.0}
    assert not {"loss_mask", "parts"} & set(group_line(plain, plain.samples[0]))


def gradients(trainer: Trainer) -> torch.Tensor:
    found = trainer.masters.grads.found()
    return torch.cat([found[name].flatten().double() for name in sorted(found)])


def separately(trainer: Trainer, groups: list[Group]) -> tuple[float, torch.Tensor]:
    """(loss, gradient) of the definition: each drawn token's log-probability by one plain forward of its whole row.

    The ratio to the engine is exp(logprob + 2), for every log-probability of `by_hand` is -2; a wide clip cuts nothing.
    """
    total, count = torch.zeros(()), 0
    for group in groups:
        mean, std = group.rewards.mean(), group.rewards.std(ddof=1)
        for sample in group.samples:
            row = [*group.prompt_tokens.tolist(), *sample.tokens.tolist()]
            logits: Any = trainer.policy.model(input_ids=torch.tensor([row])).logits  # type: ignore[operator]
            for place in range(len(group.prompt_tokens), len(row)):
                if sample.loss_mask[place - len(group.prompt_tokens)]:
                    logprob = logits[0, place - 1].log_softmax(-1)[row[place]]
                    total = total - (logprob + 2.0).exp() * float((sample.reward - mean) / (std + 1e-5))
                    count += 1
    parameters = trainer.masters.parameters
    loss = total / count
    found = torch.autograd.grad(loss, [parameters[name] for name in sorted(parameters)])
    return loss.item(), torch.cat([gradient.flatten().double() for gradient in found])


WIDE = {"name": "grpo", "grpo": {"clip_low": 0.999, "clip_high": 1e6}}


@pytest.mark.parametrize("packing", ["packed", "padded"])
def test_the_gradient_is_that_of_the_drawn_tokens_alone(
    model_dir: Path, packing: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Brute force, token by token; and the same loss whatever log-probability the policy gives to told tokens."""
    chosen = recipe(train={"minibatches": 1, "packing": packing}, algorithm=WIDE)
    trainer = make_trainer(model_dir, chosen)
    loss, wanted = separately(trainer, by_hand())
    seen: list[torch.Tensor] = []
    update = trainer.masters.update
    monkeypatch.setattr(trainer.masters, "update", lambda step: (seen.append(gradients(trainer)), update(step))[1])
    metrics = trainer.train(by_hand(), 0, 6).metrics
    assert metrics["loss"] == pytest.approx(loss, abs=1e-6)
    assert (seen[0] - wanted).norm() <= 1e-5 * wanted.norm()
    assert (metrics["tokens"], metrics["completion_tokens_mean"]) == (8.0, 8 / 3)
    assert (metrics["staleness_mean"], metrics["staleness_max"]) == (10 / 8, 2.0)


def test_a_told_token_has_no_gradient_of_its_own(model_dir: Path) -> None:
    """Of the last hidden states only those before a drawn token get a gradient; at the others it is exactly zero."""
    trainer = make_trainer(model_dir, recipe(train={"minibatches": 1}, algorithm=WIDE))
    ((micro,),) = divided(trainer, by_hand()).minibatches
    kept: list[torch.Tensor] = []

    def keep(_module: Any, _inputs: Any, output: torch.Tensor) -> None:
        output.retain_grad()
        kept.append(output)

    model: Any = trainer.policy.model
    hook = model.model.norm.register_forward_hook(keep)
    parity.logprobs(trainer.policy, trainer.adapter, micro, torch.device("cpu"))[0].sum().backward()
    hook.remove()
    (hidden_BLD,) = kept
    assert hidden_BLD.grad is not None
    moved = hidden_BLD.grad.abs().sum(-1).flatten().numpy()
    assert np.flatnonzero(moved).tolist() == sorted(micro.predict_N.tolist()) and len(micro.predict_N) == 8
