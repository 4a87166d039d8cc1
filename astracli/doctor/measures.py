"""What the probe child measures with torch. Each returns rows {"name", "status", "value"}: figure and tolerance inside.

On a CPU the shapes are cut in length, never in heads or head sizes: these decide which kernel runs.
"""

from __future__ import annotations

import socket
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from astracli.doctor.all_reduce import all_reduce
from astracli.doctor.probe_child import Row, relative, row
from astracli.models import registry

DELTA_TOKENS = 80
"""More than one chunk of 64, and not a multiple of it."""
DELTA_TOLERANCE = {"cpu": 1e-4, "cuda": 2e-2}
"""Largest |difference| over the largest |value|; on a GPU the kernel gets bf16."""
SLOW_LOOPBACK = 50e6
SLOW_COPY = 5e9
"""Bytes a second; PCIe 3.0 x16 gives about 12e9, x4 about 3e9."""


def adapter(name: str, device: str) -> list[Row]:
    """The adapter's promises on its smallest model: names, sizes, padded and packed rows == separate."""
    from astracli.training import adapter_check

    return adapter_check.check(registry.get(name), device)["checks"]


# -- the delta rule ----------------------------------------------------------------------------------------------------


def delta_rule(name: str, config: Mapping[str, Any], device: str) -> list[Row]:
    """The trainer's kernel at the recipe's head shapes, output and every gradient, against one step a token."""
    import torch

    found = registry.get(name)
    assert found.delta_rule is not None
    kernel = found.delta_rule(config, device)
    generator = torch.Generator().manual_seed(0)
    heads, tokens = kernel.value_heads, DELTA_TOKENS
    shapes = [(1, tokens, heads, kernel.key_dim)] * 2 + [(1, tokens, heads, kernel.value_dim)]
    inputs = [torch.randn(shape, generator=generator) for shape in shapes]
    inputs += [-torch.rand(1, tokens, heads, generator=generator), torch.rand(1, tokens, heads, generator=generator)]
    out_grad = torch.randn(1, tokens, heads, kernel.value_dim, generator=generator)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    # rounded once for both, so that only the arithmetic is compared; the decay g stays in fp32 as in training
    cast = [x.to(dtype) if i != 3 else x for i, x in enumerate(inputs)]

    def outcome(rule: Callable[..., Any], tensors: list[Any], grad: Any) -> list[Any]:
        leaves = [x.detach().clone().requires_grad_() for x in tensors]
        q, k, v, g, beta = leaves
        out, _ = rule(q, k, v, g=g, beta=beta, use_qk_l2norm_in_kernel=True)
        out.backward(grad.to(out))
        return [out.detach(), *(x.grad for x in leaves)]

    ours = outcome(kernel.rule, [x.to(device) for x in cast], out_grad.to(dtype).to(device))
    theirs = outcome(step_by_step, [x.to(device, torch.float32) for x in cast], out_grad.to(dtype).float().to(device))
    errors = [relative(a, b) for a, b in zip(ours, theirs, strict=True)]
    shown = f"{heads} heads of {kernel.key_dim} x {kernel.value_dim}"
    allowed = DELTA_TOLERANCE[device]
    return [
        row("delta rule, forward", errors[0], allowed, f"relative, {shown}"),
        row("delta rule, backward", max(errors[1:]), allowed, "relative, worst of five gradients"),
    ]


def step_by_step(q: Any, k: Any, v: Any, *, g: Any, beta: Any, use_qk_l2norm_in_kernel: bool) -> tuple[Any, Any]:
    """The gated delta rule as it is written down (arXiv 2412.06464, equation 10), fp32 [B, T, H, D].

    S <- exp(g) S; S <- S + k (beta (v - S^T k))^T; out = S^T q / sqrt(D)
    """
    import torch

    if use_qk_l2norm_in_kernel:
        q, k = (x * torch.rsqrt((x * x).sum(-1, keepdim=True) + 1e-6) for x in (q, k))
    q = q / q.shape[-1] ** 0.5
    state = q.new_zeros(q.shape[0], q.shape[2], q.shape[3], v.shape[3])
    outs = []
    for t in range(q.shape[1]):
        state = state * g[:, t, :, None, None].exp()
        held = (state * k[:, t, :, :, None]).sum(-2)
        update = (v[:, t] - held) * beta[:, t, :, None]
        state = state + k[:, t, :, :, None] * update[:, :, None, :]
        outs.append((state * q[:, t, :, :, None]).sum(-2))
    return torch.stack(outs, 1), state


# -- engine against trainer --------------------------------------------------------------------------------------------


def parity(name: str, engine: str) -> list[Row]:
    """The engine draws tokens from the adapter's tiny model; the trainer scores the same tokens. On a CPU."""
    import torch

    from astracli.engines import registry as engines
    from astracli.training import adapter_check
    from astracli.training.logprob import PolicyModel

    found = registry.get(name)
    with tempfile.TemporaryDirectory() as folder:
        _, model = adapter_check.load_tiny(found, Path(folder))
        _round(model, found)
        sample = engines.get(engine).sample
        assert sample is not None
        prompts = [[3, 5, 7, 9][: n + 1] for n in range(4)]
        completions = sample(found, Path(folder), prompts, 24)
    policy, differences = PolicyModel(model), []
    for prompt, (drawn, logprobs) in zip(prompts, completions, strict=True):
        tokens = torch.tensor([[*prompt, *drawn.tolist()]])
        predict = torch.arange(len(prompt) - 1, tokens.shape[1] - 1)
        mask = torch.ones_like(tokens)
        places = found.position_ids(mask) if found.position_ids is not None else None
        with torch.no_grad():
            scored, _ = policy(tokens, found.attention_mask(mask), places, predict, tokens[0, len(prompt) :])
        differences.append((scored - torch.from_numpy(logprobs)).abs())
    mean = float(torch.cat(differences).mean())
    return [row("engine == trainer", mean, found.parity_tolerance["cpu"], "mean |log-probability difference|")]


def _round(model: Any, found: Any) -> None:
    """To the dtypes that travel: the engine holds these, and the trainer's forward runs on them."""
    import torch

    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, tensor in found.wire_tensors(model).items():
            parameters[name].copy_(parameters[name].to(getattr(torch, tensor.dtype)))


# -- links -------------------------------------------------------------------------------------------------------------


def bandwidth(device: str) -> list[Row]:
    """Memory, loopback, and with a GPU both directions between host and device, in GB/s."""
    import torch

    source = torch.ones(2**24)  # 64 MiB
    target = torch.empty_like(source)
    rows = [speed_row("memory copy", _rate(lambda: target.copy_(source), source.nbytes), 0.0)]
    rows.append(speed_row("loopback", loopback(), SLOW_LOOPBACK))
    if device == "cuda":
        held, there = torch.ones(2**26).pin_memory(), torch.empty(2**26, device="cuda")
        for name, a, b in (("host to device", there, held), ("device to host", held, there)):

            def copy(a: Any = a, b: Any = b) -> None:
                a.copy_(b)
                torch.cuda.synchronize()

            rows.append(speed_row(name, _rate(copy, held.nbytes), SLOW_COPY))
    return rows


def _rate(copy: Callable[[], Any], count: int) -> float:
    """Bytes a second, the best of three after one to warm up."""
    copy()
    best = float("inf")
    for _ in range(3):
        start = time.perf_counter()
        copy()
        best = min(best, time.perf_counter() - start)
    return count / best


def loopback(count: int = 2**26) -> float:
    """Bytes a second through one TCP connection on 127.0.0.1."""
    with socket.create_server(("127.0.0.1", 0)) as server:

        def send() -> None:
            with socket.create_connection(server.getsockname()) as out:
                out.sendall(bytes(count))

        thread = threading.Thread(target=send, daemon=True)
        start = time.perf_counter()
        thread.start()
        connection, _ = server.accept()
        with connection:
            buffer, got = bytearray(2**20), 0
            while read := connection.recv_into(buffer):
                got += read
        return got / (time.perf_counter() - start)


def speed_row(name: str, rate: float, least: float) -> Row:
    wanted = f" (at least {least / 1e9:g})" if least else ""
    return {"name": name, "status": "ok" if rate >= least else "fail", "value": f"{rate / 1e9:.1f} GB/s{wanted}"}


MEASURES: dict[str, Callable[..., list[Row]]] = {
    "adapter": adapter,
    "delta_rule": delta_rule,
    "parity": parity,
    "all_reduce": all_reduce,
    "bandwidth": bandwidth,
}
