"""Make the shipped tiny model of the recipe tiny-tool: a hybrid Qwen3.5 that knows how to call a calculator, unsurely.

    python scripts/make_tiny_tool.py [--out astracli/assets/tiny-tool] [--steps 700] [--smoothing 0.06] [--threads 2]

Like the tiny model of `make_tiny.py`, whose parts it uses: trained from scratch with label smoothing, but by a loop of
its own, because some of its examples hold a mistaken call that is read and not learned. It learns
products of two numbers. Where its prompt names the calculator, it calls it (Hermes format), and answers with what comes
back; after an error it calls again. Where the prompt names no tool, it learns to answer at once, as far as so small a
model can. Prints the share of right answers on held-out products, with the tool and without.
"""

from __future__ import annotations

import argparse
import random
import time

import torch
from make_tiny import EOS, PAD, UNK, arguments, build_config, build_tokenizer, save
from transformers import PreTrainedTokenizerFast, Qwen3_5ForCausalLM

from astracli.data import arithmetic
from astracli.envs.tools import functions
from astracli.models import registry
from astracli.models.chat import ChatFormat
from astracli.models.conversation import Conversation

PIECES = [
    "<tools>", "</tools>", "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>", "calculator",
    '\n{"name": "', '", "arguments": {"expression": "', '"}}\n', "\\boxed{", "}", "error",
]  # fmt: skip
CONTENT = [*"0123456789*= ", *PIECES]
CHAT_TEMPLATE = (
    "{% if tools %}<tools>{% for tool in tools %}{{ tool.function.name }}{% endfor %}</tools>{% endif %}"
    "{% for message in messages %}"
    "{% if message.role == 'tool' %}<tool_response>{{ message.content }}</tool_response>"
    "{% elif message.role == 'assistant' %}={{ message.content }}"
    "{% for call in message.tool_calls or [] %}<tool_call>\n"
    '{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}\n</tool_call>'
    "{% endfor %}<eos>"
    "{% else %}{{ message.content }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}={% endif %}"
)
WITHOUT = 0.2
"""Share of the examples whose prompt names no tool."""
CALL = '<tool_call>\n{"name": "calculator", "arguments": {"expression": "QUESTION"}}\n</tool_call>'
MISTAKEN = 0.05
"""Share of those with a tool whose first call is answered by an error."""


class Examples:
    """What the model learns from, in tokens. The chat template is asked once: it puts the same around each text."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, tool: functions.Tool):
        def around(ids: list[int]) -> tuple[list[int], list[int]]:
            place = ids.index(self.tokens("0")[0])
            return ids[:place], ids[place + 1 :]

        self._tokenizer = tokenizer
        told, alone = Conversation(tokenizer, ChatFormat(), [tool.schema]), Conversation(tokenizer, ChatFormat())
        asked = [{"role": "user", "content": "0"}]
        self._prompt = {True: around(told.prompt(asked)), False: around(alone.prompt(asked))}
        self._behind = around(told.after([EOS], [{"role": "tool", "content": "0"}]))

    def tokens(self, text: str) -> list[int]:
        return list(self._tokenizer(text, add_special_tokens=False)["input_ids"])

    def one(self, rng: random.Random) -> tuple[list[int], list[bool]]:
        """(token ids, whether the model says them)"""
        problem = arithmetic.draw(rng.randrange(2**31), seed=1, levels=arithmetic.PRODUCTS)
        tool = rng.random() >= WITHOUT
        before, after = self._prompt[tool]
        ids = [*before, *self.tokens(problem.question), *after]
        mask = [False] * len(ids)
        call = CALL.replace("QUESTION", problem.question)
        turns = [(call, problem.answer, True)] if tool else []
        if tool and rng.random() < MISTAKEN:
            wrong = "".join(rng.choices([*"0123456789*", *PIECES], k=rng.randrange(3, 12)))
            turns.insert(0, (wrong, "error" + "?" * rng.randrange(8, 24), False))
        before, after = self._behind
        for text, result, learned in turns:
            turn, told = [*self.tokens(text), EOS], [*before, *self.tokens(result), *after]
            ids += [*turn, *told]
            mask += [learned] * len(turn) + [False] * len(told)
        answer = [*self.tokens(f"\\boxed{{{problem.answer}}}"), EOS]
        return ids + answer, mask + [True] * len(answer)

    def batch(self, rng: random.Random, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Right-padded token ids [count, T] and next-token targets [count, T], -100 on what the model does not say."""
        drawn = [self.one(rng) for _ in range(count)]
        length = max(len(ids) for ids, _ in drawn)
        tokens, targets = torch.full((count, length), PAD), torch.full((count, length), -100)
        for place, (ids, mask) in enumerate(drawn):
            tokens[place, : len(ids)] = torch.tensor(ids)
            targets[place, : len(ids) - 1] = torch.where(torch.tensor(mask), torch.tensor(ids), -100)[1:]
        return tokens, targets


def smoothed_loss(logits: torch.Tensor, targets: torch.Tensor, smoothing: float) -> torch.Tensor:
    """Cross entropy to (1 - smoothing) on the target and smoothing spread over <eos> and the content tokens."""
    logprobs = logits.log_softmax(-1)[targets >= 0]
    target = targets[targets >= 0]
    support = [EOS, *range(UNK + 1, UNK + 1 + len(CONTENT))]
    exact = -logprobs.gather(-1, target[:, None]).squeeze(-1)
    return ((1 - smoothing) * exact - smoothing * logprobs[:, support].mean(-1)).mean()


def warm_up(tokenizer: PreTrainedTokenizerFast, args: argparse.Namespace) -> torch.nn.Module:
    torch.manual_seed(args.seed)
    rng = random.Random(args.seed)
    config = build_config(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=192, num_attention_heads=2,
        num_key_value_heads=1, linear_num_key_heads=2, linear_num_value_heads=2,
    )  # fmt: skip
    model = Qwen3_5ForCausalLM(config).float()
    adapter = registry.get("qwen3_5")
    if adapter.prepare_cpu:
        adapter.prepare_cpu(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, betas=(0.9, 0.98), weight_decay=0.01)
    examples, started = Examples(tokenizer, functions.named("calculator")), time.monotonic()
    for step in range(args.steps):
        scale = min(1.0, (step + 1) / 50) * (1.0 if step < 0.7 * args.steps else 0.1)
        for group in optimizer.param_groups:
            group["lr"] = args.lr * scale
        ids, targets = examples.batch(rng, args.rows)
        loss = smoothed_loss(model(input_ids=ids).logits, targets, args.smoothing)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if (step + 1) % 50 == 0:
            print(f"step {step + 1:4d}  loss {loss.item():.4f}  {time.monotonic() - started:5.0f} s", flush=True)
    return model


@torch.inference_mode()
def score(model: torch.nn.Module, tokenizer: PreTrainedTokenizerFast, *, temperature: float, tool: bool) -> float:
    """Share of right answers on 128 held-out products, one sample each; a call is computed here."""
    torch.manual_seed(0)
    calculator = functions.named("calculator")
    conversation = Conversation(tokenizer, ChatFormat(), [calculator.schema] if tool else ())
    right = 0
    items = arithmetic.held_out(128, levels=arithmetic.PRODUCTS)
    for problem in items:
        ids = conversation.prompt([{"role": "user", "content": problem.question}])
        for _ in range(2 if tool else 1):
            sampling = (
                {"do_sample": True, "temperature": temperature, "top_k": 0} if temperature else {"do_sample": False}
            )
            given = torch.tensor([ids])
            out = model.generate(input_ids=given, attention_mask=torch.ones_like(given), max_new_tokens=24, **sampling)
            turn = out[0, len(ids) :].tolist()
            ids += turn
            text = tokenizer.decode(turn, skip_special_tokens=True)
            if tool and text == CALL.replace("QUESTION", problem.question):
                ids += conversation.after(turn, [{"role": "tool", "content": problem.answer}])
        right += text == f"\\boxed{{{problem.answer}}}"
    return right / len(items)


def main() -> None:
    args = arguments(__doc__, "tiny-tool", steps=700, rows=64, lr=3e-3, smoothing=0.06)
    tokenizer = build_tokenizer(CONTENT, CHAT_TEMPLATE)
    model = warm_up(tokenizer, args)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters")
    save(model, tokenizer, args.out)
    shipped = Qwen3_5ForCausalLM.from_pretrained(args.out, dtype=torch.float32).eval()
    for label, temperature in (("T 1.0", 1.0), ("greedy", 0.0)):
        with_tool, alone = (score(shipped, tokenizer, temperature=temperature, tool=tool) for tool in (True, False))
        print(f"{label:8s} with the calculator {with_tool:.3f}  without {alone:.3f}", flush=True)
    print(f"{sum(f.stat().st_size for f in args.out.iterdir()):,} bytes in {args.out}")


if __name__ == "__main__":
    main()
