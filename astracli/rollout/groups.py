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


def group_of(env: Env, lease_id: int, problem: Problem, episodes: dict[int, Episode], scores: Sequence[Score]) -> Group:
    """The group of a lease. `episodes`: place in the group -> episode; one that failed has none."""
    prompt = prompt_length(list(episodes.values()))
    samples = []
    for (index, episode), score in zip(episodes.items(), scores, strict=True):
        behind = episode.tokens[prompt:]
        one_turn = episode.text is not None and episode.spans == [(prompt, len(episode.tokens))]
        samples.append(
            Sample(
                index=index,
                segments=segments(episode, prompt),
                finish_reason=episode.finish,
                reward=float(score.reward),
                verdict=score.verdict,
                text=episode.text if episode.text is not None and one_turn else env.text(behind),
                parts={**episode.parts, **score.parts},
                notes=dict(score.notes),
            )
        )
    return Group(
        lease_id=lease_id,
        problem_id=problem.id,
        prompt_tokens=next(iter(episodes.values())).tokens[:prompt],
        samples=samples,
        problem=problem.question,
        answer=problem.answer,
        meta=problem.meta | ({"source": problem.source} if problem.source else {}),
    )


def prompt_length(episodes: Sequence[Episode]) -> int:
    """How many tokens all of them begin with that none has drawn: the prompt of the group."""
    first = episodes[0].tokens
    length = min(episode.spans[0][0] if episode.spans else len(episode.tokens) for episode in episodes)
    for episode in episodes[1:]:
        different = (episode.tokens[:length] != first[:length]).nonzero()[0]
        length = int(different[0]) if len(different) else length
    return length


def segments(episode: Episode, prompt: int) -> list[Segment]:
    """What lies behind the prompt, cut where the version changes, and where drawn tokens begin and end."""
    found: list[Segment] = []
    place, used = prompt, 0

    def told(until: int) -> None:
        if until > place:
            found.append(Segment(None, episode.tokens[place:until], np.zeros(0, np.float32)))

    for first, end in episode.spans:
        told(first)
        versions = episode.versions[used : used + end - first]
        changes = ((versions[1:] != versions[:-1]).nonzero()[0] + 1).tolist()
        for a, b in pairwise([0, *changes, end - first]):
            logprobs = episode.logprobs[used + a : used + b]
            found.append(Segment(int(versions[a]), episode.tokens[first + a : first + b], logprobs))
        place, used = end, used + end - first
    told(len(episode.tokens))
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
