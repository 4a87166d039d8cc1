"""The data of reinforcement learning as it travels: segment, sample, group; and its msgpack form.

A sample's tokens begin behind the group's prompt. In a single turn the policy has drawn all of them; with several turns
other tokens stand between: tool results, what the user says next. `loss_mask` is 1 on drawn tokens. Only they have a
log-probability and a version, and only they are trained.

Shape letters: T tokens of one sample, N drawn tokens among them, S samples of a group.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar, get_args

import msgpack
import numpy as np
import xxhash

T = TypeVar("T")
DIGEST_BYTES = 8
LATEST = 2**31 - 1
"""Largest version of a segment."""
Verdict = Literal["right", "wrong", "timeout", "error", "no_answer"]
FinishReason = Literal["stop", "length"]


@dataclass
class Segment:
    """Tokens under one weight version: the oldest that was in force while they were drawn. With the pause modes
    `in_place` and `retract` a segment goes on behind an update."""

    version: int | None
    """None: tokens that the policy did not draw. They have no log-probabilities."""
    tokens: np.ndarray
    """int32 [t]"""
    logprobs: np.ndarray
    """float32 [t]: the engine's own log-probabilities, after temperature and before top-p."""

    @property
    def drawn(self) -> bool:
        """Whether the policy drew these tokens."""
        return self.version is not None


@dataclass
class Sample:
    index: int
    """Position inside the group."""
    segments: list[Segment]
    finish_reason: FinishReason
    reward: float = 0.0
    verdict: Verdict = "wrong"
    text: str = ""
    parts: dict[str, float] = field(default_factory=dict)
    """Named rewards and other figures of its score."""
    notes: dict[str, str] = field(default_factory=dict)
    """Texts that its reward logged."""

    @property
    def tokens(self) -> np.ndarray:
        """int32 [T]: everything behind the prompt."""
        return np.concatenate([np.zeros(0, np.int32), *(s.tokens for s in self.segments)])

    @property
    def loss_mask(self) -> np.ndarray:
        """bool [T]: the policy drew the token."""
        each = np.array([s.drawn for s in self.segments], bool)
        return np.repeat(each, np.array([len(s.tokens) for s in self.segments], np.int64))

    @property
    def drawn(self) -> int:
        """How many tokens the policy drew: N."""
        return sum(len(s.tokens) for s in self.segments if s.drawn)

    @property
    def logprobs(self) -> np.ndarray:
        """float32 [N]"""
        return np.concatenate([np.zeros(0, np.float32), *(s.logprobs for s in self.segments)])

    @property
    def versions(self) -> np.ndarray:
        """int32 [N]: the version of every drawn token."""
        known = [s for s in self.segments if s.version is not None]
        each = np.array([s.version for s in known], np.int32)
        return np.repeat(each, np.array([len(s.tokens) for s in known], np.int64))

    @property
    def oldest_version(self) -> int | None:
        """The version of the oldest drawn token; None without any."""
        return min((s.version for s in self.segments if s.version is not None), default=None)


@dataclass
class Group:
    """All samples of one prompt."""

    lease_id: int
    """Also the group's id, and its place in the order of prompts."""
    problem_id: str
    prompt_tokens: np.ndarray
    """int32 [P]"""
    samples: list[Sample]
    problem: str = ""
    answer: str = ""
    meta: dict[str, Any] = field(default_factory=dict)

    @property
    def oldest_version(self) -> int:
        """The version of the oldest drawn token: what staleness is counted from."""
        each = (sample.oldest_version for sample in self.samples)
        return min((version for version in each if version is not None), default=0)

    @property
    def rewards(self) -> np.ndarray:
        """float64 [S]"""
        return np.array([s.reward for s in self.samples], np.float64)

    @property
    def has_signal(self) -> bool:
        """False when all rewards are equal: such a group has no gradient."""
        r = self.rewards
        return bool(len(r) and r.max() > r.min())


def pack_group(group: Group) -> bytes:
    """Group -> msgpack, and behind it its xxh3-64; arrays are raw little-endian bytes. The loss mask lies in the
    segments: one without a version is masked and has no log-probabilities."""
    doc = {
        "lease_id": group.lease_id,
        "problem_id": group.problem_id,
        "prompt": group.prompt_tokens.astype("<i4").tobytes(),
        "problem": group.problem,
        "answer": group.answer,
        "meta": group.meta,
        "samples": [
            {
                "index": s.index,
                "finish": s.finish_reason,
                "reward": s.reward,
                "verdict": s.verdict,
                "text": s.text,
                "segments": [
                    [g.version, g.tokens.astype("<i4").tobytes(), g.logprobs.astype("<f4").tobytes()]
                    for g in s.segments
                ],
                **({"parts": s.parts} if s.parts else {}),
                **({"notes": s.notes} if s.notes else {}),
            }
            for s in group.samples
        ],
    }
    packed: bytes = msgpack.packb(doc)
    return packed + xxhash.xxh3_64_digest(packed)


def unpack_group(blob: bytes) -> Group:
    """The inverse of `pack_group`. Raises ValueError on anything else, one changed bit too."""
    packed, said = blob[:-DIGEST_BYTES], blob[-DIGEST_BYTES:]
    if xxhash.xxh3_64_digest(packed) != said:
        raise ValueError("not a packed group: its checksum differs")
    try:
        doc = msgpack.unpackb(packed)
        samples = [
            Sample(
                index=_of(int, s["index"]),
                finish_reason=_one_of(get_args(FinishReason), s["finish"]),
                reward=_figure(s["reward"]),
                verdict=_one_of(get_args(Verdict), s["verdict"]),
                text=_of(str, s["text"]),
                segments=[_segment(*segment) for segment in _of(list, s["segments"])],
                parts={_of(str, name): _figure(part) for name, part in _of(dict, s.get("parts", {})).items()},
                notes={_of(str, name): _of(str, note) for name, note in _of(dict, s.get("notes", {})).items()},
            )
            for s in _of(list, doc["samples"])
        ]
        return Group(
            lease_id=_of(int, doc["lease_id"]),
            problem_id=_of(str, doc["problem_id"]),
            prompt_tokens=np.frombuffer(_of(bytes, doc["prompt"]), "<i4").astype(np.int32),
            problem=_of(str, doc["problem"]),
            answer=_of(str, doc["answer"]),
            meta={_of(str, name): value for name, value in _of(dict, doc["meta"]).items()},
            samples=samples,
        )
    except (KeyError, TypeError, ValueError, msgpack.exceptions.UnpackException) as error:
        raise ValueError(f"not a packed group: {error!r:.300}") from error


def _of(kind: type[T], value: Any) -> T:
    if not isinstance(value, kind) or isinstance(value, bool):
        raise TypeError(f"{value!r:.60} is no {kind.__name__}")
    return value


def _one_of(known: tuple[Any, ...], value: Any) -> Any:
    if value not in known:
        raise ValueError(f"{value!r:.60} is none of {', '.join(known)}")
    return value


def _figure(value: Any) -> float:
    if not isinstance(value, int | float) or not abs(value) < np.inf:
        raise ValueError(f"{value!r:.60} is no finite number")
    return float(value)


def _segment(version: int | None, tokens: bytes, logprobs: bytes) -> Segment:
    if version is not None and not 0 <= _of(int, version) <= LATEST:
        raise ValueError(f"{version} is no version")
    if len(logprobs) != (0 if version is None else len(tokens)):
        whose = "masked segment" if version is None else "segment"
        raise ValueError(f"{whose} with {len(tokens) // 4} tokens and {len(logprobs) // 4} log-probabilities")
    tokens_t = np.frombuffer(_of(bytes, tokens), "<i4")
    logprobs_t = np.frombuffer(_of(bytes, logprobs), "<f4")
    return Segment(version, tokens_t.astype(np.int32), logprobs_t.astype(np.float32))
