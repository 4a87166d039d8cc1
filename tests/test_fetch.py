"""Fetching models and data from a stand-in Hub over real sockets; every refusal is one message with exit code 2."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from astracli.data.fetch import fetch_model, local_path
from astracli.errors import UserError
from astracli.process.ports import bind, free_ports

COMMITS = {"main": "a" * 40, "v2": "b" * 40}
FILES = {
    "model.safetensors": b"weights",
    "config.json": b'{"model_type": "qwen3_5_text"}',
    "tokenizer.json": b"{}",
    "chat_template.jinja": b"{{ x }}",
    "original/params.json": b"{}",
    "pytorch_model.bin": b"pickle",
    "README.md": b"# hello",
}
DATA = {"train.jsonl": b'{"problem": "1+1", "answer": "2"}\n', "figure.png": b"png"}
REPOSITORIES: dict[str, dict[str, bytes]] = {
    "models/org/tiny": FILES,
    "models/org/pickled": {"config.json": FILES["config.json"], "pytorch_model.bin": b"pickle"},
    "models/org/gated": FILES,
    "datasets/org/sums": DATA,
}
GATED_TOKEN = "hf_allowed"


def stand_in_hub() -> Any:
    """As much of the Hub's HTTP interface as `huggingface_hub` asks for. Only `gated` wants a token."""
    from starlette.applications import Starlette
    from starlette.requests import Request
    from starlette.responses import JSONResponse, Response
    from starlette.routing import Route

    def refused(key: str, revision: str, request: Request) -> Response | None:
        if key not in REPOSITORIES:
            return JSONResponse({"error": "no"}, 404, {"X-Error-Code": "RepoNotFound"})
        if key.endswith("/gated") and request.headers.get("Authorization") != f"Bearer {GATED_TOKEN}":
            return JSONResponse({"error": "gated"}, 401, {"X-Error-Code": "GatedRepo", "X-Error-Message": "accept it"})
        if revision not in [*COMMITS, *COMMITS.values()]:
            return JSONResponse({"error": "no"}, 404, {"X-Error-Code": "RevisionNotFound"})
        return None

    def commit(revision: str) -> str:
        return COMMITS.get(revision, revision)

    def info(request: Request) -> Response:
        p = request.path_params
        key = f"{p['kind']}/{p['owner']}/{p['name']}"
        siblings = [{"rfilename": name} for name in REPOSITORIES.get(key, {})]
        document = {"id": f"{p['owner']}/{p['name']}", "sha": commit(p["revision"]), "siblings": siblings, "tags": []}
        return refused(key, p["revision"], request) or JSONResponse(document)

    def tree(request: Request) -> Response:
        p = request.path_params
        key = f"{p['kind']}/{p['owner']}/{p['name']}"
        entries = [
            {"type": "file", "path": name, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
            for name, content in REPOSITORIES.get(key, {}).items()
        ]
        return refused(key, p["revision"], request) or JSONResponse(entries)

    def resolve(request: Request) -> Response:
        p = request.path_params
        key = f"{p.get('kind', 'models')}/{p['owner']}/{p['name']}"
        no = refused(key, p["revision"], request)
        if no:
            return no
        content = REPOSITORIES[key].get(p["file"])
        if content is None:
            return JSONResponse({"error": "no"}, 404, {"X-Error-Code": "EntryNotFound"})
        headers = {
            "ETag": f'"{hashlib.sha1(content).hexdigest()}"',
            "X-Repo-Commit": commit(p["revision"]),
            "Accept-Ranges": "bytes",
        }
        served.append(f"{request.method} {key} {p['file']}")
        return Response(content, headers=headers)

    served: list[str] = []
    repository = "{owner}/{name}"
    app = Starlette(
        routes=[
            Route("/api/{kind}/" + repository + "/revision/{revision:path}", info),
            Route("/api/{kind}/" + repository + "/tree/{revision}", tree),
            Route("/{kind}/" + repository + "/resolve/{revision}/{file:path}", resolve, methods=["GET", "HEAD"]),
            Route("/" + repository + "/resolve/{revision}/{file:path}", resolve, methods=["GET", "HEAD"]),
        ]
    )
    app.state.served = served
    return app


@pytest.fixture(scope="module")
def hub() -> Iterator[tuple[str, list[str]]]:
    """(URL, what was served) of a stand-in Hub."""
    import uvicorn

    app = stand_in_hub()
    sock = bind()
    server = uvicorn.Server(uvicorn.Config(app, log_level="error", lifespan="off"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [sock]}, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    yield f"http://127.0.0.1:{sock.getsockname()[1]}", app.state.served
    server.should_exit = True
    thread.join(timeout=5)


SCRIPT = """
import json, sys
from astracli.errors import AstraError
from astracli.data import fetch
call, *args = sys.argv[1:]
try:
    out = getattr(fetch, call)(*args)
    print(json.dumps(out if isinstance(out, dict) else str(out)))
except AstraError as error:
    print(json.dumps({"message": error.message, "hint": error.hint}))
    sys.exit(error.exit_code)
assert "torch" not in sys.modules and "transformers" not in sys.modules
"""


def run(home: Path, endpoint: str, call: str, *args: str, **env: str) -> tuple[int, Any, str]:
    """-> (exit code, what it printed, stderr) of one call in a fresh process: the library reads its settings once."""
    clean = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "HUGGING"))}
    settings = {"HF_HOME": str(home), "HF_ENDPOINT": endpoint, "HF_HUB_DOWNLOAD_TIMEOUT": "2", "NO_PROXY": "*"}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, call, *args],
        env=clean | settings | env, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.stdout, done.stderr
    return done.returncode, json.loads(done.stdout), done.stderr


def test_model_comes_once_with_what_is_needed_and_no_more(hub: tuple[str, list[str]], tmp_path: Path) -> None:
    url, served = hub
    code, folder, console = run(tmp_path, url, "fetch_model", "org/tiny")
    assert code == 0
    names = sorted(str(p.relative_to(folder)) for p in Path(folder).rglob("*") if p.is_file())
    assert names == ["chat_template.jinja", "config.json", "model.safetensors", "tokenizer.json"]
    assert (Path(folder) / "model.safetensors").read_bytes() == b"weights"
    assert COMMITS["main"] in folder
    assert console.startswith("fetching model org/tiny\nfetched model org/tiny in ")
    before = len(served)
    code, again, _ = run(tmp_path, url, "fetch_model", "org/tiny")
    assert (code, again) == (0, folder) and len(served) == before
    assert run(tmp_path, url, "fetch_model", "org/tiny", HF_HUB_OFFLINE="1")[:2] == (0, folder)
    (closed,) = free_ports(1)
    assert run(tmp_path, f"http://127.0.0.1:{closed}", "fetch_model", "org/tiny")[:2] == (0, folder)


def test_revision_is_honoured(hub: tuple[str, list[str]], tmp_path: Path) -> None:
    code, folder, _ = run(tmp_path, hub[0], "fetch_model", "org/tiny", "v2")
    assert code == 0 and COMMITS["v2"] in folder
    code, answer, _ = run(tmp_path, hub[0], "fetch_model", "org/tiny", "v9")
    assert (code, answer["message"]) == (2, "model `org/tiny` has no revision `v9`")


def test_config_comes_without_the_weights(hub: tuple[str, list[str]], tmp_path: Path) -> None:
    url, served = hub
    before = len(served)
    assert run(tmp_path, url, "fetch_config", "org/tiny")[:2] == (0, {"model_type": "qwen3_5_text"})
    assert served[before:] and all(line.endswith("config.json") for line in served[before:])


def test_data_set(hub: tuple[str, list[str]], tmp_path: Path) -> None:
    code, folder, _ = run(tmp_path, hub[0], "fetch_dataset", "org/sums")
    assert code == 0 and [p.name for p in Path(folder).iterdir()] == ["train.jsonl"]
    code, answer, _ = run(tmp_path, hub[0], "fetch_dataset", "org/none")
    assert code == 2 and answer["message"].startswith("no dataset `org/none` at http://127.0.0.1")


@pytest.mark.parametrize("call", ["fetch_model", "fetch_config"])
def test_gated_model(hub: tuple[str, list[str]], tmp_path: Path, call: str) -> None:
    code, answer, console = run(tmp_path, hub[0], call, "org/gated")
    assert code == 2 and answer["message"] == "model `org/gated` is gated and this account may not read it"
    assert answer["hint"].startswith(f"accept its licence at {hub[0]}/org/gated, then `hf auth login`")
    assert "Traceback" not in console
    assert run(tmp_path, hub[0], call, "org/gated", HF_TOKEN=GATED_TOKEN)[0] == 0


@pytest.mark.parametrize("call", ["fetch_model", "fetch_config"])
def test_missing_model(hub: tuple[str, list[str]], tmp_path: Path, call: str) -> None:
    code, answer, _ = run(tmp_path, hub[0], call, "org/none")
    assert code == 2 and answer["message"] == f"no model `org/none` at {hub[0]} that this account can see"
    assert "check the name" in answer["hint"]


@pytest.mark.parametrize("call", ["fetch_model", "fetch_config"])
def test_unreachable_hub_and_offline(tmp_path: Path, call: str) -> None:
    (closed,) = free_ports(1)
    url = f"http://127.0.0.1:{closed}"
    code, answer, _ = run(tmp_path, url, call, "org/tiny")
    assert code == 2 and answer["message"].startswith(
        f"model `org/tiny` is not on this machine, and {url} cannot be reached: "
    )
    assert "local path" in answer["hint"]
    code, answer, _ = run(tmp_path, url, call, "org/tiny", HF_HUB_OFFLINE="1")
    assert code == 2 and answer["message"] == "model `org/tiny` is not in the local cache and HF_HUB_OFFLINE is set"
    assert answer["hint"].startswith("unset HF_HUB_OFFLINE")


def test_model_without_safetensors(hub: tuple[str, list[str]], tmp_path: Path) -> None:
    code, answer, _ = run(tmp_path, hub[0], "fetch_model", "org/pickled")
    assert code == 2 and answer["message"].startswith("no *.safetensors in ")


def test_local_paths(tmp_path: Path) -> None:
    assert local_path("Qwen/Qwen3.5-4B") is None
    for path in ("./nowhere", "/nowhere", "~/nowhere-at-all", "a/b/c", "with space"):
        with pytest.raises(UserError, match="nothing at that path"):
            local_path(path)
    with pytest.raises(UserError, match="`astra:huge`: no such model in this package"):
        local_path("astra:huge")
    with pytest.raises(UserError, match=r"no config\.json"):
        fetch_model(str(tmp_path))
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(b"")
    assert fetch_model(str(tmp_path)) == tmp_path


def test_a_run_in_the_place_of_a_checkpoint_is_told_where_its_model_is(tmp_path: Path) -> None:
    (tmp_path / "export").mkdir()
    (tmp_path / "export" / "config.json").write_text("{}")
    with pytest.raises(UserError, match=r"no config\.json") as caught:
        fetch_model(str(tmp_path))
    assert caught.value.hint == f"what that run trained is `{tmp_path / 'export'}`"
