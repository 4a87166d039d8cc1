"""The states of an engine's weights, told by hand: what each walk does to the gate and to results; no engine."""

from __future__ import annotations

import itertools

import pytest

from astracli.rollout.weight_sync import TRANSITIONS, Event, State, WeightSync

E, S = Event, State
Seen = tuple[State, bool, bool, int]
"""(state, whether requests may go out, whether results are used, how often they became void)"""


def walked(*events: Event) -> tuple[WeightSync, list[Seen]]:
    sync, seen = WeightSync(), []
    for event in events:
        sync.tell(event)
        seen.append((sync.state, sync.gate.is_set(), sync.proven.is_set(), sync.voids))
    return sync, seen


SERVING = (E.FOUND, E.WANTED, E.STAGED, E.SERVED)


def test_an_update_beside_requests_keeps_the_gate_open() -> None:
    _, seen = walked(*SERVING, E.WANTED, E.STAGED, E.SERVED)
    assert seen == [
        (S.STARTING, False, True, 0),
        (S.STAGING, False, True, 0),  # nothing is served before the first version
        (S.APPLYING, False, True, 0),
        (S.SERVING, True, True, 0),
        (S.STAGING, True, True, 0),
        (S.APPLYING, True, True, 0),
        (S.SERVING, True, True, 0),
    ]


def test_an_update_that_ends_requests_shuts_the_gate_while_it_applies() -> None:
    _, seen = walked(*SERVING, E.WANTED, E.SHUT, E.STAGED, E.SERVED)
    assert [(state, gate) for state, gate, *_ in seen[4:]] == [
        (S.STAGING, True), (S.PAUSING, False), (S.APPLYING, False), (S.SERVING, True),
    ]  # fmt: skip


def test_results_are_held_from_the_pause_until_the_read_back() -> None:
    sync, _ = walked(*SERVING, E.WANTED, E.STAGED)
    sync.hold()
    assert not sync.proven.is_set() and sync.gate.is_set()
    sync.tell(E.UNPROVEN)
    assert (sync.state, sync.gate.is_set(), sync.proven.is_set()) == (S.VERIFYING, True, False)
    sync.tell(E.PROVEN)
    assert (sync.state, sync.gate.is_set(), sync.proven.is_set(), sync.voids) == (S.SERVING, True, True, 0)


def test_wrong_weights_make_results_void_and_the_second_read_back_serves_nobody() -> None:
    sync, _ = walked(*SERVING, E.WANTED, E.STAGED)
    sync.version = 7
    for event in (E.UNPROVEN, E.DISPROVEN):
        sync.tell(event)
    assert (sync.state, sync.gate.is_set(), sync.proven.is_set(), sync.voids) == (S.STAGING, False, True, 1)
    assert sync.version is None
    for event in (E.WANTED, E.STAGED, E.DOUBTED):
        sync.tell(event)
    assert (sync.state, sync.gate.is_set(), sync.proven.is_set()) == (S.VERIFYING, False, False)
    sync.tell(E.PROVEN)
    assert (sync.state, sync.gate.is_set(), sync.proven.is_set(), sync.voids) == (S.SERVING, True, True, 1)


def test_a_refused_version_is_sent_again_and_what_ran_through_it_is_void() -> None:
    _, seen = walked(*SERVING, E.WANTED, E.STAGED, E.REFUSED, E.WANTED, E.STAGED, E.SERVED)
    assert seen[6:] == [
        (S.STAGING, False, True, 1),
        (S.STAGING, False, True, 1),
        (S.APPLYING, False, True, 1),
        (S.SERVING, True, True, 1),
    ]


def test_a_lent_gpu_serves_nobody_and_comes_back_to_what_it_held() -> None:
    sync, _ = walked(E.FOUND, E.SERVED)
    sync.version = 3
    sync.tell(E.LEND)
    assert (sync.state, sync.gate.is_set()) == (S.LENT, False)
    sync.tell(E.RETURNED)
    assert (sync.state, sync.version) == (S.STARTING, 3)


WALKS = {
    S.LOST: (),
    S.STARTING: (E.FOUND,),
    S.SERVING: SERVING,
    S.STAGING: (*SERVING, E.WANTED),
    S.PAUSING: (*SERVING, E.WANTED, E.SHUT),
    S.APPLYING: (*SERVING, E.WANTED, E.STAGED),
    S.VERIFYING: (*SERVING, E.WANTED, E.STAGED, E.UNPROVEN),
    S.LENT: (*SERVING, E.LEND),
}


@pytest.mark.parametrize("state", State)
def test_a_loss_shuts_the_gate_in_every_state(state: State) -> None:
    sync, _ = walked(*WALKS[state])
    assert sync.state is state
    if state is S.APPLYING:
        sync.hold()
    sync.tell(E.LOSE)
    assert sync.state is S.LOST and not sync.gate.is_set()
    assert sync.voids == (state is S.APPLYING), "weights that were half applied"
    assert sync.proven.is_set() == (state is not S.VERIFYING), "the read-back goes on, and says whether they are used"


@pytest.mark.parametrize(("event", "voids"), [(E.PROVEN, 0), (E.DISPROVEN, 1)])
def test_a_read_back_that_ends_after_the_loss_frees_the_results_or_voids_them(event: Event, voids: int) -> None:
    sync, _ = walked(*WALKS[S.VERIFYING], E.LOSE, event)
    assert (sync.state, sync.proven.is_set(), sync.voids) == (S.LOST, True, voids)


def test_what_is_applied_after_a_loss_is_not_held() -> None:
    sync, _ = walked(*WALKS[S.APPLYING], E.LOSE)
    sync.hold()
    assert sync.proven.is_set() and sync.voids == 1


def test_everything_else_is_an_error_that_names_event_and_state_and_changes_nothing() -> None:
    refused = [pair for pair in itertools.product(State, Event) if pair not in TRANSITIONS]
    assert len(refused) + len(TRANSITIONS) == len(State) * len(Event) and (S.LOST, E.SERVED) in refused
    for state, event in refused:
        sync, seen = walked(*WALKS[state])
        with pytest.raises(RuntimeError, match=f"`{event}` cannot happen to an engine that is {state}"):
            sync.tell(event)
        assert sync.state is state and sync.gate.is_set() == (bool(seen) and seen[-1][1])


def test_from_every_state_an_engine_can_serve_again() -> None:
    reached = {S.SERVING}
    while True:
        more = {before for (before, _), step in TRANSITIONS.items() if step.to in reached}
        if more <= reached:
            break
        reached |= more
    assert reached == set(State)
