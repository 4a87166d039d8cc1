"""Slots of an engine: requests that wait for one, refills in bursts, two users who never hold more than there are."""

from __future__ import annotations

import asyncio
import random

from astracli.hub.slot_shares import GONE_S, SlotShares
from astracli.rollout import slot_gate
from astracli.rollout.slot_gate import SlotGate


async def waiting(gate: SlotGate, count: int, got: list[int], first: int = 0) -> list[asyncio.Task[None]]:
    async def one(number: int) -> None:
        await gate.take()
        got.append(number)

    tasks = [asyncio.create_task(one(number)) for number in range(first, first + count)]
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    return tasks


def test_slots_go_to_who_waits_longest_and_never_to_more_than_the_limit() -> None:
    async def go() -> None:
        gate, got = SlotGate(3), list[int]()
        await waiting(gate, 5, got)
        assert got == [0, 1, 2] and gate.taken == 3
        gate.free()
        await asyncio.sleep(0)
        assert got == [0, 1, 2, 3]
        gate.limit = 1  # what has a slot keeps it
        gate.free()
        gate.free()
        await asyncio.sleep(0)
        assert got == [0, 1, 2, 3] and gate.taken == 1
        gate.limit = 2
        await asyncio.sleep(0)
        assert got == [0, 1, 2, 3, 4]

    asyncio.run(go())


def test_who_gives_up_waiting_takes_no_slot() -> None:
    async def go() -> None:
        gate, got = SlotGate(1), list[int]()
        tasks = await waiting(gate, 3, got)
        tasks[1].cancel()
        await asyncio.sleep(0)
        gate.free()
        await asyncio.sleep(0)
        assert got == [0, 2] and gate.taken == 1
        last = await waiting(gate, 1, got, 3)
        gate.free()  # its turn is set, and it is cancelled before it sees that
        last[0].cancel()
        await asyncio.gather(*last, return_exceptions=True)
        assert gate.taken == 0 and got == [0, 2]
        gate.limit = 0
        given_up, kept = await waiting(gate, 2, got, 4)
        given_up.cancel()
        gate.limit = 1  # before it has seen that
        await asyncio.gather(given_up, kept, return_exceptions=True)
        assert gate.taken == 1 and got == [0, 2, 5]

    asyncio.run(go())


def test_a_full_engine_is_refilled_by_bursts_and_who_waits_alone_waits_a_while(monkeypatch) -> None:
    monkeypatch.setattr(slot_gate, "LONGEST_WAIT_S", 0.05)

    async def go() -> None:
        gate, got = SlotGate(16, burst=4), list[int]()
        await waiting(gate, 40, got)
        assert len(got) == 16
        for _ in range(3):
            gate.free()
            await asyncio.sleep(0)
        assert len(got) == 16
        gate.free()
        await asyncio.sleep(0)
        assert len(got) == 20
        gate.free()
        while len(got) == 20:  # one slot, and nobody else ends
            await asyncio.sleep(0.005)
        assert len(got) == 21 and gate.taken == 16

    asyncio.run(go())


def shares(share: float = 0.5, slots: int = 100) -> tuple[SlotShares, list[float]]:
    now = [0.0]
    return SlotShares(slots, share, lambda: now[0]), now


def test_who_is_alone_has_all_and_both_get_their_share() -> None:
    board, _ = shares(0.3)
    assert board.limit("e", "rollout", 100, 0).limit == 100
    assert not board.limit("e", "rollout", 100, 100).shared
    assert board.limit("e", "eval", 500, 0).limit == 0  # rollouts hold everything, and know of nothing
    told = board.limit("e", "rollout", 100, 100)
    assert told.limit == 70 and told.shared
    assert board.limit("e", "eval", 500, 0).limit == 0  # they may have sent some before they heard that
    board.limit("e", "rollout", 100, 90)
    assert board.limit("e", "eval", 500, 0).limit == 10  # 90 still run
    board.limit("e", "rollout", 100, 70)
    assert board.limit("e", "eval", 500, 10).limit == 30
    assert board.limit("other", "eval", 500, 0).limit == 100  # an engine for itself
    board.limit("e", "eval", 0, 0)
    assert board.limit("e", "rollout", 100, 70).limit == 100


def test_what_one_cannot_use_the_other_gets() -> None:
    board, _ = shares()
    board.limit("e", "rollout", 20, 20)
    board.limit("e", "eval", 500, 0)
    board.limit("e", "rollout", 20, 20)
    board.limit("e", "rollout", 20, 20)
    assert board.limit("e", "eval", 500, 0).limit == 80
    board.limit("e", "eval", 5, 5)
    assert board.limit("e", "eval", 5, 5).limit == 5
    assert board.limit("e", "rollout", 100, 20).limit == 95


def test_a_process_that_is_gone_holds_nothing() -> None:
    board, now = shares()
    board.limit("e", "eval", 500, 0)
    assert board.limit("e", "rollout", 100, 0).limit == 0
    now[0] = GONE_S + 1
    assert board.limit("e", "rollout", 100, 0).limit == 100


def test_a_board_without_slots_sets_no_limit() -> None:
    assert SlotShares(0, 0.5, lambda: 0.0).limit("e", "eval", 5000, 0).limit > 10**9


def test_together_they_never_hold_more_than_there_are_and_both_come_to_their_share() -> None:
    """Both act on what they were told last, at times of their own; requests end at random."""
    for seed in range(20):
        draw, (board, now) = random.Random(seed), shares(0.5, 64)
        held, limit, wants = {"rollout": 0, "eval": 0}, {"rollout": 0, "eval": 0}, {"rollout": 64, "eval": 1000}
        history = []
        for step in range(3000):
            user = draw.choice(("rollout", "eval"))
            if step % 700 == 0:
                wants["rollout"] = draw.choice((64, 64, 10, 64))
            if draw.random() < 0.5:
                now[0] += 0.05
                limit[user] = board.limit("e", user, wants[user], held[user]).limit
            held[user] -= draw.randint(0, held[user] // 8)
            held[user] = max(held[user], min(limit[user], wants[user], held[user] + draw.randint(0, 64)))
            assert held["rollout"] + held["eval"] <= 64
            history.append(held["rollout"] + held["eval"])
        assert sum(history[1000:]) > 0.8 * 64 * len(history[1000:])
