"""One SGLang server with our loader, and a trainer that publishes to it: random 4B weights, or a checkpoint.

For benches; every server that is started here is stopped by its id.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from shared import adapter_of

from astracli.data import fetch
from astracli.engines.client import EngineClient
from astracli.engines.contract import GenRequest
from astracli.engines.sglang.attention import SERVING_ON_CPU
from astracli.engines.sglang.client import SETTLE_LOADER, STAGED_LOADER
from astracli.engines.sglang.plugin import CPU_ENV, ENV
from astracli.process import ports
from astracli.training.optimizer import DTYPES
from astracli.weights.publish.publisher import Publisher
from astracli.weights.publish.snapshot import copies
from weights.made_up import SHAPES

TOKEN = "bench-token"
VERIFY = 4
"""Every how manieth version is read back under HF names."""


def model_directory(args: argparse.Namespace, folder: Path) -> tuple[Path, Callable[[], Any]]:
    """(what to serve, what makes the model): a given checkpoint, or random weights of the 4B shape, of which only the
    config is written: the server starts while they are drawn, and gets them as version 0."""
    out = folder / "model"
    if args.shape is None:
        found = fetch.local_path(args.model)
        if found is None:
            sys.exit(f"no local checkpoint `{args.model}`")
        shutil.copytree(found, out)
        return out, lambda: adapter_of(out).load_for_training(out, attention="sdpa")
    from transformers import Qwen3_5ForCausalLM, Qwen3_5TextConfig

    config = Qwen3_5TextConfig(**SHAPES["4b"], tie_word_embeddings=True, eos_token_id=1, pad_token_id=0)
    config.architectures = ["Qwen3_5ForCausalLM"]
    out.mkdir()
    (out / "config.json").write_text(json.dumps(config.to_dict() | {"full_attention_interval": 4, "dtype": "bfloat16"}))

    def draw() -> Any:
        torch.manual_seed(0)
        with torch.device(args.device):
            return Qwen3_5ForCausalLM(config).to(torch.bfloat16)

    return out, draw


class Server:
    """One SGLang process in its own session."""

    def __init__(
        self, args: argparse.Namespace, model: Path, stage: Path, log: Path, *, loaders: Sequence[str] = (),
        settings: Mapping[str, str] | None = None,
    ):  # fmt: skip
        """`loaders`: custom weight loaders of the bench's own besides ours; `settings`: over our loader's."""
        with ports.bind("127.0.0.1") as probe:
            port = probe.getsockname()[1]
        command = [
            args.sglang_python, "-m", "sglang.launch_server", "--model-path", str(model), "--skip-tokenizer-init",
            "--host", "127.0.0.1", "--port", str(port), "--api-key", TOKEN, *self._device(args),
            "--disable-radix-cache", "--dtype", "bfloat16", "--max-running-requests", str(max(2, args.running)),
            "--mem-fraction-static", "0.5", "--context-length", str(args.context),
            "--custom-weight-loader", STAGED_LOADER, SETTLE_LOADER, *loaders, "--load-format", "dummy",
            "--weight-version=-1", "--stream-interval", "8",
        ]  # fmt: skip
        env = os.environ | {
            "ASTRA_STAGE_DIR": str(stage),
            "ASTRA_START_VERSION": "",  # weights made up by the server: version 0 reaches it in full
            "ASTRA_VERIFY_INTERVAL": str(VERIFY),
            **ENV,
            **(CPU_ENV if args.device == "cpu" else {}),
            **(settings or {}),
        }
        if loaders:
            own = log.with_name("loaders")  # alone: what else lies here might hide a package of the server's
            own.mkdir()
            for module in {loader.partition(".")[0] for loader in loaders}:
                shutil.copy(Path(__file__).with_name(f"{module}.py"), own)
            env["PYTHONPATH"] = os.pathsep.join(filter(None, [str(own), env.get("PYTHONPATH")]))
        self.log = log
        self.url = f"http://127.0.0.1:{port}"
        with log.open("w") as out:
            self.process = subprocess.Popen(
                command, env=env, stdout=out, stderr=subprocess.STDOUT, start_new_session=True
            )

    @staticmethod
    def _device(args: argparse.Namespace) -> list[str]:
        if args.device == "cpu":
            slots = ["--max-total-tokens", str(max(2, args.running) * args.context)]  # else most of the memory
            plain = ["--disable-overlap-schedule", "--disable-cuda-graph"]
            return ["--device", "cpu", "--attention-backend", SERVING_ON_CPU[0], *plain, *slots]
        graphs = ["--disable-prefill-cuda-graph", "--cuda-graph-bs-decode", "1", str(args.running)]
        return ["--attention-backend", "triton", *graphs]

    def last_lines(self) -> str:
        """For whoever reads why a bench ended."""
        return f"the server's last lines:\n{self.log.read_text(errors='replace')[-3000:]}"

    def stop(self) -> None:
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGTERM)
            try:
                self.process.wait(5)
            except subprocess.TimeoutExpired:
                os.killpg(self.process.pid, signal.SIGKILL)
                self.process.wait()


class Trainer:
    """fp32 masters, and the publisher of what they are in their wire dtypes."""

    def __init__(
        self, args: argparse.Namespace, model: Any, adapter: Any, folder: Path, *,
        transfer: Literal["full", "delta"] = "delta", keep: int = 4, full_interval: int = 1000,
    ):  # fmt: skip
        wanted = adapter.wire_tensors(model)
        parameters = dict(model.named_parameters())
        self.masters = {t.name: parameters[name].detach().float().to(args.device) for name, t in wanted.items()}
        self.dtypes = {t.name: DTYPES[t.dtype] for t in wanted.values()}
        self.lr, self.draw = args.lr, torch.Generator(args.device).manual_seed(0)
        threads = 1 if args.device == "cpu" else min(16, os.cpu_count() or 1)
        self.publisher = Publisher(
            folder, transfer=transfer, full_interval=full_interval, keep=keep, model_name="bench", threads=threads
        )

    @torch.no_grad()
    def step(self) -> None:
        """What an Adam step does to masters when gradients are noise: about lr in each direction."""
        for tensor in self.masters.values():
            noise = torch.randn(tensor.shape, generator=self.draw, device=tensor.device)
            tensor.add_(noise.clamp_(-2, 2), alpha=-self.lr)

    def publish(self, version: int) -> dict[str, Any]:
        began = time.monotonic()
        tensors = copies(self.masters, self.dtypes)
        if next(iter(tensors.values())).is_cuda:
            torch.cuda.synchronize()
        copied_s = time.monotonic() - began
        done = self.publisher.publish(version, tensors, owned=True)
        return {
            "density": done.density, "full_bytes": done.bytes_full, "bytes_per_changed": done.bytes_per_changed,
            "snapshot_s": copied_s + done.snapshot_s, "publish_s": done.publish_s, "digest_s": done.digest_s,
            "delta_s": done.delta_s, "diff_s": done.diff_s, "encode_s": done.encode_s, "write_s": done.write_s,
        }  # fmt: skip


@torch.no_grad()
def transformers_logprobs(model: Any, prompt: list[int], tokens: list[int]) -> torch.Tensor:
    ids = torch.tensor([prompt + tokens], device=model.device)
    logits = model(input_ids=ids).logits[0, len(prompt) - 1 : -1].float()
    return logits.log_softmax(-1).gather(1, ids[0, len(prompt) :, None])[:, 0].cpu()


async def compare(client: EngineClient, model: Any, trainer: Trainer, adapter: Any) -> dict[str, float]:
    """|server - transformers| on sampled completions; transformers computes in fp32 on the published values."""
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, tensor in adapter.wire_tensors(model).items():
            parameters[name].copy_(trainer.masters[tensor.name].to(trainer.dtypes[tensor.name]))
    prompts = [[6, 10, 13, 7, 8, 16], [11, 5, 14, 4, 9, 16], [12, 3, 10, 13, 4, 4, 9, 16]]
    results = await client.generate([GenRequest(p, 24, temperature=1.0, rid=f"c{i}") for i, p in enumerate(prompts)])
    gaps = [
        (transformers_logprobs(model, p, r.tokens.tolist()) - torch.from_numpy(r.logprobs)).abs()
        for p, r in zip(prompts, results, strict=True)
    ]
    every = torch.cat(gaps)
    return {"parity_mean": float(every.mean()), "parity_max": float(every.max()), "engine_version": results[0].version}
