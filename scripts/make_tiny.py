"""Make the shipped tiny model: a 0.9M-parameter hybrid Qwen3.5 that knows how to add and subtract, but is unsure.

    python scripts/make_tiny.py [--out astracli/assets/tiny] [--steps 600] [--smoothing 0.08] [--threads 2]

It is trained from scratch on worked arithmetic with label smoothing, by `astra sft tiny-sft`: the smoothed targets
teach the way (greedy decoding is right) and leave a fixed amount of noise on every token (sampling at temperature 1 is
often wrong). That is the gap that reinforcement learning closes in a few minutes on a CPU. Operand pairs held out for
evaluation are never drawn.
Takes about 4 minutes on two cores. Seeded; prints the figures that the package's tests hold the model to.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3_5ForCausalLM, Qwen3_5TextConfig

import astracli
from astracli.data import arithmetic
from astracli.models.adapter import chat_prompt_tokens
from astracli.rewards.grader import grade_math
from astracli.runs.run_dir import ORIGIN

CONTENT = [*"0123456789+-*= ", "\\boxed{", "}"]
PAD, EOS, UNK = 0, 1, 2
VOCAB_SIZE = 32
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['content'] }}{% endfor %}{% if add_generation_prompt %}={% endif %}"
)


def build_tokenizer(content: Sequence[str] = CONTENT, chat_template: str = CHAT_TEMPLATE) -> PreTrainedTokenizerFast:
    """One token a character, and one for each longer text of `content`, such as `\\boxed{`."""
    longer = [re.escape(text) for text in sorted(content, key=len, reverse=True) if len(text) > 1]
    vocab = {token: i for i, token in enumerate(["<pad>", "<eos>", "<unk>", *content])}
    core = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Split(Regex("|".join([*longer, r"[\s\S]"])), behavior="isolated")
    core.decoder = decoders.Fuse()
    core.add_special_tokens([AddedToken(t, special=True) for t in ("<pad>", "<eos>", "<unk>")])
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<pad>",
        eos_token="<eos>",
        unk_token="<unk>",
        chat_template=chat_template,
        clean_up_tokenization_spaces=False,
        model_max_length=512,
    )


def build_config(**changes: int) -> Qwen3_5TextConfig:
    """The published 4B's proportions at hidden 128: three Gated DeltaNet layers, then one of full attention."""
    sizes = {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 128,
        "intermediate_size": 384,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "linear_num_key_heads": 4,
        "linear_num_value_heads": 4,
    }
    return Qwen3_5TextConfig(
        **(sizes | changes),
        num_hidden_layers=4,
        head_dim=32,
        linear_key_head_dim=32,
        linear_value_head_dim=32,
        linear_conv_kernel_dim=4,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        pad_token_id=PAD,
        eos_token_id=EOS,
        rope_parameters={
            "rope_type": "default",
            "rope_theta": 10000.0,
            "partial_rotary_factor": 0.25,
            "mrope_section": [2, 1, 1],
            "mrope_interleaved": True,
        },
    )


def learn(start: Path, out: Path, changes: Mapping[str, Any], run_dir: Path | None = None) -> astracli.Run:
    """`astra sft tiny-sft` from the checkpoint `start`, with the recipe changed; its export becomes `out`. `run_dir`:
    where the run stays; None: it is removed."""
    recipe = astracli.load("tiny-sft", {"model.path": str(start), "model.weights": "checkpoint", **changes})
    with tempfile.TemporaryDirectory() as folder:
        run = astracli.sft(recipe, run_dir=run_dir or Path(folder) / "run")
        shutil.rmtree(out, ignore_errors=True)
        shutil.copytree(run.export_path, out, ignore=shutil.ignore_patterns(ORIGIN))
    for file in out.iterdir():
        file.chmod(0o644)
    return run


@torch.inference_mode()
def score(
    model: torch.nn.Module, tokenizer: PreTrainedTokenizerFast, *, temperature: float, samples: int
) -> dict[str, float]:
    """Share of right answers on the held-out items, by level and over all."""
    torch.manual_seed(0)
    right: dict[str, list[float]] = {}
    items = arithmetic.held_out()
    for length in sorted({len(p.question) for p in items}):
        same = [p for p in items if len(p.question) == length]
        ids = torch.tensor([chat_prompt_tokens(tokenizer, p.question) for p in same]).repeat_interleave(samples, 0)
        sampling = {"do_sample": True, "temperature": temperature, "top_k": 0} if temperature else {"do_sample": False}
        out = model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=24, pad_token_id=PAD, **sampling
        )
        texts = tokenizer.batch_decode(out[:, ids.shape[1] :], skip_special_tokens=True)
        for i, text in enumerate(texts):
            problem = same[i // samples]
            verdict = grade_math(problem.answer, text) == "right"
            right.setdefault(str(problem.meta["level"]), []).append(float(verdict))
    everything = [v for values in right.values() for v in values]
    return {**{k: sum(v) / len(v) for k, v in sorted(right.items())}, "all": sum(everything) / len(everything)}


def save(model: torch.nn.Module, tokenizer: PreTrainedTokenizerFast, out: Path) -> None:
    """bf16, but for what published checkpoints keep in fp32; `full_attention_interval` for engines that ask."""
    shutil.rmtree(out, ignore_errors=True)
    model = model.to(torch.bfloat16)
    for name, parameter in model.named_parameters():
        if name.endswith(("A_log", "linear_attn.norm.weight")):
            parameter.data = parameter.data.float()
    model.generation_config.eos_token_id = EOS
    model.generation_config.pad_token_id = PAD
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    config = json.loads((out / "config.json").read_text())
    config["full_attention_interval"] = 4
    (out / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    for file in out.iterdir():
        file.chmod(0o644)


def arguments(doc: str | None, name: str, **defaults: float) -> argparse.Namespace:
    """What a command line sets of a model that ships as assets/NAME; sets torch's threads."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).parents[1] / "astracli" / "assets" / name)
    for option, value in {**defaults, "seed": 0, "threads": 2}.items():
        parser.add_argument(f"--{option}", type=type(value), default=value)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    return args


def main() -> None:
    args = arguments(__doc__, "tiny", steps=600, rows=128, lr=2e-3, smoothing=0.08)
    tokenizer = build_tokenizer()
    torch.manual_seed(args.seed)
    model = Qwen3_5ForCausalLM(build_config())
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters")
    changes = {
        "train.steps": args.steps,
        "train.batch_groups": args.rows,
        "train.learning_rate": args.lr,
        "sft.label_smoothing": args.smoothing,
        "eval.every": 0,  # measured below
        "resources.threads.trainer": args.threads,
    }
    with tempfile.TemporaryDirectory() as folder:
        save(model, tokenizer, Path(folder) / "start")
        learn(Path(folder) / "start", args.out, changes)
    shipped = Qwen3_5ForCausalLM.from_pretrained(args.out, dtype=torch.float32).eval()
    for label, temperature, samples in (("T 1.0 avg@8", 1.0, 8), ("T 0.6 avg@8", 0.6, 8), ("greedy", 0.0, 1)):
        figures = score(shipped, tokenizer, temperature=temperature, samples=samples)
        print(f"{label:12s}", "  ".join(f"{k} {v:.3f}" for k, v in figures.items()), flush=True)
    print(f"{sum(f.stat().st_size for f in args.out.iterdir()):,} bytes in {args.out}")


if __name__ == "__main__":
    main()
