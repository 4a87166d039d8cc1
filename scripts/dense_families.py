"""Which families of transformers the adapter `generic` serves: a table for docs/adapters-howto.md.

    python scripts/dense_families.py [--only FAMILY ...] [--write]

For every family a tiny model is made from its own config class, with random weights. It goes through what
`astra adapters check` does, then through the embedded engine: greedy and drawn completions, several at once, whose
log-probabilities must be those of the model's own forward pass. `--write` puts the table into the page.
"""

from __future__ import annotations

import argparse
import re
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from astracli.adapters import generic
from astracli.engines.contract import GenResult
from astracli.engines.embedded.decoder import Decoder
from astracli.engines.embedded.scheduler import Scheduler
from astracli.engines.embedded.table import Request
from astracli.training import adapter_check

PAGE = Path(__file__).resolve().parents[1] / "docs" / "adapters-howto.md"
BEGIN, END = "<!-- made by scripts/dense_families.py -->", "<!-- end of what it made -->"
DENSE = (
    "apertus", "arcee", "bitnet", "bloom", "codegen", "cohere", "cohere2", "cwm", "diffllama", "doge", "ernie4_5",
    "exaone4", "falcon", "gemma", "gemma2", "gemma3_text", "glm", "glm4", "gpt2", "gpt_bigcode", "gpt_neo", "gpt_neox",
    "gptj", "granite", "helium", "hunyuan_v1_dense", "jais2", "ministral", "ministral3", "mistral", "mpt", "nanochat",
    "nemotron", "olmo", "olmo2", "olmo3", "opt", "persimmon", "phi", "phi3", "seed_oss", "smollm3", "stablelm",
    "starcoder2", "vaultgemma",
)  # fmt: skip
OTHERS = ("mixtral", "olmoe", "lfm2", "minimax", "zamba2")
"""Families with experts or recurrent layers, to see that they are refused."""
SIZES: dict[str, Any] = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 256, "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2,
}  # fmt: skip
OWN: dict[str, dict[str, Any]] = {
    "gemma": {"head_dim": 8}, "gemma2": {"head_dim": 8}, "gemma3_text": {"head_dim": 8}, "vaultgemma": {"head_dim": 8},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "num_layers": 2}, "helium": {"head_dim": 8},
    "opt": {"word_embed_proj_dim": 32, "ffn_dim": 64}, "codegen": {"rotary_dim": 4}, "gptj": {"rotary_dim": 4},
    "olmoe": {"num_experts": 4}, "mixtral": {"num_local_experts": 4},
    "granite": {"logits_scaling": 8.0}, "hunyuan_v1_dense": {"head_dim": 8}, "ministral": {"head_dim": 8},
    "mistral": {"sliding_window": None},
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "minimax": {"layer_types": ["linear_attention", "full_attention"]},
}  # fmt: skip
"""What a family needs besides `SIZES`, and what its published models set where the class has another default."""
TOLERANCE = 1e-4
VERDICTS = {
    "load": "does not load",
    "block classes": "no block class",
    "output head": "scales or caps its logits, which the trainer does not compute",
    "padded rows == separate": "padded rows see each other",
    "packed row == separate": "packed rows see each other; `train.packing=padded` is not affected",
}


@dataclass(frozen=True)
class Row:
    family: str
    check: str
    """`ok`, or the names of the checks that fail."""
    engine: str
    """`ok`, or what came out."""
    why: str = ""


def tiny_config(family: str) -> dict[str, Any]:
    from transformers import CONFIG_MAPPING

    config = CONFIG_MAPPING[family]()
    sizes = {name: value for name, value in SIZES.items() if hasattr(config, name)}
    layers = getattr(config, "layer_types", None)
    if isinstance(layers, list):  # one of each kind, in the family's order
        kinds = list(dict.fromkeys(layers))[:2]
        sizes["layer_types"] = (kinds * 2)[:2]
    return {"model_type": family} | sizes | OWN.get(family, {})


def engine(model: Any) -> str:
    """`ok`, or how far the engine's log-probabilities are from those of one forward pass."""
    done: dict[str, GenResult] = {}
    rng = np.random.default_rng(3)
    prompts = [rng.integers(3, 60, size).astype(np.int64) for size in (2, 9, 17, 5)]
    scheduler = Scheduler(Decoder(model, 3))
    scheduler.submit(
        [
            Request(
                f"r{i}",
                prompt,
                deliver=lambda result: done.__setitem__(result.rid, result),
                max_new_tokens=12,
                temperature=float(i % 2),
                top_p=1.0,
                stop_token_ids=(),
                seed=i,
            )
            for i, prompt in enumerate(prompts)
        ]
    )
    while scheduler.run_once():
        pass
    worst = 0.0
    for i, prompt in enumerate(prompts):
        tokens = done[f"r{i}"].tokens
        with torch.no_grad():
            ids = torch.from_numpy(np.concatenate([prompt, tokens]))[None]
            logprobs = model(input_ids=ids, use_cache=False).logits[0].float().log_softmax(-1)
        expected = logprobs[len(prompt) - 1 : -1].gather(1, ids[0, len(prompt) :, None])[:, 0].numpy()
        worst = max(worst, float(np.abs(expected - done[f"r{i}"].logprobs).max()))
    return "ok" if worst <= TOLERANCE else f"log-probabilities differ by {worst:.1g}"


def tried(family: str) -> Row:
    """What became of one family."""
    adapter = replace(generic.ADAPTER, tiny_config=lambda: tiny_config(family))
    report = adapter_check.check(adapter)
    failed = {check["name"]: check["value"] for check in report["checks"] if check["status"] != "ok"}
    if "load" in failed:
        return Row(family, "load", "-", _reason(failed["load"]))
    with tempfile.TemporaryDirectory() as folder:
        _, model = adapter_check.load_tiny(adapter, Path(folder))
        try:
            served = engine(model)
        except Exception as error:  # whatever transformers raises is the finding
            served = "fails"
            failed.setdefault("engine", f"{type(error).__name__}: {error}")
    reasons = [
        _reason(value) if "Error" in value or "RunFailed" in value else VERDICTS.get(name, value)
        for name, value in failed.items()
    ]
    return Row(family, ", ".join(n for n in failed if n != "engine") or "ok", served, "; ".join(dict.fromkeys(reasons)))


def _reason(value: str) -> str:
    """The finding without names of this machine and of classes of errors."""
    text = re.sub(r"^(UserError|RunFailed): ", "", " ".join(value.split()))
    text = re.sub(r"(cannot load|checkpoint) `[^`]*`:? ?", "", text)
    text = re.sub(r"`/[^`]*`", "the checkpoint", text)
    if "does not support an attention implementation through" in text:
        return "transformers has no `sdpa` attention for it"
    if text.startswith("TypeError") and "NoneType" in text:
        return "its attention does not run without a mask, and packed rows have none; `train.packing=padded`"
    if "experts" in text or "router" in text:
        return "experts, which transformers fuses while loading: names of the checkpoint are not the model's"
    if "which the attention of packed rows does not compute" in text:
        what = text.split(" asks for ")[1].split(",")[0]
        return f"{what} in its attention, which packed rows do not compute; `train.packing=padded`"
    return text[:160]


def table(rows: Sequence[Row]) -> str:
    import transformers

    lines = [
        BEGIN,
        f"transformers {transformers.__version__}; tiny models with random weights, in fp32 on a CPU.",
        "",
        "| family | `adapters check` | embedded engine | what is refused, and why |",
        "|---|---|---|---|",
    ]
    ordered = sorted(rows, key=lambda row: (row.check != "ok" or row.engine != "ok", row.family))
    lines += [f"| `{row.family}` | {row.check} | {row.engine} | {row.why} |" for row in ordered]
    return "\n".join([*lines, END])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=[*DENSE, *OTHERS], metavar="FAMILY")
    parser.add_argument("--write", action="store_true", help=f"into {PAGE.name}")
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for family in args.only:
        rows.append(tried(family))
        print(rows[-1], file=sys.stderr, flush=True)
    made = table(rows)
    if not args.write:
        print(made)
        return
    text = PAGE.read_text(encoding="utf-8")
    before, _, rest = text.partition(BEGIN)
    PAGE.write_text(before + made + rest.partition(END)[2], encoding="utf-8")


if __name__ == "__main__":
    main()
