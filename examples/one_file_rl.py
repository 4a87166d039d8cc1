"""Reinforcement learning on verifiable rewards in one file: what `astra train` does, in one process.

    python examples/one_file_rl.py [--steps 45] [--seed 0] [--staleness 2] [--loss m2po]

A language model of 0.9 million parameters learns to sample right answers to `37+45=`, in about two minutes on two CPU
cores: at first 6 % of them are right, in the end more than half. `astracli` is only asked where the model lies that
ships with it. One step:

1. The engine, a copy of the model that only generates, answers P questions G times each. The answers to one question
   are a group. For every token that it draws, the engine keeps the log-probability.
2. A function grades each answer: reward 1 or 0.
3. The batch waits until it is `--staleness` versions old. In `astra train` engine and trainer work at the same time, so
   batches get old by themselves. The policy pi that trains is then newer than mu, the policy that drew the tokens.
4. Advantage A = (reward - mean of the group) / standard deviation of the group. There is no value network.
5. Loss of a token = -min(r A, clip(r, 1 - low, 1 + high) A), where r = pi / mu. With `--loss ppo`, low = high = 0.2.
   With `--loss m2po`, the range is the widest one for which the mean of (log r)^2 stays under a threshold, counted over
   the tokens that already moved the way A pushes them (arXiv 2510.01161, algorithm 1, as a clip).
6. Masters are trained in fp32 and published in bf16. Only the values that changed travel to the engine, together with a
   digest of every tensor. The engine checks the digests before it generates again.

Found in the package only: processes, GPUs, crashes and resuming, packed rows, other losses and models.
Shape letters: P questions, G answers of a group, B = P * G answers, T tokens of a row, N tokens that have a loss.
"""

from __future__ import annotations

import argparse
import hashlib
import math
import random
import re
from collections import deque
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

import torch
import transformers
from torch import Tensor

P, G = 16, 8
MAX_NEW_TOKENS = 20
MINIBATCHES = 4  # optimizer steps on each batch
LEARNING_RATE = 2e-4
TEMPERATURE = 1.3  # The likeliest answer of this model is right. At this temperature most sampled ones are wrong.
M2_THRESHOLD = 0.01
EVALUATED = 48  # held-out questions
MODEL = str(files("astracli") / "assets" / "tiny")


def draw_question(rng: random.Random, held_out: bool) -> tuple[str, int]:
    """A question and its answer. Some pairs of numbers are held out: they are evaluated and never trained on."""
    while True:
        a, b = rng.randint(10, 99), rng.randint(10, 99)
        if ((a + b) % 10 == 7) == held_out:
            return f"{a}+{b}=", a + b


def grade(text: str, answer: int) -> float:
    """1 if the last boxed number is the answer. The model writes `12 08 \\boxed{82}`: its columns, then the answer."""
    boxed = re.findall(r"\\boxed\{(\d+)\}", text)
    return float(bool(boxed) and int(boxed[-1]) == answer)


@dataclass
class Batch:
    version: int  # of the weights that drew the tokens
    prompts: list[list[int]]  # token ids, B rows
    completions: list[list[int]]  # B rows
    logprobs: list[Tensor]  # log mu of each completion's tokens: B rows, float32 [length]
    rewards_PG: Tensor


@torch.no_grad()
def generate(model: Any, prompts: list[list[int]], end: int) -> tuple[list[list[int]], list[Tensor]]:
    """One completion for each prompt, and the log-probabilities of its tokens. Prompts have the same length."""
    out = model(input_ids=torch.tensor(prompts), use_cache=True, logits_to_keep=1)
    done_B = torch.zeros(len(prompts), dtype=torch.bool)
    tokens, logprobs = [], []
    while len(tokens) < MAX_NEW_TOKENS and not bool(done_B.all()):
        if tokens:
            out = model(input_ids=tokens[-1][:, None], past_key_values=out.past_key_values, use_cache=True)
        logprobs_BV = (out.logits[:, -1] / TEMPERATURE).log_softmax(-1)
        token_B = torch.multinomial(logprobs_BV.exp(), 1)[:, 0]
        tokens.append(token_B)
        logprobs.append(logprobs_BV.gather(1, token_B[:, None])[:, 0])
        done_B |= token_B == end
    rows, logprobs_BT = torch.stack(tokens, 1).tolist(), torch.stack(logprobs, 1)
    lengths = [row.index(end) + 1 if end in row else len(row) for row in rows]
    completions = [row[:n] for row, n in zip(rows, lengths, strict=True)]
    return completions, [row_T[:n] for row_T, n in zip(logprobs_BT, lengths, strict=True)]


def sample(model: Any, tokenizer: Any, questions: list[tuple[str, int]], version: int) -> Batch:
    """G graded answers to each question."""
    prompts = [tokenizer(text)["input_ids"] for text, _ in questions for _ in range(G)]
    completions, logprobs = generate(model, prompts, tokenizer.eos_token_id)
    texts = tokenizer.batch_decode(completions, skip_special_tokens=True)
    rewards = [grade(text, questions[i // G][1]) for i, text in enumerate(texts)]
    return Batch(version, prompts, completions, logprobs, torch.tensor(rewards).view(-1, G))


def evaluate(model: Any, tokenizer: Any) -> tuple[float, float]:
    """Share of right answers to held-out questions, G samples each, and its standard error over the questions."""
    rng = random.Random(1234)
    batch = sample(model, tokenizer, [draw_question(rng, held_out=True) for _ in range(EVALUATED)], version=0)
    means_P = batch.rewards_PG.mean(1)
    return float(means_P.mean()), float(means_P.std() / math.sqrt(len(means_P)))


def group_advantages(rewards_PG: Tensor) -> Tensor:
    """[P, G]. A group whose rewards are all equal gets zeros: it says nothing about which answer is better."""
    return (rewards_PG - rewards_PG.mean(1, keepdim=True)) / (rewards_PG.std(1, keepdim=True) + 1e-5)


def m2po_range(log_ratio_N: Tensor, advantage_N: Tensor) -> tuple[float, float]:
    """How far r may go below and above 1 so that the mean of (log r)^2 over the risky tokens is under the threshold."""
    risky_N = log_ratio_N * advantage_N > 0
    moment, _ = (log_ratio_N[risky_N] ** 2).sort()
    mean_of_smallest = moment.cumsum(0) / torch.arange(1, len(moment) + 1)
    kept = int((mean_of_smallest <= M2_THRESHOLD).sum())
    if kept == len(moment):
        return 0.95, 20.0  # Nothing has to be bounded.
    widest = max(float(moment[kept - 1].sqrt()) if kept else 0.0, math.sqrt(M2_THRESHOLD))
    return 1 - math.exp(-widest), math.exp(widest) - 1


def policy_loss(log_ratio_N: Tensor, advantage_N: Tensor, kind: str) -> tuple[Tensor, float]:
    """The loss, and the share of tokens whose gradient the clip takes away."""
    low, high = (0.2, 0.2) if kind == "ppo" else m2po_range(log_ratio_N.detach(), advantage_N)
    free_N = log_ratio_N.exp() * advantage_N
    clipped_N = log_ratio_N.exp().clamp(1 - low, 1 + high) * advantage_N
    return -torch.minimum(free_N, clipped_N).mean(), float((clipped_N < free_N).float().mean())


def log_ratios(model: Any, batch: Batch, rows: list[int]) -> tuple[Tensor, Tensor]:
    """log(pi / mu) [N] of all completion tokens of these rows, and the row of each token."""
    full = [batch.prompts[i] + batch.completions[i] for i in rows]
    width = max(map(len, full))
    # Padding on the right: neither causal attention nor a recurrent state carries it to earlier tokens.
    ids_RT = torch.tensor([row + [0] * (width - len(row)) for row in full])
    logprobs_RT = (model(input_ids=ids_RT).logits[:, :-1] / TEMPERATURE).log_softmax(-1)
    logprobs_RT = logprobs_RT.gather(2, ids_RT[:, 1:, None])[..., 0]
    now = [
        row_T[len(batch.prompts[i]) - 1 : len(full[k]) - 1]
        for k, (i, row_T) in enumerate(zip(rows, logprobs_RT, strict=True))
    ]
    row_N = torch.tensor([i for i in rows for _ in batch.completions[i]])
    return torch.cat(now) - torch.cat([batch.logprobs[i] for i in rows]), row_N


class Trainer:
    """fp32 masters; the model that computes holds them rounded to bf16, as the engine does."""

    def __init__(self, model: Any, steps: int):
        self.model, self.steps, self.version = model, steps, 0
        self.masters = {name: p.detach().clone() for name, p in model.named_parameters()}
        self.optimizer = torch.optim.AdamW(self.masters.values(), betas=(0.9, 0.99))
        self.round()

    def round(self) -> None:
        for name, p in self.model.named_parameters():
            p.data.copy_(self.masters[name].bfloat16())

    def step(self, batch: Batch, kind: str) -> dict[str, float]:
        """Train on one batch in MINIBATCHES optimizer steps. Returns figures of the step."""
        self.optimizer.param_groups[0]["lr"] = LEARNING_RATE * (1 - 0.8 * self.version / self.steps)
        advantage_B = group_advantages(batch.rewards_PG).flatten()
        order, clipped, ratio = torch.randperm(len(batch.prompts)).tolist(), 0.0, math.nan
        for rows in (order[i::MINIBATCHES] for i in range(MINIBATCHES)):
            log_ratio_N, row_N = log_ratios(self.model, batch, rows)
            loss, share = policy_loss(log_ratio_N, advantage_B[row_N], kind)
            self.model.zero_grad()
            loss.backward()
            for name, p in self.model.named_parameters():
                self.masters[name].grad = p.grad
            torch.nn.utils.clip_grad_norm_(list(self.masters.values()), 1.0)
            self.optimizer.step()
            self.round()
            clipped += share / MINIBATCHES
            if rows[0] == order[0]:  # before the first update
                ratio = float(log_ratio_N.detach().exp().mean())
        self.version += 1
        return {"clipped": clipped, "ratio": ratio}


Delta = tuple[dict[str, tuple[Tensor, Tensor]], dict[str, str]]
"""By name: places in the flattened tensor and their new values (bf16); digest of the tensor with these changes."""


def digest(values: Tensor) -> str:
    """Of a bf16 tensor's raw bits."""
    return hashlib.blake2b(values.view(torch.int16).numpy().tobytes(), digest_size=16).hexdigest()


def bf16_weights(model: Any) -> dict[str, Tensor]:
    return {name: p.detach().bfloat16().flatten() for name, p in model.named_parameters()}


def make_delta(old: dict[str, Tensor], new: dict[str, Tensor]) -> Delta:
    """The bits that differ between two versions. They are compared as integers: -0.0 and 0.0 differ."""
    places = {n: (old[n].view(torch.int16) != new[n].view(torch.int16)).nonzero()[:, 0] for n in new}
    return {n: (places[n], new[n][places[n]]) for n in new}, {n: digest(new[n]) for n in new}


def apply_delta(model: Any, delta: Delta) -> None:
    """Write a delta into the engine's model. Raises ValueError if a tensor is not what the trainer published."""
    changes, digests = delta
    for name, p in model.named_parameters():
        places, values = changes[name]
        p.data.view(-1)[places] = values.float()
        if digest(p.data.bfloat16().flatten()) != digests[name]:
            raise ValueError(f"after the update `{name}` is not what the trainer published")


def train(steps: int, seed: int, staleness: int, kind: str, every: int = 10) -> dict[str, Any]:
    """Returns the evaluations by step, and of every step the mean reward and the staleness of its batch."""
    torch.manual_seed(seed)
    rng = random.Random(seed)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    tokenizer = transformers.AutoTokenizer.from_pretrained(MODEL)
    load = transformers.AutoModelForCausalLM.from_pretrained
    engine, trainer = load(MODEL, dtype=torch.float32), Trainer(load(MODEL, dtype=torch.float32), steps)
    engine.load_state_dict(trainer.model.state_dict())  # version 0 travels in full
    published = bf16_weights(trainer.model)
    queue: deque[Batch] = deque()
    log: dict[str, Any] = {"held_out": {0: evaluate(engine, tokenizer)}, "reward": [], "staleness": []}
    print(f"step 0: held-out {log['held_out'][0][0]:.3f}", flush=True)
    while trainer.version < steps:
        while len(queue) <= staleness:
            questions = [draw_question(rng, held_out=False) for _ in range(P)]
            queue.append(sample(engine, tokenizer, questions, trainer.version))
        batch = queue.popleft()
        log["staleness"].append(trainer.version - batch.version)
        log["reward"].append(float(batch.rewards_PG.mean()))
        figures = trainer.step(batch, kind)
        before, published = published, bf16_weights(trainer.model)
        delta = make_delta(before, published)
        apply_delta(engine, delta)
        changed = sum(len(places) for places, _ in delta[0].values()) / sum(map(len, published.values()))
        line = f"step {trainer.version}: reward {log['reward'][-1]:.3f}, staleness {log['staleness'][-1]}, "
        line += f"ratio {figures['ratio']:.3f}, clipped {figures['clipped']:.1%}, values changed {changed:.0%}"
        if trainer.version % every == 0 or trainer.version == steps:
            mean, error = log["held_out"][trainer.version] = evaluate(engine, tokenizer)
            line += f", held-out {mean:.3f} +- {error:.3f}"
        print(line, flush=True)
    return log


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Reinforcement learning on verifiable rewards in one file.")
    parser.add_argument("--steps", type=int, default=45)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--staleness", type=int, default=2, help="versions that a batch waits before it is trained on")
    parser.add_argument("--loss", choices=["m2po", "ppo"], default="m2po")
    args = parser.parse_args()
    torch.set_num_threads(1)  # the model is so small that threads would wait for each other
    train(args.steps, args.seed, args.staleness, args.loss)
