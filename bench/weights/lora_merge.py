"""How much of a LoRA update bf16 rounds away when the adapter is merged, and what merging costs.

    python bench/weights/lora_merge.py [RUN] [--outputs 2560] [--inputs 2560] [--rank 16] [--device cpu | cuda] [--json]

`made_up`: a matrix of normal numbers (deviation 0.02, as in a pretrained model) and updates B A of growing size:
`relative`, the deviation of the update over that of the matrix; `unchanged`, the share of the elements that keep their
bits, because they change by less than half a unit in the last place; `lost`, |merged - (W + B A)| over |B A|, both as
Frobenius norms; `kept_along`, how much of the update is left in its own direction, 1 where rounding only adds noise.

`run`, for the checkpoints of a LoRA run: the same over all its adapted matrices, and on completions that the run has
stored, the mean |difference| of the log-probability of a token between the merged, rounded weights and W + B A in fp32
(`apart`: what trainer and engine would differ by if one of them applied the adapter unmerged), and between merged and
initial weights (`moved`: what training has changed).

`ns_per_element` is what merging takes, by numpy (a receiver, one core) and by torch on --device (a trainer).
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from shared import median_s, options, show

from astracli.config import recipe_io
from astracli.data import fetch
from astracli.models import registry
from astracli.models.adapter import chat_prompt_tokens, load_tokenizer
from astracli.runs.run_dir import RunDir
from astracli.training import checkpoint, setup
from astracli.training.fsdp import Ranks
from astracli.training.lora_masters import LoraMasters
from astracli.weights.device.merging import merge
from astracli.weights.format.digest import bits_of
from astracli.weights.format.low_rank import merged_bits

ROWS = 64
"""Completions on which log-probabilities are compared."""


class Loss:
    """Sums over matrices."""

    def __init__(self) -> None:
        self.same = self.elements = 0
        self.lost = self.update = self.along = self.weight = 0.0

    def add(self, base: torch.Tensor, a_RI: torch.Tensor, b_OR: torch.Tensor) -> None:
        out = torch.empty_like(base)
        merge(base, a_RI, b_OR, out)
        update = b_OR.double() @ a_RI.double()
        got = out.double() - base.double()
        self.same += int((out == base).sum())
        self.elements += base.numel()
        self.lost += float((got - update).square().sum())
        self.update += float(update.square().sum())
        self.along += float((got * update).sum())
        self.weight += float(base.double().square().sum())

    def figures(self) -> dict[str, float]:
        return {
            "relative": (self.update / self.weight) ** 0.5,
            "unchanged": self.same / self.elements,
            "lost": (self.lost / self.update) ** 0.5 if self.update else 0.0,
            "kept_along": self.along / self.update if self.update else 0.0,
        }


def made_up(outputs: int, inputs: int, rank: int, device: str) -> Iterator[dict[str, float]]:
    draw = torch.Generator().manual_seed(0)
    base = (0.02 * torch.randn(outputs, inputs, generator=draw)).bfloat16().to(device)
    a_RI = torch.empty(rank, inputs).uniform_(-(inputs**-0.5), inputs**-0.5, generator=draw).to(device)
    b_OR = torch.randn(outputs, rank, generator=draw).to(device)
    size = float((b_OR @ a_RI).std()) / 0.02
    for relative in (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1):
        found = Loss()
        found.add(base, a_RI, b_OR * (relative / size))
        yield found.figures()


def cost(outputs: int, inputs: int, rank: int, device: str) -> dict[str, float]:
    base, out = torch.randn(outputs, inputs).bfloat16(), torch.empty(outputs, inputs, dtype=torch.bfloat16)
    a_RI, b_OR = torch.randn(rank, inputs), torch.randn(outputs, rank)
    by_numpy = median_s(lambda: merged_bits(bits_of(base), a_RI.numpy(), b_OR.numpy()), 3)
    there = [tensor.to(device) for tensor in (base, a_RI, b_OR, out)]
    by_torch = median_s(lambda: merge(*there), 3)
    return {"numpy": 1e9 * by_numpy / base.numel(), "torch": 1e9 * by_torch / base.numel()}


def of_run(path: Path) -> Iterator[dict[str, Any]]:
    run = RunDir(path)
    recipe = recipe_io.load(run.recipe_json)
    recipe = recipe.model_copy(update={"algorithm": recipe.algorithm.model_copy(update={"kl_coef": 0.0})})
    model = fetch.local_path(recipe.model.path) or fetch.fetch_model(recipe.model.path, recipe.model.revision)
    adapter = registry.resolve(recipe, model)
    trainer = setup.build_trainer(model, adapter, recipe, Ranks(), attention="sdpa")
    masters = trainer.masters
    assert isinstance(masters, LoraMasters), "the run trained no adapters"
    rows = list(completions(run, load_tokenizer(model)))
    for found in checkpoint.find(run.checkpoints):
        checkpoint.load(found, masters, Ranks())
        lost = Loss()
        for target in masters.adapters.targets:
            lost.add(target.base, target.a_RI.detach(), target.b_OR.detach() * masters.adapters.scale)
        merged = logprobs(trainer.policy.model, rows)
        with masters.adapters.off():
            initial = logprobs(trainer.policy.model, rows)
        with torch.no_grad():
            for target in masters.adapters.targets:  # the next checkpoint, and leaving `off`, merge anew
                product = masters.adapters.scale * target.b_OR.double() @ target.a_RI.double()
                target.merged.copy_(target.base.double() + product)
        exact = logprobs(trainer.policy.model, rows)
        masters.adapters.merge()
        apart = {"apart": (merged - exact).abs().mean().item(), "moved": (merged - initial).abs().mean().item()}
        yield {"step": found.step, **lost.figures(), **apart, "tokens": len(merged)}


def completions(run: RunDir, tokenizer: Any) -> Iterator[tuple[list[int], list[int]]]:
    """(prompt, completion) of the newest stored samples."""
    lines = [line for file in sorted((run.path / "samples").glob("*.jsonl")) for line in file.read_text().splitlines()]
    for record in map(json.loads, lines[-ROWS:]):
        yield chat_prompt_tokens(tokenizer, record["problem"]), record["tokens"]


@torch.no_grad()
def logprobs(model: Any, rows: list[tuple[list[int], list[int]]]) -> torch.Tensor:
    found = []
    for prompt, completion in rows:
        tokens = torch.tensor([[*prompt, *completion]])
        every = model(input_ids=tokens, use_cache=False).logits[0, :-1].float().log_softmax(-1)
        found.append(every.gather(1, tokens[0, 1:, None])[len(prompt) - 1 :, 0])
    return torch.cat(found)


def main() -> None:
    parser = options(__doc__, outputs=2560, inputs=2560, rank=16, device=("cpu", "cuda"))
    parser.add_argument("run", type=Path, nargs="?")
    args = parser.parse_args()
    size = (args.outputs, args.inputs, args.rank, args.device)
    document: dict[str, Any] = {"made_up": list(made_up(*size)), "ns_per_element": cost(*size)}
    if args.run is not None:
        document["run"] = list(of_run(args.run))
    show(args, document)


if __name__ == "__main__":
    main()
