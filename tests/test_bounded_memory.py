"""What would grow with every step of a long run and must not: compiled products, freed heap, an evaluation's samples,
rows and pages of the hub's file. Counted in bytes, objects and rows."""

from __future__ import annotations

import ctypes
import gc
import json
import sys
import weakref
from pathlib import Path
from typing import Any

import pytest
import warm
from engine_server import engine_of, long_requests, save, with_client
from eval_cases import FakeEngine, InstantGrader, run_benchmarks, small
from hub_tools import fill, group, ids, in_file, open_store
from test_eval_spread import Hub
from trainer_job import STEPS, Job, job, model_dir
from training_tools import recipe

from astracli.engines.client import EngineClient
from astracli.engines.embedded import engine as embedded
from astracli.evaluation import benchmark
from astracli.hub.types import CURRICULUM_HISTORY, HISTORY
from astracli.kernels.cpu import linear, memory
from astracli.launch.hub import history_steps
from astracli.training import loop as training

__all__ = ["job", "model_dir"]

linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's heap")

PRODUCTS = """
import ctypes, json, torch
from astracli.kernels.cpu import linear, memory
class Heap(ctypes.Structure):
    _fields_ = [(name, ctypes.c_size_t) for name in "arena a b c mapped d e used free f".split()]
heap = ctypes.CDLL(None).mallinfo2
heap.restype = Heap
memory.bound_memory()
torch.set_num_threads(1)
weight, x, used = torch.randn(384, 128), torch.randn(700, 128), []
for rows in range(16, 700):
    linear.product(x[:rows], weight)
    used.append(heap().used)
print(json.dumps([used[150], used[-1]]))
"""


@linux
@pytest.mark.skipif(not linear.available(), reason="this torch has no oneDNN products")
def test_products_of_ever_new_shapes_take_no_more_memory() -> None:
    if getattr(ctypes.CDLL(None), "mallinfo2", None) is None:
        pytest.skip("a glibc without mallinfo2")
    done = warm.run(["-c", PRODUCTS])
    assert done.returncode == 0, done.stderr
    before, after = json.loads(done.stdout)
    # each of the 533 shapes between the two takes 0.1 MB or more while it is kept
    assert after - before < 10e6, f"{before / 1e6:.0f} MB grew to {after / 1e6:.0f} MB"


def test_a_capacity_of_the_users_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = memory.CAPACITIES
    monkeypatch.setenv(first, "7")
    monkeypatch.setenv(second, "")  # so that it is put back as it was
    monkeypatch.delenv(second)
    memory.bound_memory()
    assert [memory.os.environ[name] for name in memory.CAPACITIES] == ["7", str(memory.PRODUCTS)]


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


@linux
def test_freed_heap_goes_back_to_the_system_once_in_so_many_passes() -> None:
    libc: Any = ctypes.CDLL(None)
    if not hasattr(libc, "malloc_trim"):
        pytest.skip("no glibc")
    libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
    libc.free.argtypes = [ctypes.c_void_p]
    memory.keep_freed_memory()
    blocks = [libc.malloc(1 << 20) for _ in range(96)]
    for block in blocks:
        ctypes.memset(block, 1, 1 << 20)
    for block in blocks[:-1]:  # the last one keeps the top of the heap where it is
        libc.free(block)
    freed, full = memory.GiveBack(3), resident()
    freed.passed()
    freed.passed()
    assert freed.times == 0 and full - resident() < 32 << 20
    freed.passed()
    assert freed.times == 1 and full - resident() > 64 << 20
    libc.free(blocks[-1])
    freed.passed(7)
    assert freed.times == 2, "once, however many passes at one go"


def test_the_trainer_gives_freed_memory_back(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "GIVE_BACK_EVERY", 2)
    loop = job.loop()
    loop.start()
    job.train(loop)
    assert loop.freed_memory is not None and loop.freed_memory.times == STEPS // 2


def test_the_engine_gives_freed_memory_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embedded, "GIVE_BACK_EVERY", 3)
    engine = engine_of(save(tmp_path))

    async def scenario(client: EngineClient) -> None:
        await client.generate(long_requests(2, max_new_tokens=50))

    with_client(engine, scenario)
    assert engine.freed_memory is not None and engine.freed_memory.times == engine.scheduler.steps // 3 >= 1


def test_samples_of_an_evaluation_go_without_a_collection(monkeypatch: pytest.MonkeyPatch) -> None:
    alive: weakref.WeakSet[Any] = weakref.WeakSet()

    class Sample(benchmark.EvalSample):
        def __init__(self, *values: Any):
            super().__init__(*values)
            alive.add(self)

        __hash__ = object.__hash__
        __eq__ = object.__eq__

    monkeypatch.setattr(benchmark, "EvalSample", Sample)
    gc.collect()
    gc.disable()
    try:
        for _ in range(2):
            results = run_benchmarks(
                {"engine0": FakeEngine()}, [small(4)], grader=InstantGrader(), members=Hub("engine0")
            )
            assert len(alive) == len(results[0].samples) == 32, "those of this evaluation alone"
            del results
        assert len(alive) == 0
    finally:
        gc.enable()


def test_the_hubs_file_stops_growing(tmp_path: Path) -> None:
    """Steps with groups that are kept, dropped and skipped, evaluations and checkpoints; space is used again."""
    store = open_store(tmp_path, steps=400, max_staleness=0, history_steps=20)
    sizes = {}
    for step in range(160):
        dropped, skipped = ids(store.lease("w", 2))
        store.put(group(dropped, step, rewards=(1.0, 1.0)))
        store.skip(skipped, "prompt of 3000 tokens")
        fill(store, step)
        store.batch(step)
        store.announce(step + 1, step + 1)
        store.engine_state("engine0", step + 1, "ready")
        store.ack(step, step + 1, step + 1 if step % 5 == 4 else None)
        if step in (59, 159):
            tables = ("groups", "blobs", "batches", "versions", "evals", "meta")
            rows = {name: in_file(tmp_path, f"SELECT COUNT(*) FROM {name}")[0][0] for name in tables}
            sizes[step] = (rows, in_file(tmp_path, "PRAGMA page_count"))
    rows, _ = sizes[159]
    assert sizes[59] == sizes[159]
    assert rows["versions"] == 1 and rows["batches"] <= 20 + 10 and rows["groups"] <= 6 * 30 and rows["blobs"] <= 4 * 10
    assert store.counts().consumed_steps == 160 and store.counts().dropped == store.counts().skipped == 160


def test_a_curriculum_keeps_the_rows_that_it_reads_longer() -> None:
    data = {"source": "arithmetic", "curriculum": {}}
    assert history_steps(recipe()) == HISTORY == 100
    assert history_steps(recipe(data=data)) == CURRICULUM_HISTORY == 1000
    assert history_steps(recipe(data=data, launch={"hub_history_steps": 7})) == 7
