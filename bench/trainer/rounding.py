"""How far bf16 by itself moves a model's log-probabilities: the same weights computed in bf16 and in fp32.

    python bench/trainer/rounding.py DIR [--tokens 128] [--device cpu | cuda] [--json]

transformers' own code both times, one row of random tokens; also the relative difference of the hidden states behind
every eighth block. Two right implementations in bf16 may be as far from one another as the mean that is printed, 1.4
times as far where their roundings have nothing in common. DIR: `python bench/random_checkpoint.py DIR [--device cpu]`.
4.2 B parameters take 17 GB of memory and a minute or two on a CPU.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from shared import adapter_of, options, show


@torch.no_grad()
def forward(model: Any, tokens: torch.Tensor, blocks: list[Any]) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """fp32 log-probabilities of the tokens but the first, and hidden states behind some blocks."""
    seen: list[torch.Tensor] = []

    def keep(_: Any, __: Any, out: Any) -> None:
        seen.append((out[0] if isinstance(out, tuple) else out).float())

    hooks = [block.register_forward_hook(keep) for block in blocks]
    logits = model(input_ids=tokens, use_cache=False).logits[0, :-1].float()
    for hook in hooks:
        hook.remove()
    return logits.log_softmax(-1).gather(1, tokens[0, 1:, None])[:, 0], seen


def main() -> None:
    parser = options(__doc__, tokens=128, device=("cpu", "cuda"))
    parser.add_argument("dir", type=Path)
    args = parser.parse_args()
    adapter = adapter_of(args.dir)
    model = adapter.load_for_training(args.dir, attention="sdpa")
    for name, parameter in model.named_parameters():  # one by one: two models would not fit
        wide = any(part in name for part in adapter.keep_fp32)
        parameter.data = parameter.data.to(args.device, torch.float32 if wide else torch.bfloat16)
    model.to(args.device)
    every = adapter.blocks(model)[7::8] or adapter.blocks(model)[-1:]
    draw = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, model.config.vocab_size, (1, args.tokens), generator=draw).to(args.device)
    rounded, hidden = forward(model, tokens, every)
    for parameter in model.parameters():
        parameter.data = parameter.data.float()
    exact, wanted = forward(model, tokens, every)
    off = (rounded - exact).abs()
    apart = [((a - b).norm() / b.norm()).item() for a, b in zip(hidden, wanted, strict=True)]
    found = {"mean": off.mean().item(), "max": off.max().item(), "hidden": apart, "tokens": len(off)}
    show(args, found | {"parameters": sum(p.numel() for p in model.parameters())})


if __name__ == "__main__":
    main()
