"""On-policy distillation: the advantage by hand, the teacher in a step, a student that comes nearer, refusals."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from machines import facts
from test_plan import TINY, planned
from training_tools import recipe, sample_groups, save_model

from astracli.adapters.qwen3_5 import ADAPTER
from astracli.config.recipe import Recipe
from astracli.data import fetch
from astracli.errors import UserError
from astracli.launch import teacher_inputs
from astracli.machine.memory import words
from astracli.rl import losses
from astracli.rl.losses import Tokens
from astracli.rl.types import Group, Sample, Segment
from astracli.training import setup
from astracli.training.fsdp import Ranks
from astracli.training.step import Trainer

SIZE = 48
"""Samples of a prompt: fewer leave more noise than signal."""
DISTILL: Any = losses.get("distill")


def distilling(teacher: str, **own: Any) -> Recipe:
    train = {
        "minibatches": 1,
        "batch_groups": 4,
        "learning_rate": 1e-3,
        "parity_tolerance": 100.0,
        "tokens_per_microbatch": 2048,
    }
    algorithm = {"name": "distill", "distill": {"teacher": teacher} | own}
    return recipe(train=train, algorithm=algorithm, model={"path": "astra:tiny"})


def test_the_advantage_of_a_token_by_hand() -> None:
    """Student 0.5 and 0.2, teacher 0.25 and 0.4, fresh tokens: log-ratios -ln 2 and ln 2; with coef 3 and a reward's
    advantage of 1 and -1 the advantages are 1 - 3 ln 2 = -1.0794 and -1 + 3 ln 2 = 1.0794."""
    student = torch.tensor([0.5, 0.2]).log().requires_grad_()
    settings = DISTILL.settings(teacher="t", coef=3.0, reward_coef=1.0)
    tokens = Tokens(
        student, student.detach(), torch.tensor([1.0, -1.0]), student.detach(), torch.zeros(2).long(),
        teacher_N=torch.tensor([0.25, 0.4]).log(),
    )  # fmt: skip
    loss_N, clipped_N, _ = DISTILL.token_loss(tokens, DISTILL.prepare(torch.zeros(2), tokens.advantage_N, settings))
    expected = 1 - 3 * math.log(2)
    assert loss_N.tolist() == pytest.approx([-expected, expected])
    assert not clipped_N.any()
    loss_N.sum().backward()
    assert student.grad is not None
    assert student.grad.tolist() == pytest.approx([-expected, expected], rel=1e-5), "-A, the ratio being 1"


def test_rewards_count_only_where_they_are_asked_for() -> None:
    rewards, lengths = np.array([0.0, 1.0]), np.array([3, 3])
    assert DISTILL.advantage(rewards, lengths, DISTILL.settings(teacher="t")).tolist() == [0.0, 0.0]
    asked = DISTILL.settings(teacher="t", reward_coef=0.5, advantage="mean")
    assert DISTILL.advantage(rewards, lengths, asked).tolist() == [-0.25, 0.25]


# ---- a trainer -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A student, and a teacher of another size."""
    place = tmp_path_factory.mktemp("models")
    return save_model(place / "student", seed=1), save_model(place / "teacher", seed=2, intermediate_size=96, std=0.3)


def made(models: tuple[Path, Path], **own: Any) -> Trainer:
    student, teacher = models
    return setup.build_trainer(
        student, ADAPTER, distilling(str(teacher), **own), Ranks(), attention="sdpa", teacher_dir=teacher
    )


@torch.no_grad()
def logprobs(model: Any, rows: torch.Tensor) -> torch.Tensor:
    """fp32 [rows, T, V]"""
    return model(input_ids=rows).logits.float().log_softmax(-1)


@torch.no_grad()
def drawn(trainer: Trainer, step: int) -> list[Group]:
    """Four groups of SIZE samples of ten tokens, drawn by the student itself."""
    draw = torch.Generator().manual_seed(step)
    prompts = torch.randint(2, 64, (4, 4), generator=draw).repeat_interleave(SIZE, 0)
    rows, chosen = prompts, []
    for _ in range(10):
        each = logprobs(trainer.policy.model, rows)[:, -1]
        token = torch.multinomial(each.exp(), 1, generator=draw)
        chosen.append(each.gather(1, token))
        rows = torch.cat([rows, token], 1)
    tokens, own = rows[:, 4:].numpy().astype(np.int32), torch.cat(chosen, 1).numpy()
    return [
        Group(
            4 * step + g, f"p{g}", prompts[SIZE * g].numpy().astype(np.int32),
            [Sample(s, [Segment(step, tokens[SIZE * g + s], own[SIZE * g + s])], "stop") for s in range(SIZE)],
        )
        for g in range(4)
    ]  # fmt: skip


def reverse_kl(trainer: Trainer, contexts: torch.Tensor) -> float:
    """KL(student || teacher) of the next token, exact, over fixed contexts."""
    assert trainer.teacher is not None
    ours, theirs = (logprobs(each.model, contexts) for each in (trainer.policy, trainer.teacher.policy))
    return float((ours.exp() * (ours - theirs)).sum(-1).mean())


def test_a_student_comes_nearer_to_its_teacher(models: tuple[Path, Path], tmp_path: Path) -> None:
    """By the exact KL on fixed contexts. The teacher is near, as a student's should be."""
    trainer = made((models[0], save_model(tmp_path / "near", seed=1, std=0.3)))
    contexts = torch.cat([torch.from_numpy(s.tokens)[None].long() for g in drawn(trainer, 99) for s in g.samples])
    assert trainer.teacher is not None
    frozen = {name: value.clone() for name, value in trainer.teacher.policy.named_parameters()}
    before = reverse_kl(trainer, contexts)
    for step in range(20):
        trainer.train(drawn(trainer, step), step, step)
    after = reverse_kl(trainer, contexts)
    assert after < 0.9 * before, (before, after)
    assert all(torch.equal(value, frozen[name]) for name, value in trainer.teacher.policy.named_parameters())


def test_the_metric_is_the_mean_log_ratio_of_student_and_teacher(models: tuple[Path, Path]) -> None:
    trainer = made(models)
    groups = sample_groups(trainer, 4, seed=0)
    assert trainer.teacher is not None
    total, count = 0.0, 0
    for group in groups:
        for sample in group.samples:
            row = torch.from_numpy(np.concatenate([group.prompt_tokens, sample.tokens]).astype(np.int64))[None]
            ours, theirs = (logprobs(each.model, row)[0] for each in (trainer.policy, trainer.teacher.policy))
            for place in range(len(group.prompt_tokens), row.shape[1]):
                total += float(ours[place - 1, row[0, place]] - theirs[place - 1, row[0, place]])
                count += 1
    metrics = trainer.train(groups, 0, 0).metrics
    assert metrics["teacher_kl"] == pytest.approx(total / count, abs=1e-4)


# ---- before a start --------------------------------------------------------------------------------------------------


def test_a_teacher_with_another_tokenizer_is_refused(tmp_path: Path) -> None:
    student = fetch.bundled("astra:tiny")
    assert teacher_inputs.checked(distilling("astra:tiny"), student) == student
    with pytest.raises(UserError, match=r"algorithm.distill.teacher = `astra:tiny-tool` has another tokenizer"):
        teacher_inputs.checked(distilling("astra:tiny-tool"), student)
    with pytest.raises(UserError, match=r"algorithm.distill.teacher = `./none`"):
        teacher_inputs.checked(distilling("./none"), student)
    short = shutil.copytree(student, tmp_path / "short")
    config = json.loads((short / "config.json").read_text())
    (short / "config.json").write_text(json.dumps(config | {"vocab_size": 8}))
    with pytest.raises(UserError):
        teacher_inputs.checked(distilling(str(short)), student)


def test_a_recipe_of_it_needs_a_teacher_and_keeps_equal_groups() -> None:
    with pytest.raises(ValueError, match="teacher"):
        recipe(algorithm={"name": "distill"})
    chosen = distilling("astra:tiny")
    assert not chosen.algorithm.drop_equal_groups and chosen.algorithm.teacher == "astra:tiny"
    assert recipe().algorithm.teacher is None
    with pytest.raises(ValueError, match="drop_equal_groups = true takes out groups"):
        recipe(algorithm={"name": "distill", "drop_equal_groups": True, "distill": {"teacher": "x"}})


def test_the_plan_counts_the_teacher() -> None:
    chosen = distilling("astra:tiny")
    count = teacher_inputs.parameters(chosen)
    assert count == 914_232
    rows = planned(chosen, facts(), TINY, teacher=count).memory
    assert [words(row.bytes) for row in rows if row.component.value == "teacher (fp32)"] == [words(4 * count)]
