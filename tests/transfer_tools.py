"""Versions of a small model, and a real HTTP server of a weights directory that can be told to misbehave."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Mount

from astracli.weights.format.digest import digest_tensor
from astracli.weights.publish.publisher import Publisher, PublishResult
from astracli.weights.publish.server import weights_app
from astracli.weights.receive.subscriber import Subscriber

Weights = dict[str, torch.Tensor]
TOKEN = "s3cret"
FULL = ("manifest.full.json", "full-00000.safetensors")


def first_weights(seed: int = 0) -> Weights:
    draw = torch.Generator().manual_seed(seed)
    return {
        "model.embed_tokens.weight": torch.randn(64, 32, generator=draw).bfloat16(),
        "model.layers.0.linear_attn.A_log": torch.randn(8, generator=draw),
        "model.layers.0.linear_attn.conv1d.weight": torch.randn(24, 1, 4, generator=draw).bfloat16(),
        "model.layers.0.mlp.up_proj.weight": torch.randn(48, 32, generator=draw).bfloat16(),
        "model.norm.weight": torch.ones(32).bfloat16(),
    }


def step(weights: Weights, seed: int) -> Weights:
    """A later version: a few per cent of each matrix, all of A_log, nothing of the norm."""
    draw = torch.Generator().manual_seed(1000 + seed)
    changed = {}
    for name, tensor in weights.items():
        if "norm" in name:
            changed[name] = tensor.clone()
            continue
        mask = torch.rand(tensor.shape, generator=draw) < (1.0 if tensor.dtype == torch.float32 else 0.05)
        changed[name] = torch.where(mask, tensor * 1.01, tensor)
    return changed


def chain(count: int) -> list[Weights]:
    found = [first_weights()]
    while len(found) < count:
        found.append(step(found[-1], len(found)))
    return found


def same_files(one: Path, two: Path, pattern: str = "*.*") -> int:
    """How many files of `one` are, byte for byte, those of `two`; it is an error if any is not."""
    names = sorted(path.relative_to(one) for path in one.rglob(pattern))
    for name in names:
        assert (one / name).read_bytes() == (two / name).read_bytes(), name
    return len(names)


def same(one: Weights, two: Weights) -> bool:
    return one.keys() == two.keys() and all(digest_tensor(one[n]) == digest_tensor(two[n]) for n in one)


def copies(weights: Weights) -> Weights:
    return {name: tensor.clone() for name, tensor in weights.items()}


class Server:
    """A uvicorn server of a weights directory that asks for the token, and can be told to misbehave."""

    def __init__(self, directory: Path):
        self.requests: list[tuple[str, str]] = []
        self.sent: list[int] = []
        """Bytes of each answer that its connection has taken, in the order of `requests`."""
        self.cut_after: int | None = None
        app = Starlette(routes=[Mount("/weights", weights_app(directory))])

        async def guarded(scope: Any, receive: Any, send: Any) -> None:
            if scope["type"] != "http":
                return await app(scope, receive, send)
            request = Request(scope)
            self.requests.append((request.url.path, request.headers.get("range", "")))
            number = len(self.sent)
            self.sent.append(0)
            if request.headers.get("authorization") != f"Bearer {TOKEN}":
                refusal: Response = JSONResponse({}, status_code=401)
                return await refusal(scope, receive, send)
            budget = self.cut_after if "safetensors" in request.url.path else None

            async def counted(message: Any) -> None:
                if message["type"] == "http.response.body" and budget is not None:
                    message = {**message, "body": message.get("body", b"")[: budget - self.sent[number]]}
                    await send({**message, "more_body": True})
                else:
                    await send(message)
                self.sent[number] += len(message.get("body", b""))
                if budget is not None and self.sent[number] >= budget:
                    raise ConnectionError("cut")

            return await app(scope, receive, counted)

        self.socket = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self.socket.getsockname()[1]}"
        self.server = uvicorn.Server(uvicorn.Config(guarded, log_level="critical", lifespan="off"))
        self.thread = threading.Thread(target=self.server.run, kwargs={"sockets": [self.socket]}, daemon=True)
        self.thread.start()
        while not self.server.started:
            time.sleep(0.005)

    def nonce(self) -> bytes:
        """What its listing says."""
        reply = httpx.get(f"{self.url}/weights/", headers={"Authorization": f"Bearer {TOKEN}"}, trust_env=False)
        return str(reply.json()["store"]["nonce"]).encode()

    def stop(self) -> None:
        self.server.should_exit = True
        self.thread.join(10)
        self.socket.close()


def subscriber(server: Server, tmp_path: Path, name: str = "stage", **options: Any) -> Subscriber:
    return Subscriber(server.url, TOKEN, tmp_path / name, **{"wait_s": 5.0, **options})


def publish(directory: Path, versions: list[Weights], **options: Any) -> list[PublishResult]:
    publisher = Publisher(directory, model_name="tiny", **options)
    results = [publisher.publish(version, weights) for version, weights in enumerate(versions)]
    publisher.close()
    return results


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    """Of the folder `weights`."""
    (tmp_path / "weights").mkdir()
    found = Server(tmp_path / "weights")
    yield found
    found.stop()
