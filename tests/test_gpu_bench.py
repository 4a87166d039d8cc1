"""The GPU benches on a CPU: their rows and figures come out, and what cannot run is said in its row."""

from __future__ import annotations

import importlib
import json
import os
import sys
import time
from pathlib import Path
from types import ModuleType

import pytest
import warm

BENCH = Path(__file__).parent.parent / "bench"


@pytest.fixture(scope="module")
def bench() -> ModuleType:
    if str(BENCH) not in sys.path:
        sys.path.append(str(BENCH))
    return importlib.import_module("trainer.speed")


def test_every_variant_gets_a_row(
    bench: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real = bench.Case.trainer

    def trainer(case, variant):  # type: ignore[no-untyped-def]
        if variant.packing == "padded":
            raise MemoryError("no room")
        return real(case, variant)

    monkeypatch.setattr(bench.Case, "trainer", trainer)
    names = ["packed-none", "padded-selective", "leaking"]
    options = ["--shape", "tiny", "--tokens", "64", "--longest", "40", "--micro-batches", "1", "--steps", "1", "--json"]
    monkeypatch.setattr(sys, "argv", ["speed.py", *options, "--variants", *names])
    bench.main()
    said = capsys.readouterr()
    document = json.loads(said.out)
    assert document["environment"]["torch"] and document["environment"]["date"]
    rows = {row["variant"]: row for row in document["rows"]}
    assert [json.loads(line)["variant"] for line in said.err.splitlines() if line.startswith("{")] == names
    assert list(rows) == names
    assert rows["packed-none"]["tokens_per_s"] > 0 and rows["packed-none"]["gradient_error"] < 1e-4
    assert rows["padded-selective"]["raised"] == "MemoryError: no room"
    assert rows["leaking"]["gradient_error"] > 0.01  # measured, and let pass: the recipe asks for the leak


def test_leaking_rows_differ_in_every_shape_and_order(
    bench: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """`bench/trainer/rows.py`: a packed row equals itself, and nothing else where state leaks."""
    from trainer import rows  # type: ignore[import-not-found]

    options = ["--shape", "tiny", "--lengths", "7", "30", "--json"]
    found = {}
    for variant in ("packed-full", "leaking"):
        monkeypatch.setattr(sys, "argv", ["rows.py", *options, "--variant", variant])
        rows.main()
        found[variant] = json.loads(capsys.readouterr().out)
    for way in ("in the shape of all", "in its own shape"):
        right, leaking = found["packed-full"][way], found["leaking"][way]
        assert max(right.values()) < 1e-4
        assert min(leaking["any order"], leaking["one order"]) > 1e-2 and leaking["logprob"] > 1e-3
    assert found["leaking"]["packed once more"] == {"logprob": 0.0, "any order": 0.0, "one order": 0.0}
    assert len(found["packed-full"]["lies in"]) == 3


def test_kernels_are_summed_and_idle_time_is_not_hidden(bench: ModuleType) -> None:
    """Two overlap for 1 ms, then nothing for 4 ms."""
    ms = 1_000_000
    table = bench.kernel_table([("gemm", 0, 2 * ms), ("norm", ms, 2 * ms), ("gemm", 7 * ms, ms)])
    lines = table.splitlines()
    assert lines[1].split() == ["3.00", "0.750", "2", "gemm"]
    assert lines[2].split() == ["2.00", "0.500", "1", "norm"]
    assert lines[-1] == "busy 4.0 ms of 8.0 ms from the first to the last, 3 in all"


@pytest.mark.parametrize("options", [["--layout", "1+1"], ["--layout", "1+2", "--device", "cpu"]])
def test_time_sharing_is_refused_where_nothing_is_shared(options: list[str]) -> None:
    """Else the table would say `time-shared` over a run that was not."""
    done = warm.run([str(BENCH / "loop" / "full_size.py"), "--time-sharing", *options], timeout=60)
    assert done.returncode == 2 and "--time-sharing needs GPUs that engine and trainer share" in done.stderr


def test_the_whole_loop_at_tiny_shape(
    bench: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """`bench/loop/full_size.py` with the embedded engine: every figure is there, and they add up."""
    import shared  # type: ignore[import-not-found]
    from loop import full_size  # type: ignore[import-not-found]

    options = ["--shape", "tiny", "--device", "cpu", "--steps", "5", "--skip", "2", "--folder", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["full_size.py", "--json", *options])
    monkeypatch.setattr(shared, "start", warm.bench_start)
    with pytest.raises(SystemExit) as end:
        full_size.main()
    said = capsys.readouterr()
    assert end.value.code == 0, said.err[-3000:]
    result = json.loads(said.out)
    assert (result["steps"], result["restarts"], result["resyncs"]) == (5, 0, 0)
    phases = result["phases_s"]
    step = phases.pop("step")
    assert sum(phases.values()) == pytest.approx(step)
    assert result["wait_share"] == pytest.approx(phases["wait"] / step)
    assert result["trained_tokens_per_s"] == pytest.approx(result["tokens_per_step"] / step)
    assert 0 < result["delta_bytes"] < result["full_bytes"]
    assert result["update"]["pause_s"]["n"] >= 2 and result["generated_tokens_per_s"] > 0
    assert result["bottleneck"]["limit"] in ("generation", "training", "each other", "nothing")
    assert result["memory"] == [], "no GPU"
    assert not list(tmp_path.iterdir()), "nothing is left"


@pytest.mark.parametrize(("pid", "seen"), [("$PPID", {0: 40.0, 2: 1.5}), ("4000000", {0: 30.0, 2: 2.0})])
def test_gpu_memory_is_that_of_our_processes_or_else_what_came_since(
    bench: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pid: str, seen: dict[int, float]
) -> None:
    """GPU 0 holds 48 GiB, 18 of them from before: 40 are ours, or, where our ids are not shown, 30. GPU 2 holds 3."""
    from shared import MemoryWatch  # type: ignore[import-not-found]

    asked = tmp_path / "asked"
    script = f"""#!/bin/sh
case "$1" in
*compute-apps*) echo "GPU-a, {pid}, 40960"; echo "GPU-a, 1, [N/A]"; echo "GPU-b, {pid}, 1536"; echo "GPU-b, 1, 512" ;;
*memory.used*) [ -e {asked} ] && echo "0, GPU-a, 49152" || echo "0, GPU-a, 18432"
    [ -e {asked} ] && echo "2, GPU-b, 3072" || echo "2, GPU-b, 1024"; touch {asked} ;;
esac
"""
    (tmp_path / "nvidia-smi").write_text(script)
    (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    watch = MemoryWatch(every_s=0.01)
    assert watch.peak_gib == 0.0
    watch.start()
    deadline = time.monotonic() + 20
    while watch.peaks_gib != seen and time.monotonic() < deadline:
        time.sleep(0.01)
    watch.done.set()
    watch.join()
    assert watch.peaks_gib == seen and watch.peak_gib == sum(seen.values())


def test_a_run_s_memory_stands_beside_its_plan_for_each_gpu(bench: ModuleType, tmp_path: Path) -> None:
    """Engine and trainer share GPU 3 in time: 2 + max(10, 30) GiB are planned there, and 20 on GPU 5."""
    from loop import full_size  # type: ignore[import-not-found]
    from shared import MemoryWatch  # type: ignore[import-not-found]

    gib, one = 2**30, {"where": "gpu", "basis": "counted", "fixed": True, "away": False}
    rows = [
        one | {"process": "engine0", "what": "w", "bytes": 10 * gib, "away": True},
        one | {"process": "engine0", "what": "c", "bytes": 2 * gib},
        one | {"process": "trainer", "what": "m", "bytes": 30 * gib, "away": True},
        one | {"process": "trainer1", "what": "m", "bytes": 20 * gib},
    ]
    plan = {"memory": rows, "gpu_map": {"3": ["engine0", "trainer"], "5": ["trainer1"]}}
    (tmp_path / "plan.json").write_text(json.dumps(plan))

    def judged(*seen: float) -> tuple[list[float], bool]:
        watch = MemoryWatch()
        watch.ours.see(dict(zip((3, 5), seen, strict=True)))
        found = full_size.memory(tmp_path, watch)
        assert [(row["gpu"], row["planned_gib"]) for row in found] == [("3", 32.0), ("5", 20.0), ("all", 52.0)]
        return [round(row["ratio"], 3) for row in found], full_size.as_planned(found)

    assert judged(32.0, 20.0) == ([1.0, 1.0, 1.0], True)
    assert judged(33.6, 15.0) == ([1.05, 0.75, 0.935], True), "a GPU may hold less, if all hold what is planned"
    assert judged(28.8, 17.0) == ([0.9, 0.85, 0.881], False)
    assert judged(32.0, 22.2) == ([1.0, 1.11, 1.042], False), "but none more"
