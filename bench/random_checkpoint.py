"""A checkpoint of random weights: the shape of a known model, the shipped tokenizer, bf16 (A_log fp32).

    python bench/random_checkpoint.py OUT [--shape 4b] [--device cuda | cpu]

For benches that need a model's size and not its mind: `bench/random-4b.toml` trains it with `reward = "probe"`. The
weights are drawn so that activations stay near 1 through the layers. Writes text-layout safetensors of 4 GB each.
"""

from __future__ import annotations

import json
import shutil
import sys
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from astracli.models import registry

sys.path.insert(0, str(Path(__file__).resolve().parent))
from shared import options, show

SHARD_BYTES = 4 << 30


def config_of(shape: str) -> dict[str, Any]:
    """config.json of the known text model whose name ends in `shape`, or the adapter's own tiny one."""
    adapter = registry.get("qwen3_5")
    if shape == "tiny":
        assert adapter.tiny_config is not None
        return adapter.text_only_config(adapter.tiny_config()) | {"max_position_embeddings": 1024}
    found = [config for name, config in adapter.known_configs.items() if name.lower().endswith(shape.lower())]
    if not found:
        raise SystemExit(f"no known model ends in `{shape}`: {', '.join(adapter.known_configs)}")
    small = adapter.text_only_config(adapter.tiny_config()) if adapter.tiny_config else {}
    rope = {"rope_type": "default", "rope_theta": 1e7, "partial_rotary_factor": 0.25, "mrope_section": [11, 11, 10]}
    own = {"rope_parameters": rope, "max_position_embeddings": 32768, "dtype": "bfloat16", "linear_key_head_dim": 128}
    keep = ("eos_token_id", "pad_token_id", "linear_conv_kernel_dim")
    own |= {"linear_value_head_dim": 128, "linear_num_key_heads": 16} | {name: small[name] for name in keep}
    text = found[0].get("text_config", found[0])
    return adapter.text_only_config(own | dict(text))


def write(out: Path, config: dict[str, Any], device: str, seed: int = 0) -> None:
    adapter = registry.get("qwen3_5")
    assert adapter.shapes is not None
    tiny = Path(str(files("astracli") / "assets" / "tiny"))
    out.mkdir(parents=True, exist_ok=True)
    for file in tiny.iterdir():
        if file.suffix != ".safetensors" and file.name != "config.json":
            shutil.copyfile(file, out / file.name)
    (out / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    draw = torch.Generator(device=device).manual_seed(seed)
    shards: list[dict[str, torch.Tensor]] = [{}]
    for name, shape in adapter.shapes(config).items():
        wide = any(part in name for part in adapter.keep_fp32)
        if len(shape) == 1:
            tensor = (
                torch.zeros(shape, device=device)
                if "norm" in name
                else torch.rand(shape, generator=draw, device=device)
            )
            tensor = tensor + 1.0 if name.endswith("linear_attn.norm.weight") else tensor
        else:
            scale = 0.02 if "embed" in name else shape[-1] ** -0.5
            tensor = torch.randn(shape, generator=draw, device=device).mul_(scale)
        if sum(t.nbytes for t in shards[-1].values()) > SHARD_BYTES:
            shards.append({})
        shards[-1][name] = tensor.to(torch.float32 if wide else torch.bfloat16).cpu()
    placed: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        file_name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        save_file(shard, out / file_name, metadata={"format": "pt"})
        placed |= dict.fromkeys(shard, file_name)
    index = {"metadata": {}, "weight_map": placed}
    (out / "model.safetensors.index.json").write_text(json.dumps(index))


def main() -> None:
    parser = options(__doc__, shape="4b", device="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("out", type=Path)
    args = parser.parse_args()
    write(args.out, config_of(args.shape), args.device)
    size = sum(file.stat().st_size for file in args.out.glob("*.safetensors"))
    show(args, {"out": str(args.out), "gb": size / 1e9})


if __name__ == "__main__":
    main()
