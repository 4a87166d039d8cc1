"""Does the tiny model learn at all, and with which settings? One file, one process, one thread: no house around it.

    python bench/learning/spike.py [--seeds 0 1 2] [--steps 80] [--budget 110] [--json]

Generates, grades and trains in turns on the shipped tiny model (M2PO as a clip, group-normalised advantages, four
optimizer steps a batch, fp32 masters behind bf16-rounded weights) and prints held-out avg@8 at temperature 1 before and
after, with the CPU seconds that its one thread spent in generation and training (evaluation excluded). The recipe's
task, temperature and learning rate were fixed with it, before any of the processes existed.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
import time
from importlib.resources import files
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from transformers import AutoTokenizer, Qwen3_5ForCausalLM

from astracli.data import arithmetic
from astracli.models import registry
from astracli.models.adapter import chat_prompt_tokens
from astracli.rewards.grader import grade_math

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from shared import options, show

MAX_NEW = 24


def rounded(x: torch.Tensor) -> torch.Tensor:
    return x.bfloat16().float()


class Spike:
    def __init__(self, args: argparse.Namespace, seed: int):
        path = str(files("astracli") / "assets" / "tiny")
        self.args, self.seed = args, seed
        self.tokenizer = AutoTokenizer.from_pretrained(path)
        self.eos = self.tokenizer.eos_token_id
        self.model = Qwen3_5ForCausalLM.from_pretrained(path, dtype=torch.float32)
        prepare = registry.get("qwen3_5").prepare_cpu
        if prepare:
            prepare(self.model)
        self.params = list(self.model.parameters())
        self.masters = [p.detach().clone() for p in self.params]
        self.optimizer = torch.optim.AdamW(self.masters, lr=args.lr, betas=(0.9, args.beta2), weight_decay=0.01)
        self.draws = torch.Generator().manual_seed(seed)

    @torch.no_grad()
    def generate(self, prompts: list[list[int]], temperature: float) -> tuple[list[list[int]], list[torch.Tensor]]:
        """Completions and their log-probabilities; left-padded, exact for both layer kinds with the mask."""
        width = max(map(len, prompts))
        ids = torch.tensor([[0] * (width - len(p)) + p for p in prompts])
        mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        out = self.model(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=True, logits_to_keep=1)
        done = torch.zeros(len(prompts), dtype=torch.bool)
        tokens, logprobs, position = [], [], positions[:, -1:]
        for _ in range(MAX_NEW):
            logits = out.logits[:, -1].float()
            if temperature:
                chosen = torch.multinomial((logits / temperature).softmax(-1), 1, generator=self.draws)[:, 0]
            else:
                chosen = logits.argmax(-1)
            chosen = torch.where(done, self.eos, chosen)
            tokens.append(chosen)
            logprobs.append(logits.log_softmax(-1).gather(1, chosen[:, None])[:, 0])
            done |= chosen == self.eos
            if bool(done.all()):
                break
            mask = torch.cat([mask, torch.ones_like(mask[:, :1])], 1)
            position = position + 1
            cache = {"past_key_values": out.past_key_values, "use_cache": True}
            out = self.model(input_ids=chosen[:, None], attention_mask=mask, position_ids=position, **cache)
        rows, scores = torch.stack(tokens, 1).tolist(), torch.stack(logprobs, 1)
        ends = [r.index(self.eos) + 1 if self.eos in r else len(r) for r in rows]
        return [r[:e] for r, e in zip(rows, ends, strict=True)], [s[:e] for s, e in zip(scores, ends, strict=True)]

    def right(self, answer: str, completion: list[int]) -> float:
        text = self.tokenizer.decode(completion, skip_special_tokens=True)
        return float(completion[-1] == self.eos and grade_math(answer, text) == "right")

    def evaluate(self, temperature: float, samples: int) -> float:
        items = [p for p in arithmetic.held_out() for _ in range(samples)]
        prompts = [chat_prompt_tokens(self.tokenizer, p.question) for p in items]
        total = 0.0
        for i in range(0, len(items), 512):
            completions, _ = self.generate(prompts[i : i + 512], temperature)
            total += sum(self.right(p.answer, c) for p, c in zip(items[i : i + 512], completions, strict=True))
        return total / len(items)

    def collect(self, step: int) -> list[tuple[list[int], list[int], torch.Tensor, float]]:
        """`groups` kept groups: (prompt, completion, behaviour log-probabilities, advantage) a sample."""
        rows: list[tuple[list[int], list[int], torch.Tensor, float]] = []
        attempt = 0
        while len(rows) < self.args.groups * self.args.samples and attempt < 8:
            first = (step * 8 + attempt) * self.args.groups
            attempt += 1
            problems = [arithmetic.draw(first + i, self.seed, arithmetic.LEVELS) for i in range(self.args.groups)]
            prompts = [chat_prompt_tokens(self.tokenizer, p.question) for p in problems]
            repeated = [p for p in prompts for _ in range(self.args.samples)]
            completions, logprobs = self.generate(repeated, 1.0)
            for g, problem in enumerate(problems):
                span = range(g * self.args.samples, (g + 1) * self.args.samples)
                rewards = torch.tensor([self.right(problem.answer, completions[i]) for i in span])
                if rewards.max() == rewards.min():
                    continue
                advantages = (rewards - rewards.mean()) / (rewards.std() + 1e-5)
                rows += [
                    (prompts[g], completions[i], logprobs[i], float(a)) for i, a in zip(span, advantages, strict=False)
                ]
        return rows[: self.args.groups * self.args.samples]

    def forward(self, rows: list[Any]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Log-ratio, loss mask and advantage, each [rows, T - 1]."""
        width = max(len(p) + len(c) for p, c, _, _ in rows)
        ids = torch.zeros(len(rows), width, dtype=torch.long)
        mask, old, advantage = (torch.zeros(len(rows), width - 1) for _ in range(3))
        for i, (prompt, completion, logprobs, a) in enumerate(rows):
            span = slice(len(prompt) - 1, len(prompt) + len(completion) - 1)
            ids[i, : len(prompt) + len(completion)] = torch.tensor(prompt + completion)
            mask[i, span], old[i, span], advantage[i, span] = 1.0, logprobs, a
        logits = self.model(input_ids=ids).logits[:, :-1]
        logprobs_now = logits.log_softmax(-1).gather(2, ids[:, 1:, None])[..., 0]
        return (logprobs_now - old) * mask, mask, advantage

    def update(self, rows: list[Any], scale: float) -> None:
        """Four optimizer steps under one M2PO range, found over the whole batch."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.args.lr * scale
        order = torch.randperm(len(rows), generator=self.draws).tolist()
        size = math.ceil(len(rows) / self.args.minibatches)
        for start in range(0, len(rows), size):
            log_ratio, mask, advantage = self.forward([rows[i] for i in order[start : start + size]])
            low, high = m2po_range(log_ratio.detach()[mask > 0], advantage[mask > 0], self.args.tau)
            ratio = log_ratio.exp()
            surrogate = torch.minimum(ratio * advantage, ratio.clamp(1 - low, 1 + high) * advantage)
            loss = -(surrogate * mask).sum() / mask.sum()
            self.model.zero_grad()
            loss.backward()
            for p, q in zip(self.params, self.masters, strict=True):
                q.grad = p.grad
            torch.nn.utils.clip_grad_norm_(self.masters, 1.0)
            self.optimizer.step()
            for p, q in zip(self.params, self.masters, strict=True):
                p.data.copy_(rounded(q))

    def run(self) -> dict[str, Any]:
        args = self.args
        curve = [(0, self.evaluate(1.0, 8))]
        spent = {"generate_s": 0.0, "train_s": 0.0}
        step = 0
        while step < args.steps and sum(spent.values()) < args.budget:
            t0 = time.process_time()
            rows = self.collect(step)
            t1 = time.process_time()
            self.update(rows, min(1.0, (step + 1) / 5) * max(0.1, 1 - step / args.steps))
            spent["generate_s"] += t1 - t0
            spent["train_s"] += time.process_time() - t1
            step += 1
            if step % 20 == 0:
                curve.append((step, self.evaluate(1.0, 8)))
        if curve[-1][0] != step:
            curve.append((step, self.evaluate(1.0, 8)))
        return {"seed": self.seed, "steps": step, "curve": curve, "greedy": self.evaluate(0.0, 1), **spent}


def m2po_range(log_ratio_N: torch.Tensor, advantage_N: torch.Tensor, tau: float) -> tuple[float, float]:
    """The largest kept |log r| as a PPO range [1 - low, 1 + high] (arXiv 2510.01161, algorithm 1, as a clip)."""
    risky = ((advantage_N > 0) & (log_ratio_N > 0)) | ((advantage_N < 0) & (log_ratio_N < 0))
    second = (log_ratio_N[risky] ** 2).sort().values
    if not len(second):
        return 0.95, 20.0
    kept = int((second.cumsum(0) / torch.arange(1, len(second) + 1) <= tau).sum())
    cap = float(second[max(kept - 1, 0)].sqrt())
    return min(0.95, 1 - math.exp(-cap)), min(20.0, math.exp(cap) - 1)


def main() -> None:
    parser = options(
        __doc__, seeds=[0, 1, 2], steps=80, groups=16, samples=8, minibatches=4, lr=2e-4, beta2=0.99, tau=0.003,
        budget={110.0: "CPU seconds of generation + training"},
    )  # fmt: skip
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows = [Spike(args, seed).run() for seed in args.seeds]
    if not args.json:
        rows = [row | {"curve": "  ".join(f"{step}: {value:.3f}" for step, value in row["curve"])} for row in rows]
    show(args, {"rows": rows})


if __name__ == "__main__":
    main()
