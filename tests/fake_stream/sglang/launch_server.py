"""Stands in for SGLang where a script streams and pauses: a transformers model that is loaded by name, and made-up
tokens at a fixed rate, five milliseconds each, none while generation is paused. Like SGLang it ends when it is told to
empty its cache while requests are there. A log-probability is -1 - version, and 0.25 more in a request that began under
another version and was kept in place."""

import argparse
import asyncio
import importlib
import json
import os

import torch
import uvicorn
from starlette.applications import Starlette
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from transformers import AutoConfig, AutoModelForCausalLM


class Model(torch.nn.Module):
    def __init__(self, path):
        super().__init__()
        self.inner = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(path), dtype=torch.bfloat16)

    def load_weights(self, weights):
        held = dict(self.inner.named_parameters())
        for name, loaded in weights:
            if held[name].dtype != loaded.dtype:
                held[name].data = held[name].data.to(loaded.dtype)
            held[name].data.copy_(loaded)


def main():
    parser = argparse.ArgumentParser()
    for name in ("model-path", "host", "port", "api-key"):
        parser.add_argument(f"--{name}", required=True)
    parser.add_argument("--custom-weight-loader", nargs="*", required=True)
    options, _ = parser.parse_known_args()
    model, state = Model(options.model_path), {"aborts": 0, "open": 0, "version": 0, "mode": ""}
    going = asyncio.Event()
    going.set()

    async def generate(request):
        body, aborts, begun = await request.json(), state["aborts"], state["version"]
        if not body.get("stream"):
            entries = [[-1.0 - state["version"], token, None] for token in body["input_ids"]]
            return JSONResponse({"meta_info": {"input_token_logprobs": entries[body["logprob_start_len"] :]}})

        async def tokens():
            state["open"] += 1
            drawn, logprobs = [], []
            most = body["sampling_params"]["max_new_tokens"]
            for count in range(1, most + 1):
                await asyncio.sleep(0.005)
                await going.wait()
                stale = state["mode"] == "in_place" and begun != state["version"]
                drawn.append(count % 9)
                logprobs.append([-1.0 - state["version"] + 0.25 * stale, drawn[-1], None])
                ended = "abort" if state["aborts"] != aborts else "length" if count == most else None
                meta = {"completion_tokens": count, "finish_reason": {"type": ended} if ended else None}
                if body.get("return_logprob"):
                    meta["output_token_logprobs"] = logprobs
                yield f"data: {json.dumps({'output_ids': drawn, 'meta_info': meta})}\n\n"
                if ended:
                    break
            state["open"] -= 1
            yield "data: [DONE]\n\n"

        return StreamingResponse(tokens(), media_type="text/event-stream")

    async def update(request):
        body = await request.json()
        module, _, name = body["load_format"].rpartition(".")
        assert body["load_format"] in options.custom_weight_loader and not going.is_set()
        if body["flush_cache"] and state["open"]:
            os._exit(1)
        with torch.inference_mode():
            getattr(importlib.import_module(module), name)(model, [])
        return JSONResponse({"success": True, "message": "Success"})

    async def control(request):
        if request.headers["authorization"] != f"Bearer {options.api_key}":
            return Response(status_code=401)
        if request.url.path == "/pause_generation":
            state["mode"] = (await request.json())["mode"]
            going.clear()
        elif request.url.path == "/update_weight_version":
            body = await request.json()
            state["aborts"] += body.get("abort_all_requests", True)
            state["version"] = int(body["new_version"])
        elif request.url.path == "/continue_generation":
            going.set()
        elif request.url.path == "/abort_request":
            state["aborts"] += 1
        return JSONResponse({"success": True})

    paths = ["pause_generation", "continue_generation", "abort_request", "flush_cache", "update_weight_version"]
    routes = [Route(f"/{path}", control, methods=["POST"]) for path in paths]
    routes += [Route("/generate", generate, methods=["POST"]), Route("/health_generate", control)]
    routes += [Route("/update_weights_from_tensor", update, methods=["POST"])]
    where = {"host": options.host, "port": int(options.port)}
    uvicorn.run(Starlette(routes=routes), **where, log_level="warning", timeout_graceful_shutdown=1)


main()
