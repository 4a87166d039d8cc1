"""Ranks that do not reach each other: found within a time limit, started once more without direct links; said so."""

from __future__ import annotations

import json
import time
import weakref
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import warm
from family import log, process, supervisor
from hub_tools import hub_state
from machines import facts
from test_plan import load, planned

from astracli.config import recipe_io
from astracli.errors import RunFailed
from astracli.launch import configs, local, summary
from astracli.launch.inputs import Inputs
from astracli.launch.launcher import Process
from astracli.launch.supervise import Retry
from astracli.process.config import Role
from astracli.process.layout import WITHOUT_PEERS
from astracli.process.ports import free_ports
from astracli.report.summary_table import summary_rows
from astracli.runs.run_dir import RunDir
from astracli.training import collective_check

HUB = "http://127.0.0.1:1"
RANK = """
    import os, sys, time
    import torch.distributed as dist
    from astracli.training import fsdp, collective_check

    collective_check.LIMIT_S = 2.0
    honest = dist.all_reduce

    def broken(tensor, **more):
        if os.environ["RANK"] == "1" and HOW == "hangs":
            time.sleep(3600)
        honest(tensor, **more)
        if HOW == "wrong":
            tensor[5] += 1

    if os.environ.get("NCCL_P2P_DISABLE") != "1":
        dist.all_reduce = broken
    ranks = fsdp.join("cpu")
    print("sum", ranks.sum([1.0]))
    ranks.close()
"""


def rank_env(rank: int, **more: str) -> dict[str, str]:
    (port,) = free_ports(1, "127.0.0.1")
    meet = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    return {"RANK": str(rank), "WORLD_SIZE": "2", **meet, **more}


@pytest.mark.parametrize("how", ["hangs", "wrong"])
def test_ranks_whose_all_reduce_fails_start_again_without_direct_links(logs: Path, how: str) -> None:
    code = f"    HOW = {how!r}\n" + RANK
    env = rank_env(0)
    specs = [
        process(logs, name, code, Role.TRAINER, env={**env, "RANK": str(rank)})
        for rank, name in enumerate(("trainer", "trainer1"))
    ]

    def again() -> list[Process]:
        fresh = rank_env(0, **WITHOUT_PEERS)
        return [replace(s, env={**fresh, "RANK": s.env["RANK"]}) for s in specs]

    retry = Retry(collective_check.BROKEN, frozenset(("trainer", "trainer1")), again, "they run without")
    family = supervisor(specs, retry=retry, forks=warm.WarmForks())
    begun = time.monotonic()
    family.run()
    assert time.monotonic() - begun < 60
    (note,) = family.notes
    # the rank that waits ends by its own time limit, or because the other one came to it first
    reasons = ("has not ended after 2 s", "failed: ") if how == "hangs" else ("of 4096 sums over 2 ranks are wrong",)
    assert note.startswith("they run without (error: the ranks' all-reduce") and any(why in note for why in reasons)
    for rank, name in enumerate(("trainer", "trainer1")):
        assert log(logs, name).read_text().count("sum [2.0]") == 1, rank
        assert family.status[name].state == "done" and family.status[name].restarts == 0


def test_the_check_leaves_no_buffer_in_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    real, made, alive_then = torch.arange, [], []

    def arange(count: int, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
        tensor = real(count, dtype=dtype)
        made.append(weakref.ref(tensor))
        return tensor

    monkeypatch.setitem(collective_check.ELEMENTS, "cuda", 100)
    monkeypatch.setattr(torch, "arange", arange)
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda buffer: buffer)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: alive_then.append([r() is not None for r in made]))
    collective_check.check(0, 1, torch.device("cuda"))
    assert alive_then == [[False]]


def test_a_second_failure_ends_the_run(logs: Path) -> None:
    specs = [process(logs, "trainer", f"import sys; print('error: no sum'); sys.exit({collective_check.BROKEN})")]
    retry = Retry(collective_check.BROKEN, frozenset(["trainer"]), lambda: specs, "once more")
    family = supervisor(specs, retry=retry)
    with pytest.raises(RunFailed, match=f"`trainer` ended with exit code {collective_check.BROKEN}"):
        family.run()
    assert family.notes == ["once more (error: no sum)"]


@pytest.fixture
def held() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


def test_what_a_run_on_two_gpus_starts_again_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, held: ExitStack
) -> None:
    monkeypatch.delenv("NCCL_P2P_DISABLE", raising=False)
    recipe = load("qwen3.5-4b-m2po-delta", "resources.rollout_gpus=1", "resources.train_gpus=2")
    plan = planned(recipe, facts("9.0", 3, memory_gib=141, host_gib=512))
    assert [row for row in plan.placement.reasons if row[0] == "2 ranks"] == [
        (
            "2 ranks",
            "direct links",
            "proved by an all-reduce in 60 s at the start; if not, once more with NCCL_P2P_DISABLE=1",
        )
    ]
    context = configs.RunContext(recipe, plan, RunDir(tmp_path), 1, Inputs(Path("m"), {}, {}))
    processes = configs.build(context, HUB, held)
    retry = configs.retry(context, processes, held)
    assert retry is not None and retry.names == {"trainer", "trainer1"}
    ranks = [local.child_spec(p) for p in processes if p.plan.role is Role.TRAINER]
    # each rank sees its own GPU, and so it is the first one there
    assert [(s.env["CUDA_VISIBLE_DEVICES"], s.env["LOCAL_RANK"], s.env["RANK"]) for s in ranks] == [
        ("1", "0", "0"),
        ("2", "0", "1"),
    ]
    again = [local.child_spec(process) for process in retry.processes()]
    assert [s.env["NCCL_P2P_DISABLE"] for s in again] == ["1", "1"]
    assert len({s.env["MASTER_PORT"] for s in again}) == 1 and again[0].argv == ranks[0].argv
    monkeypatch.setenv("NCCL_P2P_DISABLE", "1")
    assert configs.retry(context, processes, held) is None, "nothing else is left to try"
    alone = load("qwen3.5-4b-m2po-delta", "resources.rollout_gpus=1", "resources.train_gpus=1")
    context = replace(context, recipe=alone, plan=planned(alone, facts("9.0", 2, memory_gib=141, host_gib=512)))
    monkeypatch.delenv("NCCL_P2P_DISABLE")
    assert configs.retry(context, configs.build(context, HUB, held), held) is None


def test_the_summary_table_says_so(tmp_path: Path) -> None:
    document = summary.build(
        recipe_io.load("qwen3.5-tiny-m2po-delta"), run_dir=tmp_path, state="done", attempt=1, first_step=0,
        phases={"running": 1.0}, evaluations_s={}, records=[], hub=hub_state(), memory={}, restarts={},
        notes=["the 2 training GPUs do not reach each other directly"],
    )  # fmt: skip
    assert ("note", "the 2 training GPUs do not reach each other directly") in summary_rows(document)
    json.dumps(document)
