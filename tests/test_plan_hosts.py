"""Plans over several hosts: who gets which GPU, memory by (host, GPU), links, hosts that lack something."""

from __future__ import annotations

import re
from typing import Any

import pytest
from test_plan import load
from test_plan_speed import SHAPE

from astracli.backends import choice as backend
from astracli.config import recipe_io
from astracli.config.recipe_run import ResourcesTable
from astracli.doctor import checks
from astracli.errors import UserError
from astracli.machine import documents
from astracli.machine.facts import Machine
from astracli.machine.memory import Component
from astracli.models import registry
from astracli.plan import build as plan
from astracli.plan import hosts
from astracli.plan.communication import Peers, over_network
from astracli.plan.cost import Pace, TrainerLoad
from astracli.plan.memory import DELTA_SHARE, on_gpu, total
from astracli.plan.seats import GpuId, cpu_hosts, seat
from astracli.plan.trainer import trainer_rows
from astracli.plan.types import LaunchPlan
from astracli.plan.view import to_json
from astracli.process.config import Role
from astracli.process.layout import Split

NAME = "qwen3.5-4b-m2po-delta"
L40, ONE, H100 = documents.load("8xl40"), documents.load("1xl40"), documents.load("8xh100")


def cluster(machines: dict[str, Machine | None], *sets: str, first: Machine = L40) -> LaunchPlan:
    """The 4B recipe on `first` and these hosts; None: not known."""
    named = ", ".join(f'"{name}"' for name in ("a", *machines))
    recipe = load(NAME, f"launch.hosts=[{named}]", *sets)
    adapter = registry.resolve(recipe, None)
    known = {host: machine for host, machine in machines.items() if machine is not None}
    return plan.build(recipe, adapter, backend.choose(adapter, first, recipe), first, fleet=known)


def gpus(result: LaunchPlan, role: Role) -> dict[str | None, list[int]]:
    found: dict[str | None, list[int]] = {}
    for process in result.processes:
        if process.role is role:
            found.setdefault(process.host, []).extend(process.gpus)
    return found


def linked(machine: Machine, rate: float) -> Machine:
    return machine.model_copy(update={"link": rate})


@pytest.mark.parametrize(
    ("engines", "ranks", "more", "machines", "seats"),
    [
        (3, 2, {}, {None: L40}, ({None: [0, 1, 2]}, {None: [3, 4]})),
        (2, 2, {"share_gpus": True}, {None: L40}, ({None: [0, 1]}, {None: [0, 1]})),
        (5, 4, {}, {None: L40, "b": L40, "c": L40}, ({"b": [0, 1, 2], "c": [0, 1]}, {None: [0, 1, 2, 3]})),
        (5, 4, {}, {None: L40, "b": ONE, "c": L40}, ({"b": [0], "c": [0, 1, 2, 3]}, {None: [0, 1, 2, 3]})),
        (11, 4, {}, {None: L40, "b": L40}, ({None: [4, 5, 6], "b": [*range(8)]}, {None: [0, 1, 2, 3]})),
        (14, 4, {}, {None: L40, "b": L40}, ({None: [4, 5, 6, 7], "b": [*range(10)]}, {None: [0, 1, 2, 3]})),
        (12, 2, {}, {None: ONE, "b": None}, ({"b": [*range(12)]}, {None: [0, 1]})),
        (4, 4, {"train_hosts": 2}, {None: L40, "b": L40, "c": L40}, ({"c": [0, 1, 2, 3]}, {None: [0, 1], "b": [0, 1]})),
        (3, 4, {"train_hosts": 2}, {None: L40, "b": L40}, ({None: [2, 3], "b": [2]}, {None: [0, 1], "b": [0, 1]})),
        (6, 4, {"train_hosts": 2, "share_gpus": True}, {None: L40, "b": L40, "c": L40},
         ({None: [0, 1], "b": [0, 1], "c": [0, 1]}, {None: [0, 1], "b": [0, 1]})),
    ],
)  # fmt: skip
def test_who_gets_which_gpu(engines: int, ranks: int, more: Any, machines: Any, seats: Any) -> None:
    found = seat(ResourcesTable(**more), machines, engines, ranks)

    def by_host(places: Any) -> dict[Any, list[int]]:
        result: dict[Any, list[int]] = {}
        for place in places:
            result.setdefault(place.host, []).append(place.index)
        return result

    assert (by_host(found.engines), by_host(found.trainer)) == seats


def test_on_cpus_engines_are_beside_the_trainer_s_hosts() -> None:
    def where(train_hosts: int, ranks: int, *names: str) -> Any:
        return cpu_hosts(ResourcesTable(train_hosts=train_hosts, train_ranks=ranks), [None, *names], 3)

    assert where(1, 2) == ([None] * 3, [None, None])
    assert where(1, 2, "b", "c") == (["b", "b", "c"], [None, None])
    assert where(2, 2, "b", "c") == (["c"] * 3, [None, "b"])
    assert where(2, 4, "b") == (["b"] * 3, [None, None, "b", "b"])


def test_memory_is_counted_by_host_and_gpu() -> None:
    result = cluster({"b": L40, "c": L40}, "resources.rollout_gpus=12", "resources.train_gpus=4")
    plan.refuse(result)
    assert gpus(result, Role.ENGINE) == {"b": [0, 1, 2, 3, 4, 5], "c": [0, 1, 2, 3, 4, 5]}
    workers = [(p.name, p.host) for p in result.processes if p.role is Role.ROLLOUT]
    assert workers == [("rollout", "b"), ("rollout1", "c")], "one beside the engines of its host"
    assert result.gpu_map[GpuId(0, "b")] == ["engine0"] and result.gpu_map[GpuId(0)] == ["trainer"]
    alone = cluster({}, "resources.rollout_gpus=4", "resources.train_gpus=4")
    each = on_gpu(alone.memory, ["engine0"])
    document = {use["place"]: use for use in to_json(result)["memory_by_place"]}
    assert list(document) == [
        "0",
        "1",
        "2",
        "3",
        *(f"{h}:{i}" for h in "bc" for i in range(6)),
        "host",
        "host b",
        "host c",
    ]
    assert document["b:3"]["under_load"] == document["c:0"]["under_load"] == each
    assert document["b:3"]["has"] == L40.gpu_sizes[3] and document["host c"]["has"] == L40.system.memory_total
    for host in (None, "b", "c"):
        names = {p.name for p in result.processes if p.host == host} | ({"supervisor"} if host is None else set())
        by_hand = sum(row.bytes for row in result.memory if row.where == "host" and row.process in names)
        assert total(result.memory, where="host", host=host) == by_hand > 0
    assert len(result.margins) == 16 and {each.gpu.host for each in result.margins} == {None, "b", "c"}


def test_engines_are_sized_by_the_smallest_gpu_of_all_hosts() -> None:
    small = documents.load("4xa10g")
    result = cluster({"b": small}, "resources.rollout_gpus=4", "resources.train_gpus=4")
    large = cluster({"b": L40}, "resources.rollout_gpus=4", "resources.train_gpus=4")
    assert result.running_requests < large.running_requests
    words = next(r.why for r in result.placement.reasons if r.what == "requests")
    assert "of 22.49 GiB" in words or "of 24.00 GiB" in words or "of 22" in words


def test_the_rule_is_said() -> None:
    result = cluster({"b": L40}, "resources.rollout_gpus=10", "resources.train_gpus=4")
    reasons = {reason.what: reason for reason in result.placement.reasons}
    assert reasons["the first host"].where == "engine0, engine1"
    assert reasons["the first host"].why == "the other hosts have no GPU for these engines"
    assert reasons["host b"].where.endswith("rollout1, on 8 GPUs")
    assert reasons["host b"].why.startswith("engines in equal blocks over the hosts beside the trainer's")


@pytest.mark.parametrize(
    ("machines", "sets", "message", "hint"),
    [
        ({"b": ONE}, ("rollout_gpus=14",), "(rollout 14, train 4): host `b` would need 10, it has 1",
         f"run `astra train --recipe {NAME} --set resources.rollout_gpus=5`"),
        ({"b": documents.load("laptop")}, ("rollout_gpus=4",), "a CUDA build of torch", None),
        ({"b": documents.load("8xb200")}, ("rollout_gpus=8",),
         "host `b` would run with serving_attention trtllm_mha, not flashinfer", None),
        ({"b": L40, "c": L40}, ("rollout_gpus=1",), "leaves 1 of them without an engine",
         "`--set resources.rollout_gpus=2`"),
    ],
)  # fmt: skip
def test_what_a_host_lacks_is_said_with_a_way_out(machines: Any, sets: Any, message: str, hint: str | None) -> None:
    result = cluster(machines, *(f"resources.{one}" for one in sets))
    said = [problem for problem in result.problems if message in problem.message or message in problem.what]
    assert said and said[0].blocking and (hint is None or hint in (said[0].hint or ""))
    with pytest.raises(UserError):
        plan.refuse(result)
    if hint is not None and (found := re.search(r"--set resources.rollout_gpus=(\d+)", hint)):
        plan.refuse(cluster(machines, f"resources.rollout_gpus={found[1]}"))  # what a hint says is not refused


def test_hosts_that_are_not_known_yet_refuse_nothing() -> None:
    result = cluster({"b": None}, "resources.rollout_gpus=8")
    assert gpus(result, Role.ENGINE) == {"b": list(range(8))}
    plan.refuse(result)


def test_ranks_over_hosts_are_as_quick_as_the_network() -> None:
    sets = ("resources.rollout_gpus=4", "resources.train_gpus=8", "resources.train_hosts=2", 'launch.network="private"')
    slow = cluster({"b": L40}, *sets)
    assert gpus(slow, Role.TRAINER) == {None: [0, 1, 2, 3], "b": [0, 1, 2, 3]}
    assert [p.rank for p in slow.processes if p.role is Role.TRAINER] == list(range(8))
    assert any("of a step on the network, 1.2 GB/s assumed" in warning for warning in slow.warnings)
    quick = cluster({"b": linked(L40, 50e9)}, *sets)
    assert not any("on the network" in warning for warning in quick.warnings)
    why = next(r.why for r in quick.placement.reasons if r.what == "8 ranks divide")
    assert "over PCIe, 12 GB/s" in why, "the slower of both"
    assert over_network([None, 3e9, 2e9]) == Peers("network", 2e9) and not over_network([None]).known
    parts = total(slow.memory, where="host", fixed=True, host="b", processes=["trainer4"])
    assert parts == total(slow.memory, where="host", fixed=True, processes=["trainer"]) > 0


def test_versions_to_hosts_by_hand() -> None:
    result = cluster({"b": linked(L40, 1e9), "c": linked(L40, 2e9)}, "resources.rollout_gpus=12")
    reason = next(r for r in result.placement.reasons if r.what == "versions")
    full = 2 * result.model["parameters"]
    seconds = 2 * DELTA_SHARE * full / 2e9  # through the first host's link, which is as quick as the quickest
    assert reason.where == "to 2 hosts" and f"in {seconds:.2g} s over 2 GB/s measured" in reason.why
    assert f"({full / 2**30:.2f} GiB) in {2 * full / 2e9:.2g} s" in reason.why


def test_more_hosts_than_the_link_serves_get_a_hint_with_the_figure() -> None:
    many = {f"h{n}": linked(L40, 1e8) for n in range(12)}
    sets = ("resources.rollout_gpus=96", "weights.transfer=full", "train.max_staleness=4")
    result = cluster(many, *sets)
    (found,) = [warning for warning in result.warnings if warning.startswith("the first host's link")]
    match = re.search(r"to (\d+) hosts in a step of (\S+) s, and this run has 12", found)
    assert match is not None
    served, step_s = int(match[1]), float(match[2])
    assert served == int(step_s * 1e8 / (2 * result.model["parameters"])) or served == 0
    slow = cluster({"b": linked(L40, 1e9), "c": linked(L40, 1.25e6)}, "resources.rollout_gpus=12")
    (late,) = [warning for warning in slow.warnings if warning.startswith("host `c` gets 1.25 MB/s")]
    assert "its engines will often be refused leases" in late


def test_a_host_that_joins_brings_an_engine_for_each_gpu() -> None:
    result = cluster({"b": L40}, "resources.rollout_gpus=8")
    made = hosts.joining(result, "x", documents.load("2xh200"), engines=8, workers=2)
    assert [(p.name, p.host, p.gpus, p.env["CUDA_VISIBLE_DEVICES"]) for p in made] == [
        ("engine8", "x", (0,), "0"), ("engine9", "x", (1,), "1"), ("rollout2", "x", (), ""),
    ]  # fmt: skip
    assert hosts.refusal_of_newcomer(result, H100) is None
    assert hosts.refusal_of_newcomer(result, documents.load("laptop")) == (
        "it has no GPU, and the engines of this run need one"
    )
    assert "the engines of this run have 44.00 GiB or more" in (
        hosts.refusal_of_newcomer(result, documents.load("4xa10g")) or ""
    )


def test_doctor_judges_each_host_and_its_link() -> None:
    recipe = load(NAME, 'launch.hosts=["a", "b", "c", "d"]', "resources.rollout_gpus=12")
    bad = documents.load("laptop")
    report = checks.run(recipe, L40, fleet={"b": linked(L40, 1.25e9), "c": bad})
    found = {(check["group"], check["name"]): check for check in report["checks"]}
    assert found["b: gpu", "gpus"]["value"] == "8 x NVIDIA L40 (8.9, 44.00 GiB)"
    assert found["c: gpu", "gpus"]["value"] == "none" and not report["ok"]
    assert found["hosts", "link to b"]["value"] == "1.25 GB/s from the first host: a full version in 6.7 s"
    assert found["hosts", "link to c"]["status"] == "skip" and found["hosts", "not judged"]["value"].startswith("d: ")


@pytest.mark.parametrize(
    ("sets", "said"),
    [
        (("resources.train_hosts=2",), "asks for more hosts than launch.hosts names (1)"),
        (('launch.hosts=["a", "b"]', "resources.train_hosts=2", "resources.train_ranks=3"), "in equal parts"),
        (('launch.hosts=["a", "b"]', "resources.train_hosts=2", "resources.train_ranks=2"),
         'launch.network = "private"'),
    ],
)  # fmt: skip
def test_ranks_over_hosts_that_are_refused(sets: tuple[str, ...], said: str) -> None:
    with pytest.raises(UserError, match=re.escape(said)):
        recipe_io.load("qwen3.5-tiny-m2po-delta", sets)


def test_hosts_that_hold_the_same_exchange_gradients_once_an_update() -> None:
    """Two hosts of 8 GPUs, four updates: what FSDP moves within a host, and 4 bytes a gradient between hosts, there and
    back, of which each host sends half."""
    recipe = load(NAME, "train.batch_groups=16", "rollout.max_running_requests=32")
    pace = Pace(peers=Peers("network", 1e9), inside=Peers("NVLink", 100e9))
    two = TrainerLoad(recipe, SHAPE, 16, pace, hosts=2)
    split = Split(sharding="parameters", replicas=2)
    split_of_8 = Split(sharding="parameters")
    inside = TrainerLoad(recipe, SHAPE, 8, Pace(peers=Peers("NVLink", 100e9))).communication_seconds(split_of_8)
    between = 4 * 4 * SHAPE.parameters / 1e9  # both have the fewest micro-batches, one an update
    assert two.communication_seconds(split) == pytest.approx(inside + between)
    flat = two.communication_seconds(split_of_8)
    assert two.communication_seconds(split) < flat / 2
    held = {r.component: r.bytes for r in trainer_rows("t", two, "cuda", split)}
    alone = {r.component: r.bytes for r in trainer_rows("t", TrainerLoad(recipe, SHAPE, 8), "cuda", split_of_8)}
    assert held[Component.MASTERS] == alone[Component.MASTERS] == 4 * -(-SHAPE.parameters // 8)


def test_ranks_of_hosts_divide_among_those_of_a_host_where_the_network_is_slow() -> None:
    sets = (
        "resources.rollout_gpus=8",
        "resources.train_gpus=16",
        "resources.train_hosts=2",
        'launch.network="private"',
    )
    result = cluster({"b": H100, "c": H100}, *sets, first=H100)
    assert result.placement.split.replicas == 2 and result.placement.split.sharding != "optimizer"
    (reason,) = [r for r in result.placement.reasons if r.what == "16 ranks divide"]
    assert reason.where.endswith(", among those of a host; 2 hosts hold the same")
    exact = cluster({"b": H100, "c": H100}, *sets, "launch.deterministic=true", "train.max_staleness=0", first=H100)
    assert exact.placement.split.replicas == 1, "the sums of one host"
