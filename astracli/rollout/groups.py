"""Scored episodes as the group that is trained on; and as JSON lines."""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np

from astracli.data.prompts import Problem
from astracli.envs.contract import Env, Episode, Score
from astracli.rl.sample_log import group_line
from astracli.rl.types import Group, Sample, Segment

_NOT_DRAWN = np.iinfo(np.int64).min


def group_of(env: Env, lease_id: int, problem: Problem, episodes: dict[int, Episode], scores: Sequence[Score]) -> Group:
    """The group of a lease. `episodes`: place in the group -> episode; one that failed has none."""
    prompt = prompt_length(list(episodes.values()))
    samples = []
    for (index, episode), score in zip(episodes.items(), scores, strict=True):
        behind = episode.tokens[prompt:]
        one_turn = episode.text is not None and len(episode.answer) == len(behind)
        samples.append(
            Sample(
                index=index,
                segments=segments(episode, prompt),
                finish_reason=episode.finish,
                reward=float(score.reward),
                verdict=score.verdict,
                text=episode.text if episode.text is not None and one_turn else env.text(behind),
                parts={**episode.parts, **getattr(score, "parts", {})},
            )
        )
    return Group(
        lease_id=lease_id,
        problem_id=problem.id,
        prompt_tokens=next(iter(episodes.values())).tokens[:prompt],
        samples=samples,
        problem=problem.question,
        answer=problem.answer,
        meta=problem.meta,
    )


def prompt_length(episodes: Sequence[Episode]) -> int:
    """How many tokens all of them begin with that none has drawn: the prompt of the group."""
    first = episodes[0].tokens
    drawn = [np.flatnonzero(episode.loss_mask) for episode in episodes]
    length = min(int(at[0]) if len(at) else len(e.tokens) for at, e in zip(drawn, episodes, strict=True))
    for episode in episodes[1:]:
        different = np.flatnonzero(episode.tokens[:length] != first[:length])
        length = int(different[0]) if len(different) else length
    return length


def segments(episode: Episode, prompt: int) -> list[Segment]:
    """What lies behind the prompt, cut where the version changes, and where drawn tokens begin and end."""
    tokens, mask = episode.tokens[prompt:], episode.loss_mask[prompt:]
    if not len(tokens):
        return []
    version = np.full(len(tokens), _NOT_DRAWN)
    version[mask] = episode.versions
    bounds = [0, *(np.flatnonzero(version[1:] != version[:-1]) + 1).tolist(), len(tokens)]
    found, used = [], 0
    for start, end in pairwise(bounds):
        count = end - start if mask[start] else 0
        found.append(
            Segment(
                int(version[start]) if mask[start] else None,
                tokens[start:end],
                episode.logprobs[used : used + count],
            )
        )
        used += count
    return found


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
