"""Tuned choices of Triton kernels travel from one cache to another: through Triton's own tuner, without a GPU."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from astracli.kernels.gpu import tuned
from astracli.kernels.gpu.tuned import Origin

ORIGIN = Origin("9.0", "3.7.1", "0.6.0")
TIMES = {32: [2.0, 1.9, 2.1], 64: [1.0, 0.9, 1.1], 128: [3.0, 2.9, 3.1]}
"""Milliseconds of each block size, as Triton measures them: median and two quantiles."""


def tune(cache: Path, monkeypatch: pytest.MonkeyPatch, *, stages: int = 2) -> tuple[int, bool]:
    """(block size that Triton's tuner takes with this cache, whether it had to measure)"""
    triton = pytest.importorskip("triton")
    from triton.backends.compiler import GPUTarget
    from triton.runtime import autotuner

    class Driver:
        active: Any = None

        def get_current_target(self) -> Any:
            return GPUTarget("cuda", 90, 32)

    Driver.active = Driver()
    monkeypatch.setattr(autotuner, "driver", Driver)
    monkeypatch.setenv("TRITON_CACHE_DIR", str(cache))
    configs = [triton.Config({"BLOCK": size}, num_warps=4, num_stages=stages) for size in TIMES]
    tuner: Any = autotuner.Autotuner.__new__(autotuner.Autotuner)
    tuner.fn, tuner.cache = triton.jit(_kernel), {}
    measured = []

    def measure() -> None:
        measured.append(True)
        tuner.configs_timings = {config: TIMES[config.kwargs["BLOCK"]] for config in configs}
        tuner.cache["key"] = min(tuner.configs_timings, key=tuner.configs_timings.get)

    tuner.check_disk_cache("key", configs, measure)
    return tuner.cache["key"].kwargs["BLOCK"], bool(measured)


def _kernel(x, BLOCK) -> None:  # type: ignore[no-untyped-def]
    pass


def test_what_one_machine_has_tuned_is_not_measured_on_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    there, here = tmp_path / "there", tmp_path / "here"
    assert tune(there, monkeypatch) == (64, True)
    assert tune(there, monkeypatch) == (64, False), "Triton finds its own file"
    doc = json.loads(json.dumps(tuned.document(there, ORIGIN, "NVIDIA H200", "4.2 B")))
    (content,) = doc["files"].values()
    assert len(content["configs_timings"]) == 1
    assert tuned.install([doc], here, ORIGIN) == tuned.Installed(1)
    assert tune(here, monkeypatch) == (64, False)
    assert tune(here, monkeypatch, stages=3) == (64, True), "other configurations are another key"
    assert tuned.install([doc], here, ORIGIN) == tuned.Installed(0), "what is there is left"


@pytest.mark.parametrize(
    ("origin", "why"),
    [
        (Origin("9.0", "3.6.0", "0.6.0"), "tuned for triton 3.7.1, here it is 3.6.0"),
        (Origin("9.0", "3.7.1", "0.5.0"), "tuned for fla 0.6.0, here it is 0.5.0"),
        (Origin("8.9", "3.7.1", "0.6.0"), "tuned for compute capability 9.0, here it is 8.9"),
        (None, "there is no GPU with Triton and fla here"),
    ],
)
def test_choices_for_something_else_are_refused(tmp_path: Path, origin: Origin | None, why: str) -> None:
    doc = {"format": 1, "gpu": "NVIDIA H200", "load": "4.2 B", "capability": "9.0", "triton": "3.7.1", "fla": "0.6.0"}
    found = tuned.install([doc | {"files": {}}], tmp_path, origin)
    assert found == tuned.Installed(0, (f"NVIDIA H200, 4.2 B: {why}",))


@pytest.mark.parametrize(
    "name", ["../../x.autotune.json", "A" * 52 + "/../x.autotune.json", "A" * 52 + "/kernel.cubin"]
)
def test_a_document_writes_nothing_but_such_files(tmp_path: Path, name: str) -> None:
    doc = {"format": 1, "gpu": "", "load": "", "capability": "9.0", "triton": "3.7.1", "fla": "0.6.0"}
    content = {"key": [1], "configs_timings": [[{"kwargs": {}}, 1.0]]}
    with pytest.raises(ValueError, match="is no file of them"):
        tuned.install([doc | {"files": {name: content}}], tmp_path / "cache", ORIGIN)
    assert not list(tmp_path.rglob("*.*"))


def test_what_ships_is_whole() -> None:
    for doc in tuned.shipped():
        assert doc["files"] and doc["format"] == tuned.FORMAT
        assert {"gpu", "load", "capability", "triton", "fla"} <= doc.keys()
