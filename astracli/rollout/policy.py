"""What an episode generates with: one engine, whatever updates come meanwhile; requests gathered into calls.

An Env asks for a turn. It becomes a request, and again one with a longer prefix each time that an update ends it, until
the turn has ended. What is asked for in one go of the event loop is one call to the engine: the first turns of a group.
In a deterministic run a call waits until every episode of the wave either asks for a turn or has ended, and holds them
in the order of lease and sample. What the engine computes together then depends on nothing else, to the last bit.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import KW_ONLY, dataclass, field
from typing import get_args

import numpy as np

from astracli.config.recipe import Recipe
from astracli.engines.contract import GenRequest, GenResult
from astracli.engines.stops import StopStrings
from astracli.envs import time_limit
from astracli.envs.contract import Episode, TokenIds, Turn
from astracli.errors import RunFailed
from astracli.rl.schedule import sample_seed
from astracli.rl.types import FinishReason
from astracli.rollout.request_gate import RequestGate

EMPTY_ABORTS = 50
"""Times in a row that an engine may end a request without a single token."""


@dataclass(frozen=True)
class RolloutSampling:
    """How tokens are drawn; the same for every episode of a run."""

    recipe: Recipe
    stop_ids: tuple[int, ...]
    stop: StopStrings | None = None
    """Of every turn."""

    def room(self, prompt: int, length: int) -> int:
        """Tokens that may still be drawn in an episode of `length` tokens whose prompt had so many of them."""
        return self.recipe.rollout.completion_room(prompt) - (length - prompt)


@dataclass
class Place:
    """An episode's place on the engine: taken while it has a request there, or one is about to come."""

    order: int
    """Of the episode, among those of the wave."""
    taken: bool = True


@dataclass
class Ask:
    """A turn while it is generated."""

    place: Place
    context: list[int]
    room: int
    """Most tokens of the turn."""
    stop_ids: tuple[int, ...]
    seed: int
    done: asyncio.Future[Turn]
    _: KW_ONLY
    finish: str | None = None
    empty: int = 0
    """Requests in a row that were ended without a token."""
    results: list[GenResult] = field(default_factory=list)

    @property
    def length(self) -> int:
        return sum(len(result.tokens) for result in self.results)

    def ends(self, result: GenResult) -> bool:
        """Whether nothing is left to ask for after this result: an abort that used up the room is an end."""
        return result.finish_reason != "abort" or self.length + len(result.tokens) >= self.room

    def take(self, result: GenResult) -> None:
        if self.ends(result):
            self.finish = "stop" if result.finish_reason == "stop" else "length"
        self.empty = 0 if len(result.tokens) else self.empty + 1
        self.results.append(result)

    def request(self, sampling: RolloutSampling) -> GenRequest:
        """What is asked for now: everything, or its continuation."""
        prefix = [int(token) for result in self.results for token in result.tokens]
        return GenRequest(
            input_ids=[*self.context, *prefix],
            max_new_tokens=self.room - len(prefix),
            temperature=sampling.recipe.rollout.temperature,
            top_p=sampling.recipe.rollout.top_p,
            stop_token_ids=self.stop_ids,
            seed=self.seed,
            draw_offset=len(prefix),
            stop=sampling.stop,
        )

    def turn(self) -> Turn:
        tokens = np.concatenate([result.tokens for result in self.results])
        logprobs = np.concatenate([result.logprobs for result in self.results])
        each = np.array([result.version for result in self.results], np.int32)
        versions = each.repeat([len(result.tokens) for result in self.results])
        return Turn(tokens, logprobs, versions, "stop" if self.finish == "stop" else "length")


class EngineCalls:
    """Gathers what the episodes of some groups ask for into calls of their engine.

    `slots` is told of each place on the engine that is free (-1) or taken again (1); not in a `whole` wave, which waits
    for all of its episodes. Calls are tasks of `tasks`: an engine that is lost ends them all, and the episodes there.
    """

    def __init__(
        self,
        worker: RequestGate,
        sampling: RolloutSampling,
        tasks: asyncio.TaskGroup,
        *,
        whole: bool,
        slots: Callable[[int], None],
    ):
        self.sampling = sampling
        self._worker, self._tasks, self._whole, self._slots = worker, tasks, whole, slots
        self._pending: list[Ask] = []
        self._busy = 0
        """Episodes that neither wait for a turn nor have ended."""
        self._scheduled = False

    def enter(self) -> None:
        """An episode begins."""
        self._busy += 1

    def leave(self, place: Place) -> None:
        """It has ended."""
        self._busy -= 1
        self._take(place, False)
        self._due()

    async def ask(self, ask: Ask) -> Turn:
        """The turn, once it has ended."""
        self._take(ask.place, True)
        self._pending.append(ask)
        self._busy -= 1
        self._due()
        return await ask.done

    def _take(self, place: Place, taken: bool) -> None:
        if place.taken is not taken and not self._whole:
            place.taken = taken
            self._slots(1 if taken else -1)

    def _due(self) -> None:
        """Send what is asked for: at once when everyone of the wave waits, else with what else this go brings."""
        if not self._pending:
            return
        if not self._whole:
            if not self._scheduled:
                self._scheduled = True
                asyncio.get_running_loop().call_soon(self._send)
        elif not self._busy:
            self._send()

    def _send(self) -> None:
        self._scheduled = False
        asks = sorted((ask for ask in self._pending if not ask.done.cancelled()), key=lambda ask: ask.place.order)
        self._pending = []
        if asks:
            self._tasks.create_task(self._call(asks))

    async def _call(self, asks: Sequence[Ask]) -> None:
        early: set[int] = set()

        def heard(place: int, result: GenResult, proven: bool) -> None:
            ask = asks[place]
            if not ask.ends(result):
                return
            self._take(ask.place, False)
            if proven:
                early.add(place)
                ask.take(result)
                self._settle(ask)

        requests = [ask.request(self.sampling) for ask in asks]
        results = await self._worker.generate(requests, None if self._whole else heard)
        for place, (ask, result) in enumerate(zip(asks, results, strict=True)):
            if place not in early:
                ask.take(result)
        cut = [ask for ask in asks if ask.finish is None]
        if cut:
            self._worker.count_aborted(len(cut), sum(len(ask.context) + ask.length for ask in cut))
            if max(ask.empty for ask in cut) >= EMPTY_ABORTS:
                raise RunFailed(f"{self._worker.name} ended a request {EMPTY_ABORTS} times without a token")
        self._pending += cut
        ended = [ask for place, ask in enumerate(asks) if ask.finish is not None and place not in early]
        for ask in ended:
            self._take(ask.place, False)
            self._settle(ask)
        self._due()

    def _settle(self, ask: Ask) -> None:
        """Its episode goes on, with the next go of the event loop."""
        if not ask.done.done():
            self._busy += 1
            ask.done.set_result(ask.turn())


class EpisodePolicy:
    """The policy of one episode (`envs.contract.Policy`), and a record of what it drew."""

    def __init__(self, calls: EngineCalls, lease_id: int, index: int, order: int):
        self.index = index
        self._calls, self._place = calls, Place(order)
        self._lease_id = lease_id
        self._drawn: list[tuple[np.ndarray, Turn]] = []
        """Each turn with the tokens that it follows."""
        self._asks = False
        calls.enter()

    async def generate(self, tokens: TokenIds, stop: Sequence[int] = (), budget: int | None = None) -> Turn:
        """See `envs.contract.Policy`."""
        context = np.array(tokens, np.int32)
        if context.ndim != 1 or not len(context):
            raise ValueError(f"generate takes the tokens of the episode so far, [L] with L > 0, not {context.shape}")
        if self._asks:
            raise RuntimeError("an episode asks for one turn at a time: await `generate` before the next call")
        sampling = self._calls.sampling
        prompt = len(self._drawn[0][0]) if self._drawn else len(context)
        room = sampling.room(prompt, len(context))
        room = room if budget is None else min(room, budget)
        if room < 1:
            turn = Turn(np.zeros(0, np.int32), np.zeros(0, np.float32), np.zeros(0, np.int32), "length")
        else:
            turn = await self._ask(context, room, (*sampling.stop_ids, *stop))
        self._drawn.append((context, turn))
        return turn

    async def _ask(self, context: np.ndarray, room: int, stop_ids: tuple[int, ...]) -> Turn:
        done: asyncio.Future[Turn] = asyncio.get_running_loop().create_future()
        seed = sample_seed(self._calls.sampling.recipe.seed, self._lease_id, self.index, len(self._drawn))
        ask = Ask(self._place, context.tolist(), room, stop_ids, seed, done)
        self._asks = True
        try:
            with time_limit.paused():
                return await self._calls.ask(ask)
        finally:
            self._asks = False

    def end(self) -> None:
        """Its episode has ended."""
        self._calls.leave(self._place)

    def check(self, episode: Episode) -> None:
        """Raises ValueError unless what the episode trains is what was drawn, after the tokens that it was drawn after.

        A turn may be left out, cut at its end, or masked; nothing else may be marked as drawn.
        """
        episode.changed()
        length, marked = len(episode.tokens), len(episode.loss_mask)
        drawn = int(np.count_nonzero(episode.loss_mask))
        if length != marked or not drawn == len(episode.logprobs) == len(episode.versions):
            raise ValueError(
                f"an episode of {length} tokens has {marked} in its loss_mask, of which {drawn} are drawn, with "
                f"{len(episode.logprobs)} log-probabilities and {len(episode.versions)} versions"
            )
        if episode.finish not in get_args(FinishReason):
            raise ValueError(f"an episode's finish is `stop` or `length`, not {episode.finish!r}")
        if not length or episode.loss_mask[0]:
            raise ValueError("an episode begins with a prompt: its first token cannot be drawn")
        used = 0
        for first, end in episode.spans:
            place = first
            while place < end:
                counts = (_matches(episode, place, end - place, used, *one) for one in self._drawn)
                count = next(filter(None, counts), 0)
                if not count:
                    raise ValueError(
                        f"the episode's tokens from {place} on are marked as drawn, and no turn of its policy drew "
                        "them after the tokens before; mask them with `tell`, or call `generate` with `episode.tokens`"
                    )
                place, used = place + count, used + count


def _matches(episode: Episode, place: int, most: int, used: int, context: np.ndarray, turn: Turn) -> int:
    """How many tokens at `place`, at most `most`, are the turn's; 0 when it is another turn. `used`: drawn before."""
    count = min(most, len(turn.tokens))
    same = (
        len(context) == place
        and context.tobytes() == episode.tokens[:place].tobytes()
        and turn.tokens[:count].tobytes() == episode.tokens[place : place + count].tobytes()
        and turn.logprobs[:count].tobytes() == episode.logprobs[used : used + count].tobytes()
        and turn.versions[:count].tobytes() == episode.versions[used : used + count].tobytes()
    )
    return count if same else 0
