"""Stands in for SGLang in tests: the part of its HTTP interface that we use, over a model with fused parameters.

FAKE_SGLANG says how it misbehaves, then without a model: `oom` (dies while loading), `kernel` (a package that does not
load), `mute` (never ready), `late` and `cuda` (dies a moment after it was ready, with a NaN or a CUDA error), `quiet`
(dies without a word), `compiler` (dies compiling its sampling kernels), `answers` and `idle` (not at all).
"""

import argparse
import importlib
import json
import os
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

PREFIX = "model.layers.0."
LAST_LINES = {
    "late": "RuntimeError: probability tensor contains either `inf`, `nan` or element < 0",
    "cuda": "torch.AcceleratorError: CUDA error: an illegal memory access was encountered",
}


def fused_model():
    """q, k and v in one parameter; `load_weights` collects all it is given before it loads, as SGLang's text models
    do, and skips names that it does not know."""
    import torch  # seconds, which a server that dies need not spend

    class FusedModel(torch.nn.Module):
        def __init__(self):
            super().__init__()
            draw = torch.Generator().manual_seed(7)
            self.embed = torch.nn.Parameter(torch.randn(32, 8, generator=draw).bfloat16())
            self.qkv = torch.nn.Parameter(torch.randn(24, 8, generator=draw).bfloat16())
            self.a_log = torch.nn.Parameter(torch.randn(4, generator=draw))

        def load_weights(self, weights):
            rows = {"q_proj": (0, 16), "k_proj": (16, 4), "v_proj": (20, 4)}
            for name, loaded in list(weights):
                part = next((span for key, span in rows.items() if key in name), None)
                if part:
                    self.qkv.data.narrow(0, *part).copy_(loaded)
                elif name == "model.embed_tokens.weight":
                    self.embed.data.copy_(loaded)
                elif name == PREFIX + "linear_attn.A_log":
                    self.a_log.data.copy_(loaded)

    return FusedModel()


def arguments():
    parser = argparse.ArgumentParser()
    parser.add_argument("--config")
    for name in ("model-path", "host", "port", "load-format", "weight-version"):
        parser.add_argument(f"--{name}", required=True)
    parser.add_argument("--custom-weight-loader", nargs="*", required=True)
    known, rest = parser.parse_known_args()
    known.api_key = json.loads(Path(known.config).read_text())["api-key"]
    assert known.api_key not in sys.argv
    return known, rest


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        if self.path.startswith("/health"):
            return self.answer(503 if os.environ.get("FAKE_SGLANG") == "mute" else 200, {})
        return self.answer(200, {"weight_version": self.server.version}) if self.allowed() else None

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if not self.allowed():
            return None
        server = self.server
        if self.path == "/update_weights_from_tensor":
            assert body["load_format"] in server.options.custom_weight_loader
            module, _, name = body["load_format"].rpartition(".")
            import torch

            with server.lock, torch.inference_mode():
                getattr(importlib.import_module(module), name)(server.model, [])
            server.version = body.get("weight_version") or server.version
            return self.answer(200, {"success": True, "message": "Success"})
        if self.path == "/update_weight_version":
            server.version = body["new_version"]
            return self.answer(200, {"success": True})
        rids = body.get("rid") or ["r"] * len(body.get("input_ids", ()))
        first = self.path == "/generate" and rids[0].startswith("first-")
        if first:
            print("first requests:", json.dumps(body["sampling_params"]), flush=True)
            if os.environ.get("FAKE_SGLANG") == "compiler":
                print("RuntimeError: Ninja build failed. nvcc: not found", flush=True)
                os._exit(1)
        if self.path == "/generate" and server.version == "-2" and not first:
            return self.answer(400, {"error": {"message": f"Request {rids[0]} was aborted"}})
        if self.path == "/generate":
            one = {"weight_version": server.version, "finish_reason": {"type": "length"}}
            made = [
                {"output_ids": [5], "meta_info": {**one, "id": rid, "output_token_logprobs": [[-0.5, 5, None]]}}
                for rid in rids
            ]
            return self.answer(200, made)
        return self.answer(200, {})

    def allowed(self):
        if self.headers["Authorization"] == f"Bearer {self.server.options.api_key}":
            return True
        self.answer(401, {"error": "Unauthorized"})
        return False

    def answer(self, status, document):
        content = json.dumps(document).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_):
        pass


def main():
    options, rest = arguments()
    mode = os.environ.get("FAKE_SGLANG")
    print(f"server_args=ServerArgs(api_key='{options.api_key}', rest={rest})", flush=True)
    if mode == "oom":
        sys.exit("torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 7.83 GiB")
    if mode == "kernel":
        raise ImportError("/site/sgl_kernel/common_ops.abi3.so: undefined symbol: _ZN3c104cuda9SetDeviceEa")
    if mode == "quiet":
        os._exit(7)
    server = ThreadingHTTPServer((options.host, int(options.port)), Handler)
    server.daemon_threads = True
    server.options, server.version, server.lock = options, options.weight_version, threading.Lock()
    server.model = None if mode else fused_model()
    if mode in LAST_LINES:

        def die():
            time.sleep(1.5)
            print(LAST_LINES[mode], flush=True)
            os._exit(1)

        threading.Thread(target=die, daemon=True).start()
    server.serve_forever(poll_interval=0.02)


if __name__ == "__main__":
    main()
