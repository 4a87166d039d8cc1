"""Shared fixtures, and how `pytest -n 3` divides the suite."""

from __future__ import annotations

import importlib
import os
import signal
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # A shell starts what a script puts into the background with Ctrl-C ignored. The product honours that, so tests that
    # send it would wait in vain.
    signal.signal(signal.SIGINT, signal.default_int_handler)

HERE = Path(__file__).parent

sys.dont_write_bytecode = False
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
# Dozens of Pythons start here: each would compile the package again, and every worker all of the tests.

LONGEST = (
    "test_faults.py", "test_end_to_end.py", "test_tools_end_to_end.py", "test_single_rank.py", "test_howto.py",
    "test_plugins.py", "test_evaluate_worker.py", "test_agents.py", "test_envs.py", "test_train_resume.py",
    "test_jobs.py", "test_weights_bench.py", "test_reward_pool.py", "test_sft_run.py", "test_engine_vllm.py",
    "test_weights_changes.py", "test_doctor_probes.py", "test_docs.py", "test_engine_slots.py",
    "test_gpu_bench.py", "test_engine_servers.py", "test_reward.py", "test_grading.py", "test_fetch.py",
    "test_checkpoint.py", "test_eval_simulation.py", "test_make_small.py", "test_cpu_offload.py",
    "test_time_sharing.py", "test_supervise.py", "test_tiny_model.py",
)  # fmt: skip
"""Begun first when workers share the suite: a long file that starts last leaves the other worker with nothing to do."""


@pytest.hookimpl(tryfirst=True)
def pytest_collection(session: pytest.Session) -> None:
    """Every worker needs every file. Each begins at another one, so that most are there compiled when it comes to them:
    to rewrite asserts is what takes long."""
    told = getattr(session.config, "workerinput", None)
    if told is not None and session.config.args == session.config.getini("testpaths"):
        names = sorted(path.stem for path in HERE.glob("test_*.py"))
        first = int(told["workerid"].removeprefix("gw")) * len(names) // told["workercount"]
        for name in names[first:] + names[:first]:
            importlib.import_module(name)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if hasattr(config, "workerinput"):
        place = {name: index for index, name in enumerate(LONGEST)}
        items.sort(key=lambda item: place.get(item.path.name, len(LONGEST)))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """A file is one worker's, whatever `--dist` says: its fixtures run once. Files go out in the order above."""
    from xdist.scheduler import LoadFileScheduling

    config.option.loadscopereorder = False
    return LoadFileScheduling(config, log)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_setupnodes(config: pytest.Config, specs: list[Any]) -> None:
    """Workers are forks of one process that has imported torch: each would spend seconds on that, twice."""
    if sys.platform == "linux" and all(spec.popen and not spec.python for spec in specs):
        from warm_worker import fork_workers

        fork_workers()


@dataclass
class Ran:
    """What one `astra` command line printed, and its exit code."""

    code: int
    out: str
    err: str


@pytest.fixture
def astra(capsys: pytest.CaptureFixture[str]) -> Callable[..., Ran]:
    """Run `astra ARGS...` in this process."""
    from astracli.cli.main import run

    def call(*args: str) -> Ran:
        capsys.readouterr()
        code = run(list(args))
        said = capsys.readouterr()
        return Ran(code, said.out, said.err)

    return call


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory; the folder `runs` in it."""
    monkeypatch.chdir(tmp_path)
    return tmp_path / "runs"


@pytest.fixture
def logs(tmp_path: Path) -> Iterator[Path]:
    """A folder for the logs of processes, none of which is left running."""
    from children import children

    yield tmp_path
    left = [p for p in children(recursive=True) if p.status() != psutil.STATUS_ZOMBIE]
    for process in left:
        process.kill()
    assert not left, f"left running: {left}"
