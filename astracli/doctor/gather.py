"""The facts of this machine, and what a recipe finds on it: checkpoint, data, network, engine environment, dead runs.

Files and sockets only: nothing heavy is imported, nothing is downloaded. The answer is the document that every check
reads; `machine.Machine` is its schema.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from astracli.config.recipe import Recipe
from astracli.errors import UserError
from astracli.machine import facts as machine
from astracli.machine import read as machine_read
from astracli.models import registry
from astracli.models.adapter import SHARD_INDEX, read_config
from astracli.models.adapter_tools import has_chat_template
from astracli.report import live as run_view
from astracli.runs.find import RUNS

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "tokenizer_config.json")
HUB = "https://huggingface.co"
HUB_TIMEOUT_S = 1.0
ENGINE_TIMEOUT_S = 20.0


def gather(recipe: Recipe | None = None, runs: Path = RUNS) -> dict[str, Any]:
    """`machine.probe`, and with a recipe what it needs here. Well under two seconds, unless nvidia-smi is slow."""
    facts = machine.probe()
    families = sorted({name for found in registry.installed() if found.adapter for name in found.adapter.model_types})
    for name, folder in machine.MODEL_FILES.items():
        package = facts["packages"][name]
        package["models"] = machine_read.model_files(package["module"], folder, families)
    facts["packages"]["sglang"]["pins"] = machine_read.exact_pins("sglang")
    facts["runs"] = dead_runs(runs)
    facts["network"] = network("127.0.0.1" if recipe is None else recipe.launch.host)
    if recipe is not None:
        facts["checkpoint"] = checkpoint(recipe.model.path, recipe.model.revision)
        facts["data"] = data(recipe)
        missing = [d for d in facts["data"] if d["place"] is None] or facts["checkpoint"]["place"] is None
        if missing and not _offline():
            facts["network"] |= {"hub_error": reach(facts["network"]["hub"]), "hub_asked": True}
        engine = recipe.resources.engine
        if engine.foreign:
            facts["engine"] = environment(engine.python or sys.executable, families, engine.env)
    return machine.Machine.model_validate(facts).model_dump(mode="json")


# -- checkpoint and data -----------------------------------------------------------------------------------------------


def checkpoint(path: str, revision: str | None = None) -> dict[str, Any]:
    """What lies at model.path: config.json, shards, tensor headers, tokenizer. See `machine.CheckpointFacts`."""
    from astracli.data import fetch

    found: dict[str, Any] = {"path": path, "place": None}
    try:
        place = fetch.local_path(path) or cached(path, "models", revision)
        if place is None:
            return found
        found["place"] = str(place)
        found["config"] = read_config(place)
        found["tensors"] = headers(place)
    except UserError as error:
        found["problem"] = error.message
    if found["place"] is not None:
        found |= _beside(Path(found["place"]))
    return found


def headers(place: Path) -> dict[str, dict[str, Any]]:
    """`{tensor name: {"dtype", "shape"}}` from the headers of every shard. Raises UserError for a broken file."""
    found: dict[str, dict[str, Any]] = {}
    for file in sorted(place.glob("*.safetensors")):
        try:
            with file.open("rb") as stream:
                size = int.from_bytes(stream.read(8), "little")
                if not 0 < size <= file.stat().st_size - 8:
                    raise ValueError("its header does not fit the file")
                header = json.loads(stream.read(size))
            end = max((entry["data_offsets"][1] for key, entry in header.items() if key != "__metadata__"), default=0)
            if file.stat().st_size < 8 + size + end:
                raise ValueError(f"it ends after {file.stat().st_size} bytes of {8 + size + end}")
        except (ValueError, KeyError, OSError) as error:
            raise UserError(f"`{file}` is no whole safetensors file: {error}") from None
        for name, entry in header.items():
            if name != "__metadata__":
                found[name] = {"dtype": entry["dtype"], "shape": entry["shape"]}
    return found


def _beside(place: Path) -> dict[str, Any]:
    index = place / SHARD_INDEX
    shards: set[str] = set()
    if index.is_file():
        try:
            shards = set(json.loads(index.read_text())["weight_map"].values())
        except (ValueError, KeyError, AttributeError):
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


def data(recipe: Recipe) -> list[dict[str, Any]]:
    """Training problems and benchmarks of a recipe, each with where it lies. See `machine.DataSet`."""
    from astracli.config.benchmarks import get
    from astracli.data import benchmarks, datasets

    source, folder = recipe.data.source, recipe.data.path

    def find_train() -> Path | None:
        return datasets.find_local(source, folder)

    found: list[dict[str, Any]] = []
    if source == "arithmetic":
        found.append(_set(source, "train", None, "generated"))
    else:
        known = datasets.known_set(source)
        hub_id = known.hub_id if known else source if source.count("/") == 1 else None
        found.append(_lookup(source, "train", hub_id, recipe.data.revision, find_train))
    names = recipe.eval.benchmarks if recipe.eval.every else []
    for name in names:
        spec = get(name)
        if spec.hub is None:
            found.append(_set(name, "eval", None, "generated"))
        else:
            found.append(_lookup(name, "eval", spec.hub.hub_id, None, lambda spec=spec: benchmarks.local(spec, folder)))
    return found


def _lookup(name: str, use: str, hub_id: str | None, revision: str | None, local: Any) -> dict[str, Any]:
    try:
        place = local() or (cached(hub_id, "datasets", revision) if hub_id else None)
    except UserError as error:
        return _set(name, use, hub_id, None, error.message)
    problem = None if place or hub_id else f"no data set `{name}` is known, and it is no Hub id"
    return _set(name, use, hub_id, str(place) if place else None, problem)


def _set(name: str, use: str, hub_id: str | None, place: str | None, problem: str | None = None) -> dict[str, Any]:
    return {"name": name, "use": use, "hub_id": hub_id, "place": place, "problem": problem}


# -- network -----------------------------------------------------------------------------------------------------------


def network(host: str) -> dict[str, Any]:
    """Can a run listen on `host`, and which ports the system gives out. See `machine.Network`."""
    try:
        low, high = (int(word) for word in Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split())
        ports: list[int] | None = [low, high]
    except (OSError, ValueError):
        ports = None
    return {"hosts": {host: _bind(host)}, "ports": ports, "hub": os.environ.get("HF_ENDPOINT") or HUB}


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


def _offline() -> bool:
    return offline(os.environ)


def offline(env: Mapping[str, str | None]) -> bool:
    """HF_HUB_OFFLINE as huggingface_hub reads it."""
    return str(env.get("HF_HUB_OFFLINE") or "").upper() in ("1", "ON", "YES", "TRUE")


# -- the engine's own environment --------------------------------------------------------------------------------------

_ASK = """
import json, platform, sys
names, files = json.loads(sys.argv[1]), json.loads(sys.argv[2])
found = {name: package(name, module) for name, module in names.items()}
for name, folder in files.items():
    found[name]["models"] = model_files(found[name]["module"], folder, json.loads(sys.argv[3]))
found["sglang"]["pins"] = exact_pins("sglang")
print(json.dumps({"version": platform.python_version(), "libc": " ".join(platform.libc_ver()).strip() or None,
                  "packages": found, "torch_cuda": torch_cuda()}))
"""


def with_engine(facts: dict[str, Any], recipe: Recipe) -> dict[str, Any]:
    """The facts with the packages of the engine's own environment, where it has one and there is a GPU to serve on."""
    engine = recipe.resources.engine
    if engine.foreign and machine.visible_gpus(facts):
        facts["engine"] = environment(engine.python or sys.executable, [], engine.env)
    return facts


def environment(python: str, families: list[str], env: Mapping[str, str] | None = None) -> dict[str, Any]:
    """Packages as another interpreter sees them under `env`, asked of itself: it needs neither astracli nor psutil."""
    source = Path(machine_read.__file__).read_text() + _ASK
    arguments = [json.dumps(machine.PACKAGES), json.dumps(machine.MODEL_FILES), json.dumps(families)]
    try:
        done = subprocess.run(
            [python, "-c", source, *arguments], capture_output=True, text=True, timeout=ENGINE_TIMEOUT_S, cwd="/",
            env={**os.environ, **(env or {})},
        )  # fmt: skip
        if done.returncode != 0:
            last = (done.stderr.strip().splitlines() or [f"it exited {done.returncode}"])[-1]
            return {"executable": python, "error": last[:300]}
        return {"executable": python, "error": None} | json.loads(done.stdout)
    except subprocess.TimeoutExpired:
        return {"executable": python, "error": f"no answer in {ENGINE_TIMEOUT_S:.0f} s"}
    except OSError as error:
        return {"executable": python, "error": (error.strerror or str(error)).lower()}
    except ValueError:
        return {"executable": python, "error": "its answer is not JSON"}


# -- what dead runs left -----------------------------------------------------------------------------------------------


def dead_runs(root: Path) -> list[dict[str, Any]]:
    """Runs under `root` that say `running` without a supervisor, and what is left of them. See `machine.RunLeft`."""
    found = []
    for run in run_view.dead(root):
        status = run.status()
        found.append(
            {
                "path": str(run.path),
                "step": status.step if status else 0,
                "bytes": run_view.clean(run, dry_run=True),
                "processes": {str(pid): module for pid, module in run_view.leftovers(run)},
            }
        )
    return found
