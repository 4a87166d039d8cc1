"""The facts of this machine, and what a recipe finds on it: checkpoint, data, network, engine environment, dead runs.

Files and sockets only: nothing heavy is imported, nothing is downloaded.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

from astracli.config.recipe import Recipe
from astracli.config.recipe_data import GENERATED, DataTable, sets
from astracli.errors import UserError
from astracli.machine import packages, read
from astracli.machine.facts import CheckpointFacts, DataSet, Environment, Machine, Network, RunLeft, Tensor
from astracli.models import documents, registry
from astracli.models.adapter import SHARD_INDEX, read_config
from astracli.models.adapter_tools import checkpoint_tensors, has_chat_template
from astracli.runs.clean import clean, dead, leftovers
from astracli.runs.find import RUNS

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "tokenizer_config.json")
HUB = "https://huggingface.co"
HUB_TIMEOUT_S = 1.0
ENGINE_TIMEOUT_S = 20.0


def gather(recipe: Recipe | None = None, runs: Path = RUNS) -> Machine:
    """`read.probe`, and with a recipe what it needs here. Well under two seconds, unless nvidia-smi is slow."""
    families = sorted({name for found in registry.installed() if found.plugin for name in found.plugin.model_types})
    found: dict[str, Any] = {"runs": dead_runs(runs)}
    listening = network("127.0.0.1" if recipe is None else recipe.launch.host)
    if recipe is not None:
        found["checkpoint"] = checkpoint(recipe.model.path, recipe.model.revision)
        found["data"] = data(recipe)
        missing = found["checkpoint"].place is None or any(each.place is None for each in found["data"])
        if missing and not offline(os.environ):
            listening = listening.model_copy(update={"hub_error": reach(listening.hub), "hub_asked": True})
        engine = recipe.resources.engine
        if engine.foreign:
            found["engine"] = environment(engine.python or sys.executable, families, engine.env)
    return read.probe(families).model_copy(update=found | {"network": listening})


# -- checkpoint and data -----------------------------------------------------------------------------------------------


def checkpoint(path: str, revision: str | None = None) -> CheckpointFacts:
    """What lies at model.path: config.json, shards, tensor headers, tokenizer."""
    from astracli.data import fetch

    found: dict[str, Any] = {"path": path, "place": None}
    try:
        place = fetch.local_path(path) or cached(path, "models", revision)
        if place is None:
            return CheckpointFacts(**found)
        found["place"] = str(place)
        found["config"] = read_config(place)
        found["tensors"] = {
            name: Tensor(dtype=entry["dtype"], shape=entry["shape"])
            for name, entry in checkpoint_tensors(place).items()
        }
    except UserError as error:
        found["problem"] = error.message
    return CheckpointFacts(**found, **(_beside(Path(found["place"])) if found["place"] is not None else {}))


def _beside(place: Path) -> dict[str, Any]:
    index = place / SHARD_INDEX
    shards: set[str] = set()
    if index.is_file():
        try:
            shards = set(documents.shard_of(index).values())
        except UserError:
            shards = {f"{index.name} (unreadable)"}
    elif not any(place.glob("*.safetensors")):
        shards = {"model.safetensors"}
    return {
        "missing_files": sorted(name for name in shards if not (place / name).is_file()),
        "tokenizer": [name for name in TOKENIZER_FILES if (place / name).is_file()],
        "chat_template": has_chat_template(place),
    }


def cached(name: str, kind: str, revision: str | None = None) -> Path | None:
    """Snapshot folder of a Hub repository in the local cache (`kind`: models, datasets); None when it is not there."""
    home = os.environ.get("HF_HOME") or "~/.cache/huggingface"
    root = Path(os.environ.get("HF_HUB_CACHE") or Path(home) / "hub").expanduser()
    folder = root / f"{kind}--{name.replace('/', '--')}"
    reference = folder / "refs" / (revision or "main")
    commit = reference.read_text().strip() if reference.is_file() else revision or ""
    place = folder / "snapshots" / commit
    return place if commit and place.is_dir() and any(place.iterdir()) else None


def data(recipe: Recipe) -> tuple[DataSet, ...]:
    """Training problems and benchmarks of a recipe, each with where it lies."""
    from astracli.config.benchmarks import get
    from astracli.data import benchmarks

    found = [_source(table.source, "train", table) for table in sets(recipe.data).values()]
    for name in recipe.eval.benchmarks if recipe.eval.every else []:
        spec, folder = get(name, recipe), recipe.data.path
        if spec.own is not None:
            found.append(_source(name, "eval", spec.own))
        elif spec.hub is None:
            found.append(DataSet(name=name, use="eval", hub_id=None, place="generated"))
        else:
            found.append(_lookup(name, "eval", spec.hub.hub_id, None, partial(benchmarks.local, spec, folder)))
    return tuple(found)


def _source(name: str, use: Literal["train", "eval"], table: DataTable) -> DataSet:
    """Where one set of problems lies."""
    from astracli.data import datasets

    source = table.source
    if source == GENERATED:
        return DataSet(name=name, use=use, hub_id=None, place="generated")
    known = datasets.known_set(source)
    hub_id = known.hub_id if known else source if source.count("/") == 1 else None
    return _lookup(name, use, hub_id, table.revision, partial(datasets.find_local, source, table.path))


def _lookup(
    name: str, use: Literal["train", "eval"], hub_id: str | None, revision: str | None, local: Callable[[], Path | None]
) -> DataSet:
    place = None
    problem = None if hub_id else f"no data set `{name}` is known, and it is no Hub id"
    try:
        place = local() or (cached(hub_id, "datasets", revision) if hub_id else None)
    except UserError as error:
        problem = error.message
    return DataSet(
        name=name, use=use, hub_id=hub_id, place=str(place) if place else None, problem=None if place else problem
    )


# -- network -----------------------------------------------------------------------------------------------------------


def network(host: str) -> Network:
    """Can a run listen on `host`, and which ports the system gives out."""
    ports = None
    with contextlib.suppress(OSError, ValueError):
        low, high = Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()
        ports = int(low), int(high)
    return Network(hosts={host: _bind(host)}, ports=ports, hub=os.environ.get("HF_ENDPOINT") or HUB)


def _bind(host: str) -> str | None:
    """Listen on a free port of `host` and connect to it once; why not, or None."""
    try:
        with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as listener:
            listener.bind((host, 0))
            listener.listen(1)
            with socket.create_connection(listener.getsockname()[:2], timeout=1.0):
                return None
    except OSError as error:
        return (error.strerror or str(error)).lower()


def reach(url: str, timeout_s: float = HUB_TIMEOUT_S) -> str | None:
    """Open a connection to a server, or to the proxy in front of it; why not, or None. Never waits longer."""
    proxy = os.environ.get("HTTPS_PROXY") or os.environ.get("https_proxy")
    target = urlsplit(proxy if proxy and "://" in proxy else f"http://{proxy}" if proxy else url)
    port = target.port or (443 if target.scheme == "https" else 80)
    answer: list[str | None] = [f"no answer in {timeout_s:g} s"]

    def connect() -> None:
        try:
            socket.create_connection((target.hostname or "", port), timeout=timeout_s).close()
            answer[0] = None
        except OSError as error:
            answer[0] = (error.strerror or str(error)).lower()

    thread = threading.Thread(target=connect, daemon=True)  # looking a name up has no time limit of its own
    thread.start()
    thread.join(timeout_s)
    return answer[0]


def offline(env: Mapping[str, str | None]) -> bool:
    """HF_HUB_OFFLINE as huggingface_hub reads it."""
    return str(env.get("HF_HUB_OFFLINE") or "").upper() in ("1", "ON", "YES", "TRUE")


# -- the engine's own environment --------------------------------------------------------------------------------------

_ASK = """
import json, sys
found = {"version": platform.python_version(), "libc": libc(), **describe(json.loads(sys.argv[1]))}
print(json.dumps(found))
"""


def with_engine(facts: Machine, recipe: Recipe) -> Machine:
    """With the packages of the engine's own environment, where it has one and there is a GPU to serve on."""
    engine = recipe.resources.engine
    if not (engine.foreign and facts.visible_gpus):
        return facts
    return facts.model_copy(update={"engine": environment(engine.python or sys.executable, [], engine.env)})


def environment(python: str, families: list[str], env: Mapping[str, str] | None = None) -> Environment:
    """Packages as another interpreter sees them under `env`, asked of itself: it needs neither astracli nor psutil."""
    source = Path(packages.__file__).read_text() + _ASK
    command = [python, "-c", source, json.dumps(families)]
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            timeout=ENGINE_TIMEOUT_S,
            cwd="/",
            env={**os.environ, **(env or {})},
        )
        if done.returncode == 0:
            return Environment(executable=python, **json.loads(done.stdout))
        error = (done.stderr.strip().splitlines() or [f"it exited {done.returncode}"])[-1][:300]
    except subprocess.TimeoutExpired:
        error = f"no answer in {ENGINE_TIMEOUT_S:.0f} s"
    except OSError as failed:
        error = (failed.strerror or str(failed)).lower()
    except ValueError:
        error = "its answer is not JSON"
    return Environment(executable=python, error=error)


# -- what dead runs left -----------------------------------------------------------------------------------------------


def dead_runs(root: Path) -> tuple[RunLeft, ...]:
    """Runs under `root` that say `running` without a supervisor, and what is left of them."""
    return tuple(
        RunLeft(
            path=str(run.path),
            step=status.step if (status := run.status()) else 0,
            bytes=clean(run, dry_run=True),
            processes={str(pid): module for pid, module in leftovers(run)},
        )
        for run in dead(root)
    )
