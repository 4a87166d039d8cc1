"""Environments: found by name, with a group in view, and each episode ended by its own errors alone."""

from __future__ import annotations

import asyncio
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import ClassVar

import pytest
from hub_tools import in_file
from rollout_world import LENGTH, World, expected, records, until

from astracli.data.prompts import Problem
from astracli.envs import registry
from astracli.envs.contract import Env, Episode, Policy, Score
from astracli.envs.single_turn import SingleTurnEnv
from astracli.envs.time_limit import TooLong
from astracli.errors import RunFailed, UserError
from astracli.rl.types import Group

HERE = "test_envs"


class Halves(SingleTurnEnv):
    """Every other episode raises before it asks for anything, or after."""

    begun = 0

    async def run(self, problem: Problem, policy: Policy) -> Episode:
        Halves.begun += 1
        number = Halves.begun
        if number % 4 == 1:
            raise KeyError("no such tool")
        episode = await super().run(problem, policy)
        if number % 4 == 3:
            raise ValueError("cannot read the answer")
        return episode

    async def score(self, group: Sequence[Episode], problem: Problem) -> list[Score | float]:
        """The first of a group is worth 1: a score that needs the whole group."""
        assert all(isinstance(episode, Episode) for episode in group) and problem.answer
        return [Score(2.5, "right"), *[0.5] * (len(group) - 1)]


class OneOfFour(Halves):
    """Three of four raise: what is left of a group has no advantages."""

    async def run(self, problem: Problem, policy: Policy) -> Episode:
        Halves.begun += 1
        if Halves.begun % 4:
            raise ConnectionError("no game server")
        return await SingleTurnEnv.run(self, problem, policy)


class Raises(Env):
    async def run(self, problem: Problem, policy: Policy) -> Episode:
        raise OSError(f"the game of {problem.question} is gone")


class Long(SingleTurnEnv):
    """Lasts four times as long as a lease that nobody renews."""

    begun: ClassVar[Counter[str]] = Counter()

    async def run(self, problem: Problem, policy: Policy) -> Episode:
        Long.begun[problem.id] += 1
        await asyncio.sleep(2.4)
        return await super().run(problem, policy)


class Talks(SingleTurnEnv):
    """Asks back by a template that cannot be rendered in parts."""

    async def run(self, problem: Problem, policy: Policy) -> Episode:
        episode = await super().run(problem, policy)
        self.tokenizer.chat_template = "{{ messages | length }}"
        self.tokenizer.apply_chat_template = lambda turns, **_: str(len(turns)) + str(turns[-1]["content"])
        self.say(episode, "sure?")
        return episode


class BadScore(SingleTurnEnv):
    async def score(self, group: Sequence[Episode], problem: Problem) -> list[Score | float]:
        return [1.0]


class NoNumber(SingleTurnEnv):
    async def score(self, group: Sequence[Episode], problem: Problem) -> list[Score | float]:
        return [float("nan")] * len(group)


class Sleeps(SingleTurnEnv):
    """The first two episodes never end: one waits, one blocks the event loop, in a task of its own."""

    begun = 0

    async def run(self, problem: Problem, policy: Policy) -> Episode:
        Sleeps.begun += 1
        number = Sleeps.begun
        episode = await super().run(problem, policy)
        if number == 1:
            await asyncio.Event().wait()
        if number == 2:
            await asyncio.gather(self.block())
        return episode

    async def block(self) -> None:
        time.sleep(3600)


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    for kind in (Halves, Sleeps):
        kind.begun = 0
    made = World(tmp_path, {"drop_equal_groups": False}, step_s=0.002)
    yield made
    made.close()


def test_a_name_a_path_and_what_is_neither() -> None:
    assert registry.find("single_turn") is SingleTurnEnv and registry.find(f"{HERE}:Halves") is Halves
    for name, words in {
        "single_tern": "no environment `single_tern` is installed (there is: single_turn, tools, verifiers); did "
        "you mean `single_turn`?",
        f"{HERE}:Nobody": "`test_envs` has no `Nobody`",
        f"{HERE}:LENGTH": "is no subclass of `astracli.envs.contract.Env`",
        "no_such_module:Env": "importing `no_such_module` failed: ModuleNotFoundError",
        ":Env": "is not of the form `pkg.module:Class`",
    }.items():
        with pytest.raises(UserError) as refused:
            registry.find(name)
        assert refused.value.message.startswith(f"rollout.env = `{name}`") and words in refused.value.message
        assert refused.value.hint


def test_a_module_is_tried_in_a_process_before_a_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    good = "from astracli.envs.contract import Env\nprint('noise')\nclass Mine(Env): pass\n"
    for name, text in {
        "good": good,
        "bad": "raise ValueError('half\\nwritten')",
        "dead": "import os; os._exit(7)",
    }.items():
        (tmp_path / f"env_{name}.py").write_text(text)
    registry.validate("env_good:Mine")
    assert "env_good" not in sys.modules
    with pytest.raises(UserError, match="importing `env_bad` failed: ValueError: half"):
        registry.validate("env_bad:Mine")
    with pytest.raises(UserError, match=r"its import ended the process \(code 7\)"):
        registry.validate("env_dead:Mine")
    with pytest.raises(UserError, match="did you mean `single_turn`"):
        registry.validate("single_tern")


def test_an_episode_that_raises_leaves_its_group_and_is_shown_once(
    world: World, capfd: pytest.CaptureFixture[str]
) -> None:
    got: list[Group] = []

    async def scenario() -> None:
        got.extend(await world.batch(0))
        world.store.announce(1, 1)
        await until(lambda: bool(records(world)))

    asyncio.run(world.play(scenario, rollout={"env": f"{HERE}:Halves"}))
    for group in got:
        assert [sample.index for sample in group.samples] == [1, 3], "0 raised before it asked, 2 afterwards"
        assert [sample.reward for sample in group.samples] == [2.5, 0.5], "scored as a group"
        assert [sample.verdict for sample in group.samples] == ["right", "right"]
        assert all(s.tokens.tolist() == expected(group.lease_id, s.index) for s in group.samples)
    said = capfd.readouterr().err
    assert said.count("Traceback (most recent call last)") == 2, "one of each kind"
    assert said.count("KeyError: 'no such tool'") == said.count("ValueError: cannot read the answer") == 1
    assert records(world)[0]["failed_episodes"] >= 8 and records(world)[0]["failed_episodes"] % 2 == 0
    (worker,) = world.workers
    assert (worker.use.outstanding, worker.use.sent) == (0, 0)


def test_a_group_that_is_too_small_for_its_advantages_is_skipped(world: World) -> None:
    async def scenario() -> None:
        await until(lambda: world.store.counts().skipped >= 6)

    asyncio.run(world.play(scenario, rollout={"env": f"{HERE}:OneOfFour"}))
    assert world.store.counts().waiting == 0
    (row,) = in_file(world.path, "SELECT reason FROM groups WHERE state = 'skipped' LIMIT 1")
    assert row[0].startswith("3 of 4 episodes failed, the last with ConnectionError: no game server (")


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("Raises", r"the last with OSError: the game of .+ is gone \(.*test_envs.py, line \d+\)"),
        ("NoNumber", r"the last with ValueError: a score is nan"),
        ("BadScore", r"the last with ValueError: `score` of BadScore returned 1 scores for 4 episodes"),
    ],
)
def test_a_run_in_which_every_episode_fails_ends_in_the_error(world: World, name: str, words: str) -> None:
    async def scenario() -> None:
        await asyncio.sleep(60)

    with pytest.raises(ExceptionGroup) as ended:
        asyncio.run(world.play(scenario, rollout={"env": f"{HERE}:{name}"}))
    (failure,) = ended.value.exceptions
    assert isinstance(failure, RunFailed)
    failure.args = (failure.message,)
    with pytest.raises(RunFailed, match=r"64 episodes in a row failed in rollout.env = .*" + words):
        raise failure
    (row,) = in_file(world.path, "SELECT reason FROM groups WHERE state = 'skipped' LIMIT 1")
    assert row[0].startswith("4 of 4 episodes failed, the last with ")


def test_an_episode_that_hangs_ends_alone(world: World, capfd: pytest.CaptureFixture[str]) -> None:
    """One waits for ever, one blocks the event loop; neither delays the others for longer than the limit."""
    got: list[Group] = []

    async def scenario() -> None:
        for step in (0, 1):  # the first group comes late, and must be in one of these
            got.extend(await world.batch(step))

    asyncio.run(world.play(scenario, rollout={"env": f"{HERE}:Sleeps", "env_timeout_s": 2.0}))
    first = next(group for group in got if group.lease_id == 0)
    assert [sample.index for sample in first.samples] == [2, 3]
    assert all(len(sample.tokens) == LENGTH for group in got for sample in group.samples)
    assert all(len(group.samples) == 4 for group in got if group is not first)
    assert len(got) == 8
    said = capfd.readouterr().err
    assert said.count(f"{TooLong.__name__}: it took more than rollout.env_timeout_s = 2 s outside of generation") == 2
    assert "await asyncio.Event().wait()" in said and "time.sleep(3600)" in said, "where each of them hung"


def test_a_lease_lives_as_long_as_its_episodes(tmp_path: Path) -> None:
    world = World(tmp_path, {"drop_equal_groups": False, "lease_timeout_s": 0.6}, step_s=0.002)
    got: list[Group] = []

    async def scenario() -> None:
        got.extend(await world.batch(0))

    try:
        asyncio.run(world.play(scenario, rollout={"env": f"{HERE}:Long"}, launch={"lease_timeout_s": 0.6}))
    finally:
        world.close()
    assert len(got) == 4 and all(len(group.samples) == 4 for group in got)
    assert {Long.begun[group.problem_id] for group in got} == {4}, "no prompt was given out again"


def test_a_template_that_an_environment_cannot_talk_by_ends_the_run_with_the_reason(world: World) -> None:
    async def scenario() -> None:
        await asyncio.sleep(60)

    with pytest.raises(ExceptionGroup) as ended:
        asyncio.run(world.play(scenario, rollout={"env": f"{HERE}:Talks"}))
    (failure,) = ended.value.exceptions
    assert isinstance(failure, UserError) and "cannot be rendered in parts" in failure.message


def test_waiting_for_the_engine_is_not_the_environments_time(world: World) -> None:
    """A completion takes 20 x 0.15 s, twice the limit."""
    world.engine.step_s = 0.15
    got: list[Group] = []

    async def scenario() -> None:
        got.extend(await world.batch(0))

    asyncio.run(world.play(scenario, rollout={"env_timeout_s": 1.5}))
    assert [len(group.samples) for group in got] == [4] * 4
