"""Engines of other packages for tests: what their processes are told, and how these are started and watched. SGLang and
vLLM themselves are stand-ins (tests/fake_sglang, tests/fake_vllm)."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import configs
import psutil
import warm
from test_workers_common import TOKEN, FakeHub

from astracli.adapters.qwen3_5 import ADAPTER as QWEN3_5
from astracli.process.config import EngineConfig
from astracli.process.ports import free_ports

HERE = Path(__file__).parent
FAKE_VLLM = f"{HERE / 'fake_vllm'}{os.pathsep}{HERE}"
LOOPBACK = {"GLOO_SOCKET_IFNAME": "lo"}
"""As a run sets it for its engines."""


def model_dir(tmp_path: Path) -> Path:
    path = tmp_path / "model"
    path.mkdir(exist_ok=True)
    assert QWEN3_5.tiny_config is not None
    (path / "config.json").write_text(json.dumps(QWEN3_5.tiny_config()))
    return path


def sglang_config(tmp_path: Path, hub: FakeHub, mode: str = "", **changes: Any) -> EngineConfig:
    (port,) = free_ports(1, "127.0.0.1")
    config = configs.engine(run_dir=tmp_path, hub_url=hub.url, token=TOKEN, name="engine0")
    env = {"PYTHONPATH": str(HERE / "fake_sglang"), "FAKE_SGLANG": mode}
    engine = config.recipe.resources.engine.model_copy(update={"env": env})
    resources = config.recipe.resources.model_copy(update={"engine": engine})
    launch = config.recipe.launch.model_copy(update={"ready_timeout_s": 20.0})
    told = {
        "recipe": config.recipe.model_copy(update={"resources": resources, "launch": launch}),
        "model_path": model_dir(tmp_path),
        "engine": "sglang",
        "serving_attention": "triton",
        "linear_attention": "triton",
        "port": port,
        "stage_dir": tmp_path / "stage" / "engine0",
        "published": True,
        "staging": "gpu",
    }
    return config.model_copy(update=told | changes)


def vllm_config(tmp_path: Path, hub: FakeHub, mode: str = "", **changes: Any) -> EngineConfig:
    (port,) = free_ports(1, "127.0.0.1")
    config = configs.engine(run_dir=tmp_path, hub_url=hub.url, token=TOKEN, name="engine0")
    env = {"PYTHONPATH": FAKE_VLLM, "FAKE_VLLM": mode}
    engine = config.recipe.resources.engine.model_copy(update={"env": env})
    resources = config.recipe.resources.model_copy(update={"engine": engine})
    launch = config.recipe.launch.model_copy(update={"ready_timeout_s": 60.0})
    weights = config.recipe.weights.model_copy(update={"verify_interval": 1})
    recipe = config.recipe.model_copy(update={"resources": resources, "launch": launch, "weights": weights})
    told = {
        "recipe": recipe, "model_path": model_dir(tmp_path), "engine": "vllm", "serving_attention": "auto",
        "linear_attention": "none", "port": port, "stage_dir": tmp_path / "stage", "published": True,
        "staging": "host", "prefix_cache": True, "time_sharing": True,
    }  # fmt: skip
    return config.model_copy(update=told | changes)


CONFIGS = {"sglang": sglang_config, "vllm": vllm_config}


@contextmanager
def process(config: EngineConfig) -> Iterator[subprocess.Popen[str]]:
    path = config.run_dir / "engine0.json"
    path.write_text(config.model_dump_json())
    (config.run_dir / "config").mkdir(exist_ok=True)
    started = subprocess.Popen(
        [sys.executable, "-m", module(config), str(path)], stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, text=True, start_new_session=True, env=os.environ | LOOPBACK,
    )  # fmt: skip
    try:
        yield started
    finally:
        if started.poll() is None:
            os.killpg(started.pid, signal.SIGKILL)
        started.wait()


def module(config: EngineConfig) -> str:
    return f"astracli.engines.{config.engine}.server"


def ended(config: EngineConfig) -> tuple[int, str]:
    """(exit code, output) of the same process, forked from one that has imported what it needs."""
    path = config.run_dir / "engine0.json"
    path.write_text(config.model_dump_json())
    (config.run_dir / "config").mkdir(exist_ok=True)
    done = warm.run(["-m", module(config), str(path)], timeout=60)
    return done.returncode, done.stdout + done.stderr


def until(ready: Any, limit_s: float = 30.0) -> None:
    deadline = time.monotonic() + limit_s
    while not ready():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)


def is_ready(hub: FakeHub) -> bool:
    return any(body["state"] == "ready" for body in hub.bodies)


def server_of(watcher: subprocess.Popen[str]) -> psutil.Process:
    return next(c for c in psutil.Process(watcher.pid).children(recursive=True) if "runpy" in " ".join(c.cmdline()))
