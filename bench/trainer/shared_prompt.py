"""What would forwarding a group's prompt once save in the trainer, and is it exact?

    python bench/trainer/shared_prompt.py [--shapes tiny small dense] [--prompts 100 1000 4000] [--answers 256] [--json]

A group of `--group` samples, forward and backward of the mean log-probability of its answers, in fp32: as the trainer
does it now (each sample with its prompt), and with the prompt once. There attention reads the prompt's keys and values,
and Gated DeltaNet goes on from its state and its last inputs of the convolution; gradients flow back through both.
`shared_over_now` is of processor seconds (user + system, one thread), the least of `--rounds`; `saved` is 1 minus it.
`gradient` is |difference| / |gradient| over all parameters. Both sides use transformers' own kernels, since those of
astra for a CPU take no state. Optimizer and publishing, which a step has besides, stay as they are.

Shapes: `tiny` (the tiny hybrid of the adapter, 0.05 M parameters), `small` (the hybrid of scripts/make_small.py, 21 M),
`dense` (a Qwen2 as large as `small`).
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import log_softmax

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from shared import options, say, show

from astracli.models import registry

HYBRID = {
    "hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 8, "num_attention_heads": 8,
    "num_key_value_heads": 2, "head_dim": 64, "linear_num_key_heads": 2, "linear_num_value_heads": 4,
    "linear_key_head_dim": 128, "linear_value_head_dim": 128, "layer_types": None,
}  # fmt: skip
DENSE = {
    "model_type": "qwen2", "vocab_size": 512, "hidden_size": 448, "intermediate_size": 1536, "num_hidden_layers": 8,
    "num_attention_heads": 8, "num_key_value_heads": 2, "tie_word_embeddings": True,
}  # fmt: skip


def model_of(shape: str) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    if shape == "dense":
        settings: dict[str, Any] = DENSE
    else:
        tiny = registry.get("qwen3_5").tiny_config
        assert tiny is not None
        settings = dict(tiny()) | (HYBRID if shape == "small" else {})
        settings = {key: value for key, value in settings.items() if value is not None}
    torch.manual_seed(0)
    config = AutoConfig.for_model(**settings | {"max_position_embeddings": 8192})
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="sdpa")


def loss(model: Any, hidden_SAD: Tensor, answers_SA: Tensor) -> Tensor:
    """Of the hidden states in front of each token of the answers."""
    logprob_SAV = log_softmax(model.lm_head(hidden_SAD).float(), -1)
    return -logprob_SAV.gather(-1, answers_SA[..., None]).mean()


def now(model: Any, prompt_P: Tensor, answers_SA: Tensor) -> Tensor:
    rows = torch.cat([prompt_P.expand(len(answers_SA), -1), answers_SA], 1)
    hidden = model.base_model(input_ids=rows, use_cache=False).last_hidden_state
    return loss(model, hidden[:, len(prompt_P) - 1 : -1], answers_SA)


def shared(model: Any, prompt_P: Tensor, answers_SA: Tensor) -> Tensor:
    group, base = len(answers_SA), model.base_model
    began = base(input_ids=prompt_P[None], use_cache=True)
    state = began.past_key_values
    for layer in state.layers:
        for name in ("keys", "values", "conv_states", "recurrent_states"):
            if isinstance(value := getattr(layer, name, None), Tensor):
                setattr(layer, name, value.expand(group, *value.shape[1:]))
        for name in ("update_conv_state", "update_recurrent_state"):
            if hasattr(layer, name):  # which would write over the state that the backward pass reads
                setattr(layer, name, lambda new, **_: new)
    places = torch.arange(len(prompt_P), len(prompt_P) + answers_SA.shape[1])
    went = base(
        input_ids=answers_SA, past_key_values=state, use_cache=True, position_ids=places[None].expand(group, -1)
    )
    first = began.last_hidden_state[:, -1:].expand(group, -1, -1)
    return loss(model, torch.cat([first, went.last_hidden_state[:, :-1]], 1), answers_SA)


def seconds(way: Any, model: Any, *given: Tensor) -> tuple[float, list[Tensor]]:
    """(processor seconds of forward and backward, gradients)"""
    model.zero_grad(set_to_none=True)
    began = time.process_time()
    way(model, *given).backward()
    took = time.process_time() - began
    return took, [parameter.grad for parameter in model.parameters() if parameter.grad is not None]


def measure(shape: str, model: Any, prompt: int, args: argparse.Namespace) -> dict[str, Any]:
    draw, vocabulary = torch.Generator().manual_seed(1), model.config.vocab_size
    prompt_P = torch.randint(2, vocabulary, (prompt,), generator=draw)
    answers_SA = torch.randint(2, vocabulary, (args.group, args.answers), generator=draw)
    took: dict[Any, list[float]] = {now: [], shared: []}
    gradients: dict[Any, list[Tensor]] = {}
    for number in range(2 * args.rounds):
        way = (now, shared)[(number + number // 2) % 2]
        used, gradients[way] = seconds(way, model, prompt_P, answers_SA)
        took[way].append(used)
    off = sum(float((a - b).double().square().sum()) for a, b in zip(gradients[now], gradients[shared], strict=True))
    size = sum(float(a.double().square().sum()) for a in gradients[now])
    least = {way: min(each) for way, each in took.items()}
    ratio = least[shared] / least[now]
    tokens = (prompt + args.group * args.answers) / (args.group * (prompt + args.answers))
    row = {
        "shape": shape, "prompt": prompt, "answers": args.answers, "group": args.group, "now_cpu_s": least[now],
        "shared_cpu_s": least[shared], "shared_over_now": ratio, "saved": 1 - ratio, "saved_tokens": 1 - tokens,
        "gradient": math.sqrt(off / size),
    }  # fmt: skip
    say(row)
    return row


def main() -> None:
    parser = options(
        __doc__, shapes=["tiny", "small", "dense"], prompts=[100, 1000, 4000], answers=256, group=8, rounds=2
    )
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for shape in args.shapes:
        model = model_of(shape)
        rows += [measure(shape, model, prompt, args) for prompt in args.prompts]
    show(args, {"rows": rows})


if __name__ == "__main__":
    main()
