"""The checks of `astra doctor`: small functions of machine facts and a recipe. Only what the recipe needs can fail.

Without a recipe, Python and the packages that every run imports can fail; the rest is `ok`, `warn` or `skip`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from astracli import backend as backends
from astracli import machine, plan, registry
from astracli.adapter import ModelAdapter, read_config
from astracli.errors import UserError
from astracli.plan import LaunchPlan
from astracli.plan_memory import words
from astracli.recipe import Recipe

Facts = Mapping[str, Any]
Status = Literal["ok", "warn", "fail", "skip"]

OLDEST_PYTHON = (3, 11)
CORE = {
    "torch": (2, 11),
    "transformers": (5, 8),
    "safetensors": (0, 5),
    "numpy": (2,),
    "datasets": (4,),
    "math-verify": (0, 9),
    "pydantic": (2, 9),
    "typer": (0, 16),
}
"""What every run imports, and from which version on."""
OLDEST_DRIVER = {11: 450, 12: 525, 13: 580}
"""CUDA major version that torch was built for -> first driver that runs it."""
GIB = 2**30


@dataclass(frozen=True)
class Check:
    name: str
    group: str
    status: Status
    value: str
    """What was found."""
    why: str = ""
    """What it leads to; empty when all is well."""
    fix: str = ""
    """The next command or setting."""


@dataclass(frozen=True)
class Fit:
    """What a recipe comes to on these facts; parts are None from the first refusal on."""

    adapter: ModelAdapter | None = None
    choice: backends.BackendChoice | None = None
    plan: LaunchPlan | None = None
    refusal: UserError | None = None


def run(recipe: Recipe | None, facts: Facts, probe: bool = False) -> dict[str, Any]:
    """The report: `{"ok", "checks", "backends", "facts"}`. `probe` also runs the adapter's smallest model here.

    Raises UserError when `facts` is not a machine document.
    """
    machine.validate(facts)
    fit = judge(recipe, facts, local_config(recipe)) if recipe is not None else Fit()
    cuda = fit.choice is not None and fit.choice.device == "cuda"
    found = [*python(facts), *packages(facts), *system(facts, cuda), *gpus(facts, cuda)]
    if recipe is not None:
        found += recipe_checks(recipe, fit)
    if probe and fit.adapter is not None and machine.usable(facts, "torch"):
        found += numerics(fit.adapter)
    return {
        "ok": all(check.status != "fail" for check in found),
        "checks": [asdict(check) for check in found],
        "backends": [asdict(row) for row in fit.choice.reasons] if fit.choice else [],
        "facts": dict(facts),
    }


def local_config(recipe: Recipe) -> dict[str, Any] | None:
    """config.json of a shipped or local checkpoint, None when the recipe names a Hub id. Nothing is downloaded."""
    from astracli.launch import fetch

    path = fetch.local_path(recipe.model.path)
    return read_config(Path(path)) if path is not None else None


def judge(recipe: Recipe, facts: Facts, config: Mapping[str, Any] | None) -> Fit:
    """Adapter, backends and plan of a recipe; a refusal is kept, not raised."""
    adapter, choice = None, None
    try:
        adapter = registry.resolve(recipe, config)
        choice = backends.choose(adapter, facts, recipe, config)
        return Fit(adapter, choice, plan.build(recipe, adapter, choice, facts, config=config))
    except UserError as error:
        return Fit(adapter, choice, None, error)


def python(facts: Facts) -> Iterator[Check]:
    version = facts["python"]["version"]
    if machine.version_tuple(version) < OLDEST_PYTHON:
        yield Check(
            "python", "python", "fail", version, "astra needs 3.11 or newer", "make a newer virtual environment"
        )
    else:
        yield Check("python", "python", "ok", f"{version} at {facts['python']['executable']}")


def packages(facts: Facts) -> Iterator[Check]:
    """Core packages and their oldest versions; for the others, versions, and stubs that only look installed."""
    for name, found in facts["packages"].items():
        version = found["version"]
        stub = found["importable_spec"] and not found["origin"]
        if name in CORE:
            oldest = ".".join(map(str, CORE[name]))
            fix = f"`pip install '{name}>={oldest}'`"
            if not machine.usable(facts, name):
                yield Check(name, "packages", "fail", "not importable", "every run imports it", fix)
            elif machine.version_of(facts, name) < CORE[name]:
                yield Check(name, "packages", "fail", str(version), f"needs {oldest} or newer", fix)
            else:
                yield Check(name, "packages", "ok", str(version))
        elif stub:
            why = "an empty namespace folder: importing it succeeds and finds nothing"
            yield Check(name, "packages", "warn", "stub", why, f"`pip install {name}`, or remove the folder")
        elif version and not machine.usable(facts, name):
            why = "installed by its metadata, but there is no module to import"
            yield Check(name, "packages", "warn", version, why, f"`pip install --force-reinstall {name}`")
        else:
            yield Check(name, "packages", "ok" if version else "skip", version or "not installed")


def system(facts: Facts, cuda: bool) -> Iterator[Check]:
    """Cores, memory, disk, open files, shared memory."""
    box = facts["system"]
    cores, memory, disk = box["cores_usable"], box["memory_available"], box["disk_free"]
    yield _least("cpu cores", cores, 2, f"{cores:g} usable of {box['cores']}", "engine and trainer want one each", "")
    why = "a run of the tiny recipe takes about 3 GiB"
    yield _least("memory", memory, 3 * GIB, f"{words(memory)} available of {words(box['memory_total'])}", why, "")
    why, fix = "checkpoints and published weights need room", "point --run-dir at a larger disk"
    yield _least("disk", disk, 2 * GIB, f"{words(disk)} free at {box['disk_path']}", why, fix)
    files = box["nofile"]
    why, fix = "many engines and rollouts hold many sockets", "`ulimit -n 65536` before the run"
    yield _least("open files", files if files >= 0 else 2**31, 4096, str(files), why, fix)
    shm = box["shm_total"]
    if shm is None:
        yield Check("/dev/shm", "system", "skip", "none on this system")
        return
    why, fix = "NCCL and data loaders die when it is full", "start the container with `--shm-size=8g`"
    yield _least("/dev/shm", shm, GIB if cuda else 64 * 2**20, words(shm), why, fix)


def _least(name: str, value: float, least: float, shown: str, why: str, fix: str) -> Check:
    """`warn` below `least`."""
    if value < least:
        return Check(name, "system", "warn", shown, why, fix)
    return Check(name, "system", "ok", shown)


def gpus(facts: Facts, cuda: bool) -> Iterator[Check]:
    """GPUs, driver, and whether torch was built for them; a recipe for a CPU needs none of it."""
    bad: Status = "fail" if cuda else "warn"
    if facts["gpu_error"]:
        fix = "mend the NVIDIA driver: `nvidia-smi` must answer"
        yield Check("gpus", "gpu", bad, "nvidia-smi fails", facts["gpu_error"], fix)
        return
    visible, there = machine.visible_gpus(facts), facts["gpus"]
    if not visible:
        hidden = f"{len(there)} hidden by CUDA_VISIBLE_DEVICES" if there else "none"
        yield Check("gpus", "gpu", "skip", hidden)
        return
    first = visible[0]
    size = f", {words(first['memory_total'])}" if first["memory_total"] else ""
    shown = f"{len(visible)} x {first['name']} ({first['compute_capability']}{size})"
    yield Check("gpus", "gpu", "ok", shown)
    built = facts["torch_cuda"]
    if built is None:
        fix = "install a CUDA build of torch: `pip install -c constraints/cuda.txt 'astracli[gpu]'`"
        yield Check("torch for gpus", "gpu", bad, "a CPU build", "torch cannot use these GPUs", fix)
        return
    yield Check("torch for gpus", "gpu", "ok", f"built for CUDA {built}")
    least = OLDEST_DRIVER.get(machine.version_tuple(built)[0], 0)
    driver = machine.version_tuple(first["driver"])
    if driver and driver[0] < least:
        fix = f"update the driver to {least} or newer, or install torch for an older CUDA"
        yield Check("driver", "gpu", bad, first["driver"], f"CUDA {built} needs {least} or newer", fix)
    else:
        yield Check("driver", "gpu", "ok", first["driver"])


def recipe_checks(recipe: Recipe, fit: Fit) -> Iterator[Check]:
    """What the recipe lacks here, from its plan."""
    if fit.adapter is not None:
        yield Check("adapter", "recipe", "ok", f"{fit.adapter.name}: {fit.adapter.summary}")
    if fit.refusal is not None:
        yield Check("refused", "recipe", "fail", recipe.name, fit.refusal.message, fit.refusal.hint or "")
    if fit.plan is None:
        return
    for problem in fit.plan.problems:
        status: Status = "fail" if problem.blocking else "warn"
        yield Check(problem.kind, "recipe", status, problem.what, problem.message, problem.hint or "")
    for warning in fit.plan.warnings:
        what, _, fix = warning.partition("; ")
        yield Check("warning", "recipe", "warn", recipe.name, what, fix)
    if not any(problem.blocking for problem in fit.plan.problems):
        yield Check("fit", "recipe", "ok", f"{recipe.name} can run here ({len(fit.plan.processes)} processes)")


def numerics(adapter: ModelAdapter) -> Iterator[Check]:
    """The adapter's promises, proved on its smallest model on this machine's CPU."""
    from astracli import adapter_check

    if adapter.tiny_config is None:
        yield Check(f"{adapter.name}: numerics", "numerics", "skip", "this adapter brings no tiny model to try")
        return
    for result in adapter_check.check(adapter)["checks"]:
        failed = result["status"] == "fail"
        why = f"adapter `{adapter.name}` does not hold with these versions" if failed else ""
        fix = "use the versions of the constraint file: `pip install -c constraints/cpu.txt astracli`" if failed else ""
        shown = result["value"]
        yield Check(f"{adapter.name}: {result['name']}", "numerics", result["status"], shown, why, fix)
