"""Episodes of two turns through the embedded engine and the trainer: what trains is what the engine drew, also when new
weights come in the middle of an episode."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from engine_server import engine_of, save, with_client
from test_engine_updates import published
from test_policy import Tokenizer
from training_tools import make_trainer, recipe

from astracli.data.prompts import Problem
from astracli.engines.client import EngineClient
from astracli.engines.contract import GenRequest, GenResult
from astracli.envs import registry
from astracli.envs.attempt import score
from astracli.envs.contract import Env, EnvSetup, Episode, Policy, Score
from astracli.rl.schedule import sample_seed
from astracli.rl.types import Group, pack_group, unpack_group
from astracli.rollout.episodes import play
from astracli.rollout.groups import group_of
from astracli.rollout.policy import RolloutSampling
from astracli.rollout.request_gate import RequestGate
from astracli.rollout.weight_sync import Event

TOLD = [30, 31, 29]
SIZE = 4


class TwoTurns(Env):
    """A turn, three tokens from outside, another turn; `between` is awaited there."""

    between: Any = None

    async def run(self, problem: Problem, policy: Policy) -> Episode:
        episode = self.begin(problem)
        episode.add(await policy.generate(episode.tokens, budget=5))
        if TwoTurns.between is not None:
            await TwoTurns.between()
        episode.tell(TOLD)
        episode.add(await policy.generate(episode.tokens))
        return episode

    async def score(self, group: Sequence[Episode], problem: Problem) -> list[Score | float]:
        return [float(place % 2) for place, _ in enumerate(group)]


@pytest.mark.parametrize("packing", ["padded", "packed"])
def test_two_turns_are_trained_as_they_were_drawn(
    tmp_path: Path, packing: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three steps: on-policy, with an update between the turns of all episodes, and on-policy again."""
    model = save(tmp_path / "model")
    rollout = {"group_size": SIZE, "max_new_tokens": 20, "context_length": 64, "env": "test_turns:TwoTurns"}
    chosen = recipe(rollout=rollout, train={"packing": packing, "minibatches": 1, "learning_rate": 1e-3})
    trainer = make_trainer(model, chosen)
    engine = engine_of(model, stage_dir=tmp_path / "stage")
    record: dict[int, tuple[list[int], list[int]]] = {}
    """By the seed of the turn: what the engine was asked after, and what it drew."""

    async def scenario(client: EngineClient) -> None:
        generate = client.generate

        async def recorded(requests: Sequence[GenRequest], ended: Any = None) -> list[GenResult]:
            results = await generate(requests, ended)
            for request, drawn in zip(requests, results, strict=True):
                record[request.seed] = (list(request.input_ids), drawn.tokens.tolist())
            return results

        monkeypatch.setattr(client, "generate", recorded)
        gate = RequestGate("engine0", client)
        gate.sync.version = 0
        for event in (Event.FOUND, Event.SERVED):
            gate.sync.tell(event)
        grader: Any = None
        env = registry.find(chosen.rollout.env)(
            EnvSetup(chosen, Tokenizer(), grader, lambda problem: [int(t) for t in problem.question.split()])
        )

        async def groups(first: int) -> list[Group]:
            problems = {first + i: Problem(f"p{i}", f"3 {4 + i} 16", "") for i in range(3)}
            slots: list[int] = []
            episodes = await play(env, gate, RolloutSampling(chosen, (1,)), problems, slots.append)
            assert sum(slots) == -3 * SIZE
            found = []
            for lease, problem in problems.items():
                whole = [one for one in episodes[lease] if isinstance(one, Episode)]
                scores = await score(env, problem, whole, 60.0)
                assert len(whole) == SIZE and isinstance(scores, list)
                made = group_of(env, lease, problem, dict(enumerate(whole)), scores)
                found.append(unpack_group(pack_group(made)))
            return found

        with published(tmp_path) as (publisher, subscriber):

            async def update(version: int) -> None:
                publisher.publish(version, trainer.masters.wire_shards(copy=True), owned=True)
                assert await asyncio.to_thread(subscriber.fetch, version)
                assert (await client.apply_staged(version)).success
                gate.sync.version = version

            for step in range(3):
                ready = 0
                arrived = asyncio.Event()

                async def between(step: int = step, arrived: asyncio.Event = arrived) -> None:
                    nonlocal ready
                    ready += 1
                    if step == 1 and ready == 3 * SIZE:
                        await update(1)
                    if ready == 3 * SIZE:
                        arrived.set()
                    await arrived.wait()

                TwoTurns.between = staticmethod(between)
                got = await groups(10 * step)
                assert {v for g in got for s in g.samples for v in s.versions.tolist()} == {
                    0: {0}, 1: {0, 1}, 2: {2},
                }[step]  # fmt: skip
                result = trainer.train(got, step, step)
                trained = 0
                for micro in result.batch.minibatches[0]:
                    for place, row in enumerate(micro.rows):
                        tokens = row.tokens.tolist()
                        targets = micro.target_N[micro.sequence_N == place].tolist()
                        seeds = [sample_seed(0, row.group.lease_id, row.sample.index, turn) for turn in (0, 1)]
                        (prompt, first), (context, second) = map(record.pop, seeds)
                        assert context == [*prompt, *first, *TOLD] and tokens == context + second
                        assert targets == first + second, "trained == drawn, turn by turn"
                        assert row.versions.tolist() == (
                            [0] * len(first) + [1] * len(second) if step == 1 else [step] * len(targets)
                        )
                        trained += len(targets)
                assert not record, "everything that was drawn is trained"
                assert result.metrics["tokens"] == trained
                assert result.metrics["parity_max_abs"] < 5e-4, "of what this version drew, second turns included"
                own = sum(int((row.versions == step).sum()) for row in result.batch.rows)
                assert result.metrics["parity_tokens"] == own
                assert result.metrics["staleness_max"] == (1.0 if step == 1 else 0.0)
                assert result.metrics["grad_norm"] > 0 and np.isfinite(result.metrics["loss"])
                if step == 1:
                    await update(2)

    try:
        with_client(engine, scenario)
    finally:
        TwoTurns.between = None
