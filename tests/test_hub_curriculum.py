"""Prompts by solve rate: which one a lease asks, what the choice is made by, and that it is never made twice."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hub_tools import finish_step, group, ids, in_file, open_store

from astracli.config import recipe_io
from astracli.config.recipe_data import CurriculumTable, DataTable
from astracli.data.prompts import PromptSource
from astracli.errors import UserError
from astracli.hub.curriculum import Curriculum, solve_rate, uniform
from astracli.hub.schema import Database
from astracli.hub.store import HubStore

KINDS = ("easy", "fair", "hard", "new")
RATES = {"easy": (1.0, 1.0), "fair": (0.0, 1.0), "hard": (0.0, 0.0)}


def kind(place: int) -> str:
    return KINDS[place % 4]


def open_taught(path: Path, seed: int = 0, **changes: Any) -> HubStore:
    table = CurriculumTable(**({"window": 2} | changes))
    return open_store(
        path, curriculum=Curriculum(table, seed, kind), batch_groups=2, max_staleness=400, steps=1000
    )  # fmt: skip


def teach(store: HubStore, groups: int) -> None:
    """Answer `groups` leases as their kinds are, `new` ones never; then close the batch."""
    for lease in store.lease("teacher", groups).leases:
        name = kind(lease.prompt_index)
        if name != "new":
            store.put(group(lease.lease_id, 0, RATES[name]))


def asked(store: HubStore, groups: int) -> list[int]:
    return [lease.prompt_index for lease in store.lease("w", groups).leases]


def test_the_ends_of_the_band_belong_to_it() -> None:
    chooser = Curriculum(CurriculumTable(low=0.25, high=0.5, outside=0.1), 0, kind)
    weights = [chooser._weight(rate) for rate in (None, 0.2, 0.25, 0.5, 0.6)]
    assert weights == [1.0, 0.1, 1.0, 1.0, 0.1]


def test_another_seed_draws_other_numbers() -> None:
    drawn = {uniform(seed, lease) for seed in range(4) for lease in range(4)}
    assert len(drawn) == 16 and all(0.0 <= number < 1.0 for number in drawn)


def test_without_a_record_every_candidate_is_as_likely(tmp_path: Path) -> None:
    prompts = asked(open_taught(tmp_path), 400)
    assert [p // 4 for p in prompts] == list(range(400))  # one of each lease's own four
    assert all(60 < n < 140 for n in Counter(map(kind, prompts)).values())


def test_the_band_is_preferred(tmp_path: Path) -> None:
    store = open_taught(tmp_path)
    teach(store, 60)
    finish_step(store, 0)
    found = Counter(map(kind, asked(store, 700)))
    # weights easy 0.1, fair 1, hard 0.1, new 1: of 700 draws 32, 318, 32, 318
    assert found["fair"] == pytest.approx(318, abs=50) and found["new"] == pytest.approx(318, abs=50)
    assert found["easy"] == pytest.approx(32, abs=17) and found["hard"] == pytest.approx(32, abs=17)


def test_the_draw_by_hand(tmp_path: Path) -> None:
    """Weights 0.1, 1, 0.1, 1 of lease i: the candidate under whose share of [0, 2.2) the hash falls."""
    store = open_taught(tmp_path, seed=7)
    teach(store, 60)
    finish_step(store, 0)
    first = ids(store.lease("w", 1))[0] + 1
    for lease, prompt in enumerate(asked(store, 30), first):
        at = uniform(7, lease) * 2.2
        expected = 0 if at < 0.1 else 1 if at < 1.1 else 2 if at < 1.2 else 3
        assert prompt == 4 * lease + expected


def test_the_rate_is_that_of_the_latest_groups_before_this_batch(tmp_path: Path) -> None:
    store, record = open_taught(tmp_path), Database(tmp_path / "hub.sqlite")
    rates: list[float | None] = []
    for rewards in ((1.0, 1.0), (0.0, 1.0), (0.0, 0.0)):
        while True:  # until a lease asks an easy one
            lease = store.lease("w", 1).leases[0]
            if kind(lease.prompt_index) == "easy":
                break
        store.put(group(lease.lease_id, 0, rewards))
        rates.append(solve_rate(record, "easy", 2))
        others = ids(store.lease("w", 2))
        for other in others:
            in_file(tmp_path, "UPDATE groups SET kind = 'other' WHERE lease_id = ?", other)
            store.put(group(other, 0))
        finish_step(store, store.state().next_step)
    assert rates == [None, 1.0, 0.75]
    assert solve_rate(record, "easy", 2) == 0.25  # 0.5 and 0; the first is out of the window


def test_a_lease_keeps_its_prompt_and_a_resume_asks_the_same(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    through, killed = open_taught(tmp_path / "a"), open_taught(tmp_path / "b")
    for store in (through, killed):
        teach(store, 60)
        finish_step(store, 0)
        store.give_back(ids(store.lease("w", 5)))
    killed.close()
    again = open_taught(tmp_path / "b")
    again.rewind(1, 1)
    expected = asked(through, 40)
    again.announce(1, 1)
    again.engine_state("engine0", 1, "ready")
    open_again = again.lease("w", 200).leases
    found = {lease.lease_id: lease.prompt_index for lease in open_again}
    assert set(expected) <= set(found.values())
    assert all(prompt // 4 == lease for lease, prompt in found.items())


def test_kinds_of_the_generated_family_and_of_a_data_set(tmp_path: Path) -> None:
    generated = PromptSource(DataTable(source="arithmetic", levels=["add2", "sub3"]), 3)
    assert {generated.kind(i) for i in range(20)} == {"add2", "sub3"}
    assert generated.kind(5) == generated.problem(5).meta["level"]
    path = tmp_path / "data.jsonl"
    path.write_text("".join(f'{{"id": "q{i}", "problem": "{i}?", "answer": "{i}"}}\n' for i in range(5)))
    finite = PromptSource(DataTable(source=str(path)), 3, path)
    assert sorted(finite.kind(i) for i in range(5)) == sorted(finite.kind(i) for i in range(5, 10))
    assert finite.kind(2) == finite.problem(2).id


def test_the_recipe_table(tmp_path: Path) -> None:
    assert recipe_io.load("qwen3.5-tiny-m2po-full").data.curriculum is None
    chosen = recipe_io.load("qwen3.5-tiny-m2po-full", ["data.curriculum.low=0.3"]).data.curriculum
    assert chosen == CurriculumTable(low=0.3)
    with pytest.raises(UserError, match=r"data\.curriculum\.low = 0\.9 is over data\.curriculum\.high = 0\.8"):
        recipe_io.load("qwen3.5-tiny-m2po-full", ["data.curriculum.low=0.9"])
