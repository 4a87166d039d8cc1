"""The Env contract: the only way from a problem to trained tokens. docs/extending.md shows an environment in ten lines.

    episode = await env.run(problem, policy)      unscored: tokens, which of them were drawn, how it ended
    scores  = await env.score(group, problem)     all episodes of one problem together, with its row in view

A policy generates. What becomes of a request meanwhile (a full engine, new weights, a request that is ended and
continued) is the policy's affair: an Env sees a whole turn. Token in, token out: an Env hands token ids to the policy
and keeps those that come back. Text is never tokenised again to be trained on.

Shape letters: L tokens of an episode, N drawn tokens among them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from astracli.envs import time_limit
from astracli.models.chat import ChatFormat
from astracli.models.conversation import Conversation
from astracli.rewards.reward import Grade, GradeItem
from astracli.rl.types import FinishReason

if TYPE_CHECKING:
    from astracli.config.recipe import Recipe
    from astracli.data.prompts import Problem

TokenIds = Sequence[int] | np.ndarray
Score = Grade
"""Of one episode: `reward` trains it, `verdict` counts it, `parts` are named figures for the metrics."""


@dataclass(frozen=True)
class Turn:
    """What the policy drew at one go."""

    tokens: np.ndarray
    """int32 [t], the stop token included"""
    logprobs: np.ndarray
    """float32 [t]: the engine's own, after temperature and before top-p"""
    versions: np.ndarray
    """int32 [t]: the oldest weights in force while the token's request was drawn"""
    finish: FinishReason
    """`length`: the budget, or the room of the whole episode, is used up; then `tokens` may be empty."""


class Policy(Protocol):
    """Generates for one episode, one turn at a time."""

    async def generate(self, tokens: TokenIds, stop: Sequence[int] = (), budget: int | None = None) -> Turn:
        """The turn that follows `tokens`, which are all tokens of the episode so far.

        `stop`: token ids that end the turn besides the model's own. `budget`: most tokens of this turn; the recipe's
        `rollout.max_new_tokens` and `rollout.context_length` bound the whole episode in any case.
        """
        ...


@dataclass
class Episode:
    """Token ids with a mask, from the prompt on. Unscored."""

    tokens: np.ndarray
    """int32 [L]"""
    loss_mask: np.ndarray
    """bool [L]: 1 where the policy drew the token. The first is 0: a prompt begins every episode."""
    logprobs: np.ndarray
    """float32 [N], of the drawn tokens"""
    versions: np.ndarray
    """int32 [N]"""
    finish: FinishReason = "stop"
    messages: list[dict[str, Any]] = field(default_factory=list)
    """The chat so far, for whoever scores it; nothing is tokenised from it."""
    parts: dict[str, float] = field(default_factory=dict)
    """Named figures of the environment (turns, errors of tools), for the metrics."""
    text: str | None = None
    """What `answer` says, once it was decoded."""

    def __post_init__(self) -> None:
        self.tokens = np.asarray(self.tokens, np.int32)
        self.loss_mask = np.asarray(self.loss_mask, bool)
        self.logprobs = np.asarray(self.logprobs, np.float32)
        self.versions = np.asarray(self.versions, np.int32)

    @classmethod
    def of_prompt(cls, tokens: TokenIds, messages: Sequence[dict[str, Any]] = ()) -> Episode:
        """An episode that has its prompt and nothing else."""
        prompt = np.array(tokens, np.int32)
        nothing = (np.zeros(0, np.float32), np.zeros(0, np.int32))
        return cls(prompt, np.zeros(len(prompt), bool), *nothing, messages=list(messages))

    def add(self, turn: Turn) -> None:
        """What the policy drew."""
        self._append(turn.tokens, True)
        self.logprobs = np.concatenate([self.logprobs, turn.logprobs])
        self.versions = np.concatenate([self.versions, turn.versions])
        self.finish = turn.finish

    def tell(self, tokens: TokenIds) -> None:
        """Tokens that the policy sees and did not draw: a tool's result, what the user says next."""
        self._append(np.array(tokens, np.int32), False)

    def cut(self, length: int) -> None:
        """Leave out what was told behind the first `length` tokens."""
        assert not self.loss_mask[length:].any(), "what was drawn stays"
        self.changed()
        self.tokens, self.loss_mask = self.tokens[:length], self.loss_mask[:length]
        self.finish = "length"

    def changed(self) -> None:
        """The mask may be another: forget what follows from it."""
        self.__dict__.pop("spans", None)

    def _append(self, tokens: np.ndarray, drawn: bool) -> None:
        self.changed()
        self.tokens = np.concatenate([self.tokens, tokens])
        self.loss_mask = np.concatenate([self.loss_mask, np.full(len(tokens), drawn)])

    @cached_property
    def spans(self) -> list[tuple[int, int]]:
        """(first, end) of each run of drawn tokens. Kept until `add`, `tell` or `changed`."""
        mask = self.loss_mask
        edges = ((mask[1:] != mask[:-1]).nonzero()[0] + 1).tolist()
        edges += [len(mask)] * (len(edges) % 2)
        return list(zip(edges[::2], edges[1::2], strict=True))

    @property
    def answer(self) -> np.ndarray:
        """int32: the last run of drawn tokens, the last turn; empty without a turn."""
        spans = self.spans
        return self.tokens[slice(*spans[-1])] if spans else self.tokens[:0]


class Grader(Protocol):
    """Grades completions by the recipe's reward, in processes of their own."""

    async def agrade(self, items: Sequence[GradeItem]) -> list[Grade]: ...


@dataclass(frozen=True)
class EnvSetup:
    """What an Env is made with: once in each process, for all problems."""

    recipe: Recipe
    tokenizer: Any
    grader_of: Callable[[Problem], Grader]
    """The recipe's reward for a problem, which may depend on the problem's source."""
    prompt_tokens: Callable[..., TokenIds]
    """(problem, JSON schemas of tools = ()) -> the prompt as the recipe says it: template and chat template applied,
    generation prompt added."""


class Env:
    """Base class. One object serves all episodes of a process, thousands at once: what belongs to one episode stands in
    local variables of `run`."""

    schemas: Sequence[Mapping[str, Any]] = ()
    """JSON schemas of the tools that its prompts name."""

    def __init__(self, setup: EnvSetup):
        """Raises UserError for what the environment cannot work with: it is made once before a run, too."""
        self.recipe = setup.recipe
        self.tokenizer = setup.tokenizer
        self.setup = setup
        self._roles: set[str] = set()
        """Of turns that the chat template was found to take behind an answer."""

    def close(self) -> None:
        """The process ends: let go of what the environment holds."""

    async def run(self, problem: Problem, policy: Policy) -> Episode:
        """One episode, from the prompt to its end. What it raises ends this episode, and no other."""
        raise NotImplementedError

    async def score(self, group: Sequence[Episode], problem: Problem) -> Sequence[Score | float]:
        """One score for each episode of a problem. By default the recipe's reward grades each one's last turn."""
        items = []
        for episode in group:
            answer = episode.answer.tolist()
            episode.text = str(self.tokenizer.decode(answer, skip_special_tokens=True))
            messages = episode.messages or problem.messages
            items.append(GradeItem(problem.question, problem.answer, episode.text, answer, messages, problem.row))
        with time_limit.paused():
            return await self.setup.grader_of(problem).agrade(items)

    def check(self, problem: Problem) -> None:
        """Before a run, with a problem of it: raises UserError for what would go wrong with each."""

    def unfit(self, problem: Problem) -> str | None:
        """Why no episode can begin from this problem (its prompt is too long); None when one can."""
        length, rollout = len(self.prompt(problem)), self.recipe.rollout
        longest = self.recipe.data.max_prompt_tokens
        if length > longest:
            return f"prompt of {length} tokens, data.max_prompt_tokens = {longest}"
        if rollout.completion_room(length) < 1:
            return f"prompt of {length} tokens leaves no room in rollout.context_length = {rollout.context_length}"
        return None

    def begin(self, problem: Problem) -> Episode:
        """An episode with the recipe's prompt of a problem."""
        return Episode.of_prompt(self.prompt(problem), problem.messages)

    def prompt(self, problem: Problem) -> TokenIds:
        """The tokens of the recipe's prompt of a problem."""
        return self.setup.prompt_tokens(problem, *([self.schemas] if self.schemas else []))

    @cached_property
    def conversation(self) -> Conversation:
        """The chat template of the model."""
        return Conversation(self.tokenizer, ChatFormat.of(self.recipe), self.schemas)

    def say(self, episode: Episode, said: str | Sequence[dict[str, Any]]) -> None:
        """Tell what the user says next (a text), or turns of other roles, by the model's chat template.

        Closes the turn that was drawn last and opens the next one. Raises UserError when the template cannot do that
        without writing earlier turns anew.
        """
        turns = [{"role": "user", "content": said}] if isinstance(said, str) else list(said)
        for role in {str(turn["role"]) for turn in turns} - self._roles:
            self.conversation.check(role)
            self._roles.add(role)
        answer = episode.answer if episode.loss_mask[-1] else episode.tokens[:0]
        behind = self.conversation.after(answer.tolist(), turns)
        episode.messages = [*episode.messages, {"role": "assistant", "content": self.text(answer)}, *turns]
        episode.tell(behind)

    def text(self, tokens: TokenIds) -> str:
        """What tokens say, without special ones."""
        return str(self.tokenizer.decode([int(token) for token in tokens], skip_special_tokens=True))

    def encode(self, text: str) -> list[int]:
        """The tokens of a text alone: no special ones, no chat template."""
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])
