"""How many operators a micro-batch asks a GPU for, layer by layer, and where it would wait for one. Needs no GPU.

    python bench/trainer/launches.py [--shape 4b] [--tokens 8192] [--checkpointing none] [--json]

The trainer's own code for one GPU runs on tensors that have a shape and no memory (device `meta`), which say that they
are on one: a value that is read back raises, and a copy that waits is noted. Counted are the operators that compute or
copy, forward and backward of one micro-batch of the minibatch after the first; views are not.
A call of a fused kernel (fla, flash attention, the head's own) counts once, whatever it launches. The cost of a layer
is the difference that one more makes.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from astracli.config.recipe import Recipe
from astracli.kernels import varlen, weight_gradients
from astracli.kernels.gpu import fused
from astracli.models import registry
from astracli.models.adapter import ModelAdapter
from astracli.process.layout import RESIDENT, recomputed
from astracli.rl import losses
from astracli.rl.types import Group, Sample, Segment
from astracli.training import logprob, setup, split_masters
from astracli.training.fsdp import Ranks
from astracli.training.scoring import Work
from astracli.training.step import Trainer

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from shared import options, show

from trainer import case

DEVICE = torch.device("meta")
_FREE = ("profiler::", "aten::empty", "aten::new_empty", "aten::_unsafe_view", "aten::detach", "aten::lift", "prim::")


@dataclass
class Count(TorchDispatchMode):
    """Operators by name, and what would make the host wait."""

    calls: Counter[str] = field(default_factory=Counter)
    waits: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, name = kwargs or {}, func.name()
        view = any(r.alias_info is not None and not r.alias_info.is_write for r in func._schema.returns)
        if not view and not name.startswith(_FREE):
            self.calls[name.removeprefix("aten::")] += 1
        result = func(*args, **kwargs)
        tensors = [t for t in (*args, *kwargs.values(), result) if isinstance(t, Tensor)]
        here = {t.device.type for t in tensors if t.numel() and not (t.dim() == 0 and t.device.type == "cpu")}
        waits = not kwargs.get("non_blocking", len(args) > 2 and name == "aten::copy_" and args[2])
        if len(here) > 1 and waits:
            self.waits.append(name)
        return result


def opaque(count: Count, name: str, out: Any, guarded: bool = True) -> Any:
    """A fused kernel: reads its tensors, `out(*tensors)` is its result; with `guarded` it takes contiguous ones."""

    class Kernel(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *inputs: Any) -> Any:
            inputs = tuple(x.contiguous() if guarded and isinstance(x, Tensor) else x for x in inputs)
            ctx.save_for_backward(*inputs)
            count.calls[name] += 1
            return out(*inputs)

        @staticmethod
        def backward(ctx: Any, *grads: Any) -> Any:
            count.calls[f"{name}, backward"] += 1
            return tuple(None if x is None else torch.empty_like(x) for x in ctx.saved_tensors)

    return Kernel.apply


def kernels(count: Count) -> SimpleNamespace:
    """fla's kernels, by what they take and return."""
    conv = opaque(count, "fla conv", lambda x, taps, bias: torch.empty_like(x), guarded=False)
    rule = opaque(count, "fla rule", lambda q, k, v, g, beta: torch.empty_like(v))
    norm = opaque(count, "fla norm", lambda x, w: torch.empty_like(x))
    gated = opaque(count, "fla gated norm", lambda x, gate, w: torch.empty_like(x))
    mlp = opaque(count, "fla mlp", lambda gate, up, down: gate.new_empty(*gate.shape[:-1], down.shape[0]))

    def swiglu(gate: Tensor, up: Tensor) -> Tensor:
        count.calls["fla swiglu"] += 1
        return torch.empty_like(gate)

    def swiglu_again(gate: Tensor, up: Tensor, grad: Tensor) -> tuple[Tensor, ...]:
        count.calls["fla swiglu, backward"] += 1
        return tuple(torch.empty_like(x) for x in (gate, up, grad))

    def known(chunk_indices: Tensor, cu_seqlens_cpu: Tensor) -> None:
        assert chunk_indices.device == DEVICE and cu_seqlens_cpu.device.type == "cpu"

    def call_conv(x: Any, taps: Any, bias: Any, *, activation: str, cu_seqlens: Any, **made: Any) -> Any:
        known(**made)
        return conv(x, taps, bias), None

    def call_rule(q: Any, k: Any, v: Any, *, g: Any, beta: Any, **options: Any) -> Any:
        known(options["chunk_indices"], options["cu_seqlens_cpu"])
        return rule(q, k, v, g, beta), None

    return SimpleNamespace(
        conv=call_conv, rule=call_rule, rule_options=frozenset(("chunk_indices", "cu_seqlens_cpu")),
        rms_norm=lambda x, weight, bias, *, eps: norm(x, weight),
        rms_norm_gated=lambda x, gate, weight, bias, *, eps: gated(x, gate, weight), swiglu=swiglu,
        swiglu_again=swiglu_again, swiglu_linear=lambda gate, up, weight, bias: mlp(gate, up, weight),
    )  # fmt: skip


def head(count: Count) -> SimpleNamespace:
    """The head's own kernels."""

    def measure(logits_nV: Tensor, target_n: Tensor) -> tuple[Tensor, ...]:
        count.calls["head measure"] += 1
        return tuple(logits_nV.new_empty(len(target_n)) for _ in range(3))

    def gradient(*_: Tensor) -> None:
        count.calls["head gradient"] += 1

    return SimpleNamespace(measure=measure, gradient=gradient)


@contextmanager
def one_gpu(count: Count) -> Iterator[None]:
    """Code that asks which kernels there are finds those of a GPU, and no tensor has memory."""

    def product(a: Tensor, b: Tensor, out_dtype: torch.dtype) -> Tensor:
        count.calls["mm in fp32"] += 1
        return a.new_empty(a.shape[0], b.shape[1], dtype=out_dtype)

    def add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
        assert total.shape == (left.shape[1], right.shape[1])
        count.calls["mm that adds in fp32"] += 1

    fused.chunks.cache_clear()
    fused._one_number.cache_clear()
    fla = kernels(count)
    with (
        mock.patch.object(Tensor, "is_cuda", property(lambda tensor: tensor.is_meta)),
        mock.patch.object(torch.optim, "AdamW", lambda *_, **__: None),
        mock.patch.dict(logprob._CHUNKS_PER_PRODUCT, {"meta": logprob._CHUNKS_PER_PRODUCT["cuda"]}),
        mock.patch.object(fused, "fla", lambda: fla),
        mock.patch.object(logprob, "_kernels", lambda: head(count)),
        mock.patch.object(logprob, "_logits", lambda h, w, bias, temperature: product(h, w.t(), torch.float32)),
        mock.patch.object(weight_gradients, "product", lambda x, y: product(x.t(), y, torch.float32)),
        mock.patch.object(weight_gradients, "add_product", add_product),
        mock.patch.object(varlen, "flash_runs", lambda *_: True),
        mock.patch.object(torch.Tensor, "pin_memory", lambda tensor: tensor),
        mock.patch.object(split_masters, "split", lambda *_: None),  # of an update, which is not counted here
        mock.patch.object(split_masters, "join", lambda *_: None),
    ):
        try:
            yield
        finally:
            fused.chunks.cache_clear()
            fused._one_number.cache_clear()


def build(adapter: ModelAdapter, config: Mapping[str, Any], chosen: Recipe) -> Trainer:
    """As `setup.build_trainer` for one GPU, over weights without memory."""
    from transformers import AutoConfig, AutoModelForCausalLM

    settings = AutoConfig.for_model(**config)
    with DEVICE:
        model = AutoModelForCausalLM.from_config(settings, dtype=torch.float32)
    ranks = Ranks(device=DEVICE, compute=torch.bfloat16)
    if adapter.prepare_gpu is not None:
        adapter.prepare_gpu(model)
    varlen.install(model, adapter)
    wire = adapter.wire_tensors(model)
    policy = logprob.PolicyModel(model)
    setup.recompute(policy, adapter.block_classes(model), recomputed(chosen, RESIDENT))
    masters = setup.Masters(policy.model, wire, chosen.train, ranks)
    return Trainer(policy, masters, adapter, chosen, ranks, packed=True)


def recipe(tokens: int, checkpointing: str, algorithm: str) -> Recipe:
    return case.recipe(case.Variant(checkpointing), tokens, 4, algorithm)


def groups(tokens: int, versions: int = 2) -> list[Group]:
    """Samples of an eighth of a micro-batch each, for two micro-batches; a part of them stale."""
    made, length = [], tokens // 8 - 20
    for g in range(4):
        samples = []
        for s in range(4):
            of = length - 5 * s - g
            part = Segment((g + s) % versions, np.full(of, 3, np.int32), np.full(of, -1.0, np.float32))
            samples.append(Sample(s, [part], "stop", float(s % 2), "right" if s % 2 else "wrong"))
        made.append(Group(g, f"p{g}", np.full(9, 2, np.int32), samples, problem="?", answer="!"))
    return made


def micro_batches(
    adapter: ModelAdapter, config: Mapping[str, Any], chosen: Recipe, *, measure: bool = True
) -> tuple[Count, list[dict[str, int]]]:
    """The counts, and the operators of each micro-batch of a minibatch by phase: `forward`, with the loss and the
    figures; `backward`, with the accumulation of gradients and what is computed again."""
    count, phases = Count(), []
    limits = losses.get(chosen.algorithm.name).prepare(torch.zeros(4), torch.ones(4), chosen.algorithm.own)
    with one_gpu(count):
        trainer = build(adapter, config, chosen)
        batch = trainer.divide(groups(chosen.train.tokens_per_microbatch), 0)

        def lap(phase: str) -> None:
            done = sum(sum(p.values()) for p in phases)
            if phase == "forward_s":
                phases.append({})
            phases[-1][phase.removesuffix("_s")] = sum(count.calls.values()) - done

        ends = {"update": lambda step: 0.0}, {"require_agreement": lambda *_: None}
        with mock.patch.multiple(trainer.masters, **ends[0]), mock.patch.multiple(trainer, **ends[1]), count:
            timer = SimpleNamespace(lap=lambda phase: lap(phase) if phase != "optimizer_s" else None)
            work = Work(batch, 1, timer)  # type: ignore[arg-type]
            work.limits, work.first_measured = limits, measure
            trainer.minibatch(work, 0, 0)
    return count, phases


def main() -> None:
    parser = options(__doc__, shape="4b", tokens=8192, checkpointing=("none", "full"))
    args = parser.parse_args()
    adapter = registry.get("qwen3_5")
    text = case.shape_config(adapter, args.shape)
    chosen = recipe(args.tokens, args.checkpointing, "m2po")

    def run(*kinds: str) -> tuple[Count, dict[str, int]]:
        config = text | {"layer_types": [f"{kind}_attention" for kind in kinds], "num_hidden_layers": len(kinds)}
        count, phases = micro_batches(adapter, config, chosen)
        return count, phases[-1]

    one, base = run("linear")
    rows, named = [], []
    for name, kinds in (
        ("a Gated DeltaNet layer", ("linear", "linear")),
        ("a full-attention layer", ("linear", "full")),
    ):
        two, with_it = run(*kinds)
        rows.append({"operators of a micro-batch": name, **{phase: with_it[phase] - base[phase] for phase in base}})
        of = sorted((two.calls - one.calls).items())
        named += [{"layer": name, "operator": operator, "calls of two micro-batches": calls} for operator, calls in of]
    every = text["num_hidden_layers"]
    kinds = ["full" if (i + 1) % text["full_attention_interval"] == 0 else "linear" for i in range(every)]
    count, whole = run(*kinds)
    rows.append({"operators of a micro-batch": f"all {every} layers, loss and head", **whole})
    show(args, {"rows": rows, "the host waits for the GPU": count.waits, "operators": named})


if __name__ == "__main__":
    main()
