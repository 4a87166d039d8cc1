"""A published version inside a real SGLang: staged, applied by our loader, read back, compared with the trainer.

    python bench/gpu_sglang_delta.py [--model astra:tiny | --shape 4b] [--versions 6] [--running 32]

Starts one SGLang server on the first GPU with our custom weight loader, publishes version 0 in full and then deltas of
an Adam-like update, diffed and coded on the GPU, and brings each into the server while `--running` requests decode:
stage (the server decodes and loads it while it generates), abort, pause, apply (digests of every resulting
tensor inside the pause), continue, and for every second version a read-back under HF names beside generation. Prints
per version a line of JSON, and at the end medians:

    density, changed, bytes, full_bytes     of the version
    publish_s (digest_s, diff_s, encode_s)  by the publisher; diff and coding of all threads
    stage_s                                 until the server had it decoded and on the device
    pause_ms                                pause sent to continue answered, split: pause, call, continue; and what the
                                            loader spent inside the call: load (0 when staged), apply, digest
    abort_ms                                ending all requests, before the pause
    readback_s                              after the pause, while the server generates
    recovery_s                              until tokens/s is at 95 % of the second before abort or pause (--recovery)
    parity_*                                |server - transformers| log-probabilities, with a loadable --model

Everything it starts, it stops.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from meter import Batch, Meter

from astracli import registry
from astracli.adapter import read_config
from astracli.engines.client import UNPROVEN, EngineClient, GenRequest
from astracli.hub.api import serve
from astracli.launch import fetch, ports
from astracli.training.optimizer import DTYPES
from astracli.weights.publisher import Publisher
from astracli.weights.server import weights_routes
from astracli.weights.subscriber import Subscriber

TOKEN = "bench-token"
SHAPE_4B = {
    "hidden_size": 2560, "intermediate_size": 9216, "num_hidden_layers": 32, "num_attention_heads": 16,
    "num_key_value_heads": 4, "head_dim": 256, "linear_num_key_heads": 16, "linear_num_value_heads": 32,
    "linear_key_head_dim": 128, "linear_value_head_dim": 128, "vocab_size": 248320, "tie_word_embeddings": True,
}  # fmt: skip


def model_directory(args: argparse.Namespace, folder: Path) -> tuple[Path, Any]:
    """(what to serve, the model): a given checkpoint, or random weights of the 4B shape, of which only the config is
    written: the server gets them as version 0."""
    out = folder / "model"
    if args.shape is None:
        found = fetch.local_path(args.model)
        if found is None:
            sys.exit(f"no local checkpoint `{args.model}`")
        shutil.copytree(found, out)
        return out, adapter_of(out).load_for_training(out, attention="sdpa")
    from transformers import Qwen3_5ForCausalLM, Qwen3_5TextConfig

    torch.manual_seed(0)
    config = Qwen3_5TextConfig(**SHAPE_4B, eos_token_id=1, pad_token_id=0)
    config.architectures = ["Qwen3_5ForCausalLM"]
    with torch.device("cuda"):
        model = Qwen3_5ForCausalLM(config).to(torch.bfloat16)
    out.mkdir()
    (out / "config.json").write_text(json.dumps(config.to_dict() | {"full_attention_interval": 4, "dtype": "bfloat16"}))
    return out, model


def adapter_of(directory: Path) -> Any:
    kind = read_config(directory)["model_type"]
    return next(a for item in registry.installed() if (a := item.adapter) and kind in a.model_types)


class Server:
    """One SGLang process in its own session."""

    def __init__(self, args: argparse.Namespace, model: Path, stage: Path, log: Path):
        with ports.bind("127.0.0.1") as probe:
            port = probe.getsockname()[1]
        graphs = ["--cuda-graph-bs-decode", "1", str(args.running)]
        command = [
            args.sglang_python, "-m", "sglang.launch_server", "--model-path", str(model), "--skip-tokenizer-init",
            "--host", "127.0.0.1", "--port", str(port), "--api-key", TOKEN, "--attention-backend", "triton",
            "--disable-radix-cache", "--disable-prefill-cuda-graph", *graphs, "--max-running-requests",
            str(max(2, args.running)), "--mem-fraction-static", "0.5", "--context-length", str(args.context),
            "--custom-weight-loader", "astracli.weights.sglang_loader.apply_staged", "--load-format", "dummy",
            "--weight-version=-1",
            *(["--stream-interval", "8"] if args.recovery else []),
        ]  # fmt: skip
        env = os.environ | {
            "ASTRA_STAGE_DIR": str(stage),
            "ASTRA_START_VERSION": "",  # weights made up by the server: version 0 reaches it in full
            "ASTRA_VERIFY_INTERVAL": "2",
            "SGLANG_RETURN_ORIGINAL_LOGPROB": "1",
        }
        self.log = log
        self.url = f"http://127.0.0.1:{port}"
        with log.open("w") as out:
            self.process = subprocess.Popen(
                command, env=env, stdout=out, stderr=subprocess.STDOUT, start_new_session=True
            )

    def stop(self) -> None:
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGTERM)
            try:
                self.process.wait(20)
            except subprocess.TimeoutExpired:
                os.killpg(self.process.pid, signal.SIGKILL)
                self.process.wait()


def wire(model: Any, adapter: Any, device: str) -> dict[str, torch.Tensor]:
    """HF name -> fp32 master on `device`, and the dtype it travels in as an attribute of the mapping's tensor."""
    parameters = dict(model.named_parameters())
    return {t.name: parameters[name].detach().float().to(device) for name, t in adapter.wire_tensors(model).items()}


@torch.no_grad()
def adam_like(masters: dict[str, torch.Tensor], lr: float, draw: torch.Generator) -> None:
    """What an Adam step does to masters when gradients are noise: about lr in each direction."""
    for tensor in masters.values():
        noise = torch.randn(tensor.shape, generator=draw, device=tensor.device)
        tensor.add_(noise.clamp_(-2, 2), alpha=-lr)


async def wait_ready(client: EngineClient, server: Server, timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    while not await client.health():
        if server.process.poll() is not None or time.monotonic() > deadline:
            sys.exit("SGLang did not become ready; its last lines:\n" + server.log.read_text()[-3000:])
        await asyncio.sleep(1.0)


async def update(
    client: EngineClient, subscriber: Subscriber, version: int, args: argparse.Namespace
) -> dict[str, Any]:
    """One version into the server while requests run. The pause is pause sent to continue answered."""
    metered = args.recovery and args.running
    load = (
        Meter(client.url, TOKEN, args.running, args.context - 100)
        if metered
        else Batch(client, f"v{version}", args.running, args.context - 100)
    )
    async with load:
        await asyncio.sleep(args.warm_s)
        plan = await asyncio.to_thread(subscriber.fetch, version, version - 1 if version else None)
        times = [time.monotonic()]
        if args.mode == "abort":
            await load.drain(client.abort_all)
        times.append(time.monotonic())
        await client.pause(args.mode)
        times.append(time.monotonic())
        answer = await client.apply_staged(version, flush=args.mode != "in_place")
        times.append(time.monotonic())
        await client.resume()
        times.append(time.monotonic())
        load.resume()
        if not answer.success:
            sys.exit(f"version {version} was not applied: {answer.message}")
        result = subscriber.outcome(version)
        felt = await load.recovery(times[0], times[-1]) if isinstance(load, Meter) else {}
        readback_s = await asyncio.to_thread(subscriber.proof, version) if result.get("proof") else None
    abort_ms, pause_ms, call_ms, continue_ms = (1000 * (b - a) for a, b in itertools.pairwise(times))
    return {
        "kind": plan.kind, "bytes": plan.bytes, "changed": result["changed"], "transfer_s": plan.transfer_s,
        "stage_s": plan.stage_s, "decode_s": result["decode_s"], "load_s": result["load_s"],
        "abort_ms": abort_ms, "pause_ms": pause_ms + call_ms + continue_ms,
        "split_ms": {
            "pause": pause_ms, "call": call_ms, "apply": 1000 * result["apply_s"], "digest": 1000 * result["verify_s"],
            "record": 1000 * result.get("record_s", 0.0), "loader": 1000 * result.get("loader_s", 0.0),
            "continue": continue_ms,
        },
        "readback_s": readback_s, **felt,
    }  # fmt: skip


@torch.no_grad()
def transformers_logprobs(model: Any, prompt: list[int], tokens: list[int]) -> torch.Tensor:
    ids = torch.tensor([prompt + tokens], device=model.device)
    logits = model(input_ids=ids).logits[0, len(prompt) - 1 : -1].float()
    return logits.log_softmax(-1).gather(1, ids[0, len(prompt) :, None])[:, 0].cpu()


async def drive(args: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    directory, model = model_directory(args, folder)
    stage = folder / "stage"
    stage.mkdir()
    adapter = adapter_of(directory)
    server = Server(args, directory, stage, folder / "sglang.log")
    try:
        dtypes = {t.name: DTYPES[t.dtype] for t in adapter.wire_tensors(model).values()}
        masters = wire(model, adapter, "cuda")
        threads = min(16, os.cpu_count() or 1)
        publisher = Publisher(
            folder / "weights", transfer="delta", full_interval=1000, keep=4, model_name="bench", threads=threads
        )
        from starlette.applications import Starlette

        files = serve(Starlette(routes=weights_routes(folder / "weights")), ports.bind("127.0.0.1")).start()
        subscriber = Subscriber(files.url, TOKEN, stage, directory)
        publisher.publish(0, {n: t.to(dtypes[n], copy=True) for n, t in masters.items()}, owned=True)
        rows = []
        draw = torch.Generator(device="cuda").manual_seed(0)
        check = model.to("cuda") if args.shape is None else None
        del model
        async with EngineClient(server.url, TOKEN, loader_dir=stage) as client:
            began = time.monotonic()
            await wait_ready(client, server, args.ready_s)
            print(f"SGLang ready after {time.monotonic() - began:.0f} s", file=sys.stderr, flush=True)
            subscriber.wake(UNPROVEN)  # refused, since these weights are made up, but our loader runs now
            await client.pause("abort")
            await client.apply_staged(UNPROVEN)
            await client.resume()
            for version in range(args.versions + 1):
                row: dict[str, Any] = {"version": version}
                if version:
                    for _ in range(4):
                        adam_like(masters, args.lr, draw)
                    began = time.monotonic()
                    tensors = {n: t.to(dtypes[n], copy=True) for n, t in masters.items()}
                    torch.cuda.synchronize()
                    row["snapshot_s"] = time.monotonic() - began
                    done = publisher.publish(version, tensors, owned=True)
                    row |= {"density": done.density, "full_bytes": done.bytes_full, "publish_s": done.publish_s}
                    row |= {"digest_s": done.digest_s, "diff_s": done.diff_s, "encode_s": done.encode_s}
                row |= await update(client, subscriber, version, args)
                if check is not None:
                    row |= await compare(client, check, masters, dtypes, adapter)
                rows.append(row)
                print(json.dumps(row), file=sys.stderr, flush=True)
        subscriber.close()
        publisher.close()
        files.stop()
        return rows
    finally:
        server.stop()
        if args.keep_log:
            shutil.copy(folder / "sglang.log", args.keep_log)


async def compare(
    client: EngineClient, model: Any, masters: dict[str, torch.Tensor], dtypes: dict[str, torch.dtype], adapter: Any
) -> dict[str, float]:
    """|server - transformers| on sampled completions; transformers computes in fp32 on the published values."""
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, tensor in adapter.wire_tensors(model).items():
            parameters[name].copy_(masters[tensor.name].to(dtypes[tensor.name]))
    prompts = [[6, 10, 13, 7, 8, 16], [11, 5, 14, 4, 9, 16], [12, 3, 10, 13, 4, 4, 9, 16]]
    results = await client.generate([GenRequest(p, 24, temperature=1.0, rid=f"c{i}") for i, p in enumerate(prompts)])
    gaps = [
        (transformers_logprobs(model, p, r.tokens.tolist()) - torch.from_numpy(r.logprobs)).abs()
        for p, r in zip(prompts, results, strict=True)
    ]
    every = torch.cat(gaps)
    return {"parity_mean": float(every.mean()), "parity_max": float(every.max()), "engine_version": results[0].version}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="astra:tiny")
    parser.add_argument("--shape", choices=["4b"], help="random weights of this shape instead of --model")
    parser.add_argument("--versions", type=int, default=6)
    parser.add_argument("--running", type=int, default=32)
    parser.add_argument("--context", type=int, default=512, help="context length of the server")
    parser.add_argument("--mode", choices=["abort", "retract", "in_place"], default="abort")
    parser.add_argument("--recovery", action="store_true", help="stream, and time until full speed after each update")
    parser.add_argument("--warm-s", type=float, default=2.0, help="generating before each update")
    parser.add_argument("--lr", type=float, default=5e-6)
    parser.add_argument("--ready-s", type=float, default=400.0)
    parser.add_argument("--sglang-python", default=sys.executable)
    parser.add_argument("--keep-log", type=Path, help="copy the server's log here")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None) as folder:
        rows = asyncio.run(drive(args, Path(folder)))
    print(json.dumps(rows))
    summarize(rows[2:] or rows[1:])


def summarize(rows: list[dict[str, Any]]) -> None:
    """Medians and worst over the versions after the first, whose call also records where the weights lie."""
    for key in ("publish_s", "diff_s", "stage_s", "abort_ms", "pause_ms", "readback_s", "recovery_s"):
        found = sorted(r[key] for r in rows if r.get(key) is not None)
        if found:
            print(
                f"{key:12} p50 {found[len(found) // 2]:9.4f}  worst {found[-1]:9.4f}  of {len(found)}", file=sys.stderr
            )
    for key in ("pause", "call", "apply", "digest", "loader", "continue"):
        found = sorted(r["split_ms"][key] for r in rows if "split_ms" in r)
        if found:
            print(f"  {key:10} p50 {found[len(found) // 2]:9.2f} ms", file=sys.stderr)


if __name__ == "__main__":
    main()
