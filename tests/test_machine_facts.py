"""Plans and judgements for other machines: documents by name or file, and what each GPU of theirs would hold."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import Ran
from machines import GIB, facts

from astracli.adapters import qwen3_5
from astracli.backends import choice as backends
from astracli.config import recipe_io
from astracli.errors import UserError
from astracli.launch import run as launch
from astracli.machine import documents as machine_facts
from astracli.machine import facts as machine
from astracli.machine import read
from astracli.models import registry
from astracli.plan import build as plan
from astracli.plan import gpus as plan_gpus
from astracli.plan.types import LaunchPlan
from astracli.plan.view import render

Astra = Callable[..., Ran]
BIG, SHARED, TINY = "qwen3.5-4b-m2po-delta", "qwen3.5-0.8b-m2po-delta", "qwen3.5-tiny-m2po-delta"


# -- documents ---------------------------------------------------------------------------------------------------------


def test_an_unknown_name_lists_those_that_ship_and_the_nearest() -> None:
    with pytest.raises(UserError, match="no machine `8xl4` ships with astra, and there is no such file") as error:
        machine_facts.load("8xl4")
    assert error.value.exit_code == 2 and error.value.hint is not None
    assert error.value.hint.startswith(
        "did you mean `8xl40`? they are container, laptop, rtx5090, 1x4090, 1xa100-80g, "
    )
    assert all(name in error.value.hint for name in machine_facts.names())
    with pytest.raises(UserError) as error:
        machine_facts.load("mainframe")
    assert "did you mean" not in str(error.value.hint)


def test_a_file_is_named_by_its_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    mine = facts("9.0", 3) | {"source": "mine"}
    for name in ("8xl40", "mine", "m.json"):
        Path(name).write_text(json.dumps(mine))
    assert machine_facts.load("mine") == machine_facts.load("m.json") == machine.validate(mine)
    assert machine_facts.load("./8xl40").source == "mine"
    assert len(machine_facts.load("8xl40").gpus) == 8, "the shipped one"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("{", "is not JSON"),
        ("[]", "holds no JSON object"),
        ('{"schema_version": 1}', "not a machine description: `system`"),
    ],
)
def test_a_file_that_is_no_document_is_refused(tmp_path: Path, text: str, says: str) -> None:
    (tmp_path / "m.json").write_text(text)
    with pytest.raises(UserError, match=says) as error:
        machine_facts.load(str(tmp_path / "m.json"))
    assert "--facts-out FILE" in str(error.value.hint) and "8xl40" in str(error.value.hint)
    with pytest.raises(UserError, match=r"cannot read facts file `none.json`: no such file"):
        machine_facts.load("none.json")


# -- what each GPU holds -----------------------------------------------------------------------------------------------


def planned(name: str, document: dict[str, object], *sets: str) -> LaunchPlan:
    recipe = recipe_io.load(name, list(sets))
    adapter = registry.resolve(recipe, None)
    there = machine.validate(document)
    return plan.build(recipe, adapter, backends.choose(adapter, there, recipe), there)


def test_every_gpu_and_the_host_by_hand() -> None:
    """Eight GPUs, four of them with an engine: sums of the plan's own rows, a process at a time."""
    result = planned(BIG, facts("8.9", 8, memory_gib=44, host_gib=512))
    found = plan_gpus.uses(result)
    assert [use.place for use in found] == [*"01234567", "host"]
    assert [use.processes for use in found[:8:4]] == [["engine0"], ["trainer"]]
    for use in found[:8]:
        (name,) = use.processes
        own = [row for row in result.memory if row.process == name and row.where == "gpu"]
        assert use.at_least == sum(row.bytes for row in own if row.fixed) > 0
        assert use.under_load == sum(row.bytes for row in own)
        assert use.has == 44 * GIB
    assert found[0].under_load > found[0].at_least, "a KV cache grows with load"
    assert found[8].under_load == sum(row.bytes for row in result.memory if row.where == "host")
    assert (found[8].has, len(found[8].processes)) == (512 * GIB, 11)
    rows = plan_gpus.rows(found)
    assert [(row[0], row[3], row[4]) for row in rows] == [
        ("0-3", "44.00 GiB", "engine0 to engine3"),
        ("4-7", "44.00 GiB", "trainer to trainer3"),
        ("host", "512.00 GiB", "all"),
    ]


def test_a_shared_gpu_holds_both_and_one_that_is_not_there_has_none() -> None:
    shared = plan_gpus.uses(planned(SHARED, facts("9.0", 1, memory_gib=80, host_gib=512)))
    assert (shared[0].place, shared[0].processes) == ("0", ["engine0", "trainer"])
    absent = plan_gpus.rows(plan_gpus.uses(planned(BIG, facts())))
    assert [row[3] for row in absent] == ["none", "none", "24.00 GiB"]
    unequal = facts("9.0", 2, memory_gib=80, host_gib=512)
    unequal["gpus"][1]["memory_total"] = 40 * GIB
    sets = ("resources.rollout_gpus=2", "resources.share_gpus=true")
    assert [row[0] for row in plan_gpus.rows(plan_gpus.uses(planned(SHARED, unequal, *sets)))] == ["0", "1", "host"]


def test_a_run_on_a_cpu_has_no_such_table() -> None:
    result = launch.planned(recipe_io.load(TINY), "train", machine.validate(facts()))
    assert plan_gpus.uses(result) == [] and "memory a GPU" not in [table.title for table in render(result)]


# -- the commands ------------------------------------------------------------------------------------------------------


def test_a_dry_run_and_the_doctor_plan_the_same_for_a_shipped_machine(astra: Astra, runs: Path) -> None:
    dry = json.loads(astra("train", BIG, "--dry-run", "--facts", "8xl40", "--json").out)
    judged = astra("doctor", BIG, "--facts", "8xl40", "--json")
    report = json.loads(judged.out)
    assert judged.code == 0 and report["ok"] is True
    assert report["memory_by_place"] == dry["memory_by_place"]
    assert [list(row.values()) for row in report["placement"]] == dry["placement"]["reasons"]
    assert [use["place"] for use in dry["memory_by_place"]] == [*"01234567", "host"]
    assert {use["has"] for use in dry["memory_by_place"][:8]} == {44 * GIB}
    assert (dry["machine"], dry["missing"]) == ("8xl40", ["checkpoint Qwen/Qwen3.5-4B not on this machine"])
    assert dry["source"] == report["facts"]["source"]
    assert not runs.exists()


@pytest.mark.parametrize("command", ["train", "rollout", "eval"])
def test_a_plan_for_another_machine_says_so_in_its_first_line(astra: Astra, runs: Path, command: str) -> None:
    told = astra(command, BIG, "--dry-run", "--facts", "8xh100")
    lines = told.out.splitlines()
    assert told.code == 0 and told.err == ""
    assert lines[0].startswith(
        "for the machine `8xh100`, not this one: typical, not measured: a server, 8 x NVIDIA H100"
    )
    assert "memory a GPU" in lines and max(map(len, lines)) <= 100
    assert lines[-1] == "nothing was started"
    small = astra(command, BIG, "--dry-run", "--facts", "1xl40").out
    assert "8 GPUs (this machine has 1)" in small if command == "train" else "4 GPUs (this machine has 1)" in small
    assert small.splitlines()[-1] == "nothing was started; that machine cannot run it: see above"


def test_the_doctor_shows_placement_and_memory(astra: Astra) -> None:
    lines = astra("doctor", SHARED, "--facts", "1xh200").out.splitlines()
    heads = [line.split()[0] for line in lines if re.match(r"backend |placement |gpu +at least", line)]
    assert heads == ["backend", "placement", "gpu"]
    (gpu,) = [line for line in lines if line.startswith("0 ")]
    assert gpu.endswith("140.40 GiB  engine0, trainer")
    assert max(map(len, lines)) <= 100
    assert any(line.startswith("judged from a document: typical, not measured") for line in lines)


def test_a_machine_without_gpus_is_told_of_documents(
    astra: Astra, runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("astracli.machine.read.gpus", lambda: ([], None))
    dry = astra("train", BIG, "--dry-run")
    assert dry.err.startswith("hint: `--facts NAME` plans for another machine: ") and "8xl40" in dry.err
    refused = astra("train", BIG)
    assert refused.code == 2 and f"`astra train --recipe {BIG} --dry-run --facts 8xl40` plans" in refused.err
    assert astra("train", BIG, "--dry-run", "--facts", "8xl40").code == 0, "what the hint says"
    assert astra("train", TINY, "--dry-run").err == "", "it needs no GPU"
    assert not runs.exists()


@pytest.mark.parametrize("command", ["train", "rollout", "eval"])
def test_a_document_starts_nothing(astra: Astra, runs: Path, command: str) -> None:
    refused = astra(command, TINY, "--facts", "8xl40")
    assert refused.code == 2 and refused.out == ""
    assert refused.err.startswith("error: --facts 8xl40 describes another machine: it goes with --dry-run")
    assert f"`astra {command} RECIPE --dry-run --facts 8xl40`" in refused.err and not runs.exists()
    assert astra(command, TINY, "--dry-run", "--facts", "8xl4").code == 2


def test_a_model_that_was_recorded_there_is_planned_from_its_record(astra: Astra, runs: Path) -> None:
    """Its directory is not on this machine: the recorded config.json is enough."""
    away = "model.path=./somewhere/model"
    assert "nothing at that path" in astra("train", SHARED, "--dry-run", "--facts", "1xh200", "--set", away).err
    config = dict(qwen3_5.ADAPTER.known_configs["Qwen/Qwen3.5-0.8B"])
    recorded = {"path": "./somewhere/model", "place": "/data/somewhere/model", "config": config}
    Path("there.json").write_text(json.dumps(machine_facts.load("1xh200").document() | {"checkpoint": recorded}))
    told = astra("train", SHARED, "--dry-run", "--facts", "there.json", "--set", away, "--json")
    named = astra("train", SHARED, "--dry-run", "--facts", "1xh200", "--json")
    plans = [json.loads(said.out) for said in (told, named)]
    assert plans[0]["memory"] == plans[1]["memory"] != [] and plans[0]["missing"] == []


def test_completion_offers_shipped_machines() -> None:
    from astracli.cli.options import complete_facts

    assert list(complete_facts("8x")) == ["8xa100-80g", "8xb200", "8xh100", "8xh200", "8xl40"]


TOPOLOGY = """\t\x1b[4mGPU0\tGPU1\tNIC0\tCPU Affinity\x1b[0m
GPU0\t X \t{0}\tSYS\t0-47
GPU1\t{0}\t X \tPIX\t48-95
NIC0\tSYS\tPIX\t X

Legend:
  X    = Self
"""


@pytest.mark.parametrize(("way", "link"), [("NV18", "NVLink"), ("NV4", "NVLink"), ("SYS", "PCIe"), ("PIX", "PCIe")])
def test_how_gpus_reach_each_other_is_read_from_the_topology(way: str, link: str) -> None:
    assert read.parse_peers(TOPOLOGY.format(way)) == link


def test_no_topology_says_nothing() -> None:
    assert read.parse_peers("") is None
    assert read.parse_peers("GPU0\t X \t0-47\n") is None
