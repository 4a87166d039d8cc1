"""A group from prompt tokens to finished samples on one engine, whatever updates come between; and as JSON lines."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from astracli.config.recipe import Recipe
from astracli.data.prompts import Problem
from astracli.engines.contract import GenRequest, GenResult
from astracli.engines.stops import StopStrings
from astracli.errors import RunFailed
from astracli.rewards.reward import GradeItem, GradePool
from astracli.rl.sample_log import group_line
from astracli.rl.schedule import sample_seed
from astracli.rl.types import Group, Sample, Segment
from astracli.rollout.engine_worker import EngineWorker

EMPTY_ABORTS = 50
"""Times in a row that an engine may end a group's requests without a single token."""


@dataclass
class Draft:
    """A sample while it is generated."""

    index: int
    segments: list[Segment] = field(default_factory=list)
    finish: str | None = None

    @property
    def tokens(self) -> list[int]:
        return [int(token) for segment in self.segments for token in segment.tokens]

    def take(self, result: GenResult) -> None:
        """Append what a request brought; segments of one version are joined."""
        if result.finish_reason != "abort":
            self.finish = result.finish_reason
        if not len(result.tokens):
            return
        last = self.segments[-1] if self.segments else None
        if last is not None and last.version == result.version:
            last.tokens = np.concatenate([last.tokens, result.tokens])
            last.logprobs = np.concatenate([last.logprobs, result.logprobs])
        else:
            self.segments.append(Segment(result.version, result.tokens, result.logprobs))


@dataclass(frozen=True)
class RolloutSampling:
    """How completions are drawn; the same for every group of a run."""

    recipe: Recipe
    stop_ids: tuple[int, ...]
    stop: StopStrings | None = None

    def budget(self, prompt: Sequence[int]) -> int:
        """Tokens that a completion of this prompt may have; below 1: the prompt does not fit."""
        return self.recipe.rollout.completion_room(len(prompt))

    def used_up(self, prompt: Sequence[int], draft: Draft, more: int = 0) -> bool:
        """Whether the draft, with `more` tokens, has as many as it may."""
        return len(draft.tokens) + more >= self.budget(prompt)

    def request(self, prompt: Sequence[int], lease_id: int, draft: Draft) -> GenRequest:
        """What is asked for a sample now: everything, or its continuation."""
        prefix = draft.tokens
        return GenRequest(
            input_ids=[*prompt, *prefix],
            max_new_tokens=self.budget(prompt) - len(prefix),
            temperature=self.recipe.rollout.temperature,
            top_p=self.recipe.rollout.top_p,
            stop_token_ids=self.stop_ids,
            seed=sample_seed(self.recipe.seed, lease_id, draft.index),
            draw_offset=len(prefix),
            stop=self.stop,
        )


async def generate_groups(
    worker: EngineWorker,
    sampling: RolloutSampling,
    asked: Mapping[int, Sequence[int]],
    sample_ended: Callable[[], None],
) -> dict[int, list[Draft]]:
    """All samples of some groups, asked for together, and again after every update until each has ended.

    `asked`: lease id -> prompt tokens. -> lease id -> drafts. `sample_ended` is called for each sample when its place
    on the engine is free; not in a deterministic run, which asks for one answer to all of them.
    """
    drafts = {lease: [Draft(index) for index in range(sampling.recipe.rollout.group_size)] for lease in asked}
    empty = 0
    while going := [(lease, draft) for lease, some in drafts.items() for draft in some if draft.finish is None]:

        def ended(place: int, result: GenResult, going: Sequence[tuple[int, Draft]] = going) -> None:
            lease, draft = going[place]
            if result.finish_reason != "abort" or sampling.used_up(asked[lease], draft, len(result.tokens)):
                sample_ended()

        requests = [sampling.request(asked[lease], lease, draft) for lease, draft in going]
        results = await worker.generate(requests, None if sampling.recipe.launch.deterministic else ended)
        for (lease, draft), result in zip(going, results, strict=True):
            draft.take(result)
            if draft.finish is None and sampling.used_up(asked[lease], draft):
                draft.finish = "length"
        cut = [(lease, draft) for lease, draft in going if draft.finish is None]
        if cut:
            worker.count_aborted(len(cut), sum(len(asked[lease]) + len(draft.tokens) for lease, draft in cut))
        empty = 0 if any(len(result.tokens) for result in results) else empty + 1
        if empty >= EMPTY_ABORTS:
            groups = ", ".join(map(str, asked))
            raise RunFailed(f"{worker.name} ended the requests of group {groups} {empty} times without a token")
    return drafts


async def graded(
    lease_id: int,
    problem: Problem,
    prompt: Sequence[int],
    drafts: Sequence[Draft],
    tokenizer: Any,
    grader: GradePool,
) -> Group:
    """The finished samples of a group, with their rewards."""
    texts = [tokenizer.decode(draft.tokens, skip_special_tokens=True) for draft in drafts]
    answers = zip(texts, drafts, strict=True)
    grades = await grader.agrade([GradeItem(problem.question, problem.answer, text, d.tokens) for text, d in answers])
    samples = [
        Sample(
            index=draft.index,
            segments=draft.segments,
            finish_reason="stop" if draft.finish == "stop" else "length",
            reward=float(grade.reward),
            verdict=grade.verdict,
            text=text,
        )
        for draft, grade, text in zip(drafts, grades, texts, strict=True)
    ]
    return Group(
        lease_id=lease_id,
        problem_id=problem.id,
        prompt_tokens=np.array(prompt, np.int32),
        samples=samples,
        problem=problem.question,
        answer=problem.answer,
        meta=problem.meta | ({"source": problem.source} if problem.source else {}),
    )


class SampleWriter:
    """Graded samples as JSON lines, a group at a time; `left` groups are still wanted."""

    def __init__(self, path: str | Path, groups: int):
        self.left = groups
        self._path = Path(path)
        self._path.write_text("")

    def write(self, group: Group) -> None:
        with self._path.open("a") as file:
            file.write("".join(json.dumps(group_line(group, sample)) + "\n" for sample in group.samples))
        self.left -= 1
