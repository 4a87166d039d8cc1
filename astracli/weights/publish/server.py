"""Published versions over HTTP, read only. Whoever mounts it has checked the run's token before a request comes here.

GET /weights                    {"versions": [..], "latest": v, "detail": {version: {kind: what STABLE says of it}},
                                 "store": {"directory", "nonce"}}: whoever finds that nonce there may link its files
GET /weights/{version}/{file}   a file that STABLE lists, or STABLE; `Range` is honoured (206, 416)
"""

from __future__ import annotations

import secrets
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

from astracli.process.atomic import write_atomic
from astracli.weights import WeightCorrupt
from astracli.weights.format.manifest import NONCE, STABLE, read_stable, version_name, versions_in

if TYPE_CHECKING:
    from starlette.applications import Starlette


def listing(directory: Path) -> dict[str, Any]:
    """Every STABLE version, with the payload bytes of each kind."""
    detail: dict[str, Any] = {}
    for version in versions_in(directory):
        try:
            detail[str(version)] = read_stable(directory, version)["manifests"]
        except (FileNotFoundError, WeightCorrupt):  # pruned a moment ago, or damaged: not there for a receiver
            continue
    versions = [int(v) for v in detail]
    return {"versions": versions, "latest": max(versions, default=None), "detail": detail}


def servable(directory: Path, version: int, name: str) -> Path | None:
    """The path of a listed file; None for anything else, whatever it is called."""
    try:
        files = read_stable(directory, version)["files"]
    except (FileNotFoundError, NotADirectoryError, WeightCorrupt):
        return None
    if name != STABLE and name not in files:
        return None
    path = directory / version_name(version) / name
    return path if path.is_file() else None


def weights_app(directory: Path) -> Starlette:
    """An app to be mounted under `/weights`."""
    from starlette.applications import Starlette
    from starlette.requests import Request
    from starlette.responses import FileResponse, JSONResponse, Response
    from starlette.routing import Route

    class Payload(FileResponse):
        chunk_size = 1 << 22  # a smaller one is copied about: 1 MiB took twice the server's time, 256 KiB three times

    store = {"directory": str(directory.resolve()), "nonce": secrets.token_hex(16)}
    written: list[str] = []
    writing = threading.Lock()  # requests are answered in threads

    def index(request: Request) -> Response:
        with writing:
            if not written and directory.is_dir():
                write_atomic(directory / NONCE, store["nonce"].encode())
                written.append(NONCE)
        return JSONResponse(listing(directory) | {"store": store})

    def file(request: Request) -> Response:
        version, name = request.path_params["version"], request.path_params["file"]
        path = servable(directory, version, name)
        if path is None:
            return JSONResponse({"error": f"version {version} has no file `{name}`"}, status_code=404)
        return Payload(path, media_type="application/octet-stream")

    return Starlette(routes=[Route("/", index), Route("/{version:int}/{file:str}", file)])
