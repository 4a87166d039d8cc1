"""A checkpoint in the published layout through the whole pipeline on one GPU: load, serve, delta, read-back, export.

    python bench/loop/published.py [--layout full text] [--steps 6] [--engine-path PYTHONPATH] [--device cuda|cpu]

`full` is the shipped tiny model's text part inside `Qwen3_5ForConditionalGeneration`, as Qwen publishes it: vision
tower, mtp tensors, fp32 `A_log` and Gated DeltaNet norms, several shards, processor files. `text` is the shipped model
itself. Each is trained for a few steps by `astra train` (SGLang on the trainer's GPU; with `--device cpu` the embedded
engine), every version verified by digest and read back under HF names; then the export is compared tensor by tensor
with the source and loaded again by transformers. Prints a line per layout; exits 1 when something does not hold.
"""

from __future__ import annotations

import argparse
import json
import sys
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, Qwen3_5Config, Qwen3_5ForConditionalGeneration

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from shared import folder, gpu_settings, options, records, show, train, trained

VISION = {
    "depth": 1, "hidden_size": 16, "intermediate_size": 32, "num_heads": 2, "num_position_embeddings": 16,
    "patch_size": 4,
}  # fmt: skip
INDEX = "model.safetensors.index.json"


def full_layout(folder: Path) -> Path:
    """The shipped text model as a multimodal checkpoint in three shards."""
    tiny = Path(str(files("astracli") / "assets" / "tiny"))
    text = json.loads((tiny / "config.json").read_text())
    torch.manual_seed(0)
    vision = VISION | {"out_hidden_size": text["hidden_size"]}
    config = Qwen3_5Config(text_config=text, vision_config=vision, tie_word_embeddings=True)
    config.architectures = ["Qwen3_5ForConditionalGeneration"]
    model = Qwen3_5ForConditionalGeneration(config).to(torch.bfloat16)
    tensors = {n: p.detach().clone() for n, p in model.named_parameters() if "visual" in n}
    trained = load_file(tiny / "model.safetensors")
    for name, tensor in trained.items():
        wide = name.endswith(("A_log", "linear_attn.norm.weight"))
        tensors[name.replace("model.", "model.language_model.", 1)] = tensor.float() if wide else tensor
    tensors["mtp.fc.weight"] = torch.randn(8, 8).bfloat16()
    path = folder / "published"
    path.mkdir()
    config.save_pretrained(path)
    for file in tiny.iterdir():
        if file.suffix != ".safetensors" and file.name != "config.json":
            (path / file.name).write_bytes(file.read_bytes())
    (path / "preprocessor_config.json").write_text(json.dumps({"image_processor_type": "Qwen2VLImageProcessorFast"}))
    names = sorted(tensors)
    placed = {name: f"model-0000{1 + i % 3}-of-00003.safetensors" for i, name in enumerate(names)}
    for shard in sorted(set(placed.values())):
        held = {name: tensors[name].contiguous() for name in names if placed[name] == shard}
        save_file(held, path / shard, metadata={"format": "pt"})
    (path / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": placed}))
    return path


def run_of(model: str, run: Path, args: argparse.Namespace) -> None:
    settings: dict[str, Any] = {"model.path": model, "train.steps": args.steps, "eval.every": args.steps // 2}
    if args.device == "cuda":
        settings |= gpu_settings(args)
        settings |= {"rollout.sglang.mem_fraction_static": 0.1, "rollout.sglang.attention_backend": "triton"}
    train(run, settings, console=None)


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def judge(layout: str, source: Path, run: Path, device: str) -> dict[str, Any]:
    """What holds of a finished run, and the figures that a reader wants."""
    before, after = tensors_of(source), tensors_of(run / "export")
    untrained = [n for n in before if "visual" in n or n.startswith("mtp.")]
    matrices = [n for n in before if n not in untrained and before[n].ndim == 2]
    found = records(run)
    updates, steps = [r for r in found if r["process"] == "rollout"], trained(found)
    model = AutoModelForCausalLM.from_pretrained(run / "export", dtype=torch.float32)
    logits = model(input_ids=torch.tensor([[6, 10, 13, 7, 8, 16]])).logits
    holds = {
        "same_names_and_dtypes": {n: t.dtype for n, t in before.items()} == {n: t.dtype for n, t in after.items()},
        "untrained_bytes_kept": all(torch.equal(before[n], after[n]) for n in untrained),
        "text_trained": all(not torch.equal(before[n], after[n]) for n in matrices),
        "other_files_kept": all(
            (run / "export" / file.name).read_bytes() == file.read_bytes()
            for file in source.iterdir()
            if file.is_file() and file.suffix != ".safetensors" and file.name not in ("config.json", INDEX)
        ),
        "reloads": bool(torch.isfinite(logits).all()),
        "last_version_applied": updates[-1]["step"] == len(steps),
        "first_version_in_full": updates[0]["kind"] == ("full" if device == "cuda" else "delta"),
        "no_resync": sum(r["resyncs"] for r in updates) == 0,
    }
    return {
        "layout": layout, "tensors": len(before), "shards": len(list(source.glob("*.safetensors"))),
        "deltas": sum(r["kind"] == "delta" for r in updates), "read_back": sum("readback_s" in r for r in updates),
        "parity_mean": max(r["parity_mean_abs"] for r in steps if "parity_mean_abs" in r),
        "parity_max": max(r["parity_max_abs"] for r in steps if "parity_max_abs" in r),
        "broken": [what for what, good in holds.items() if not good],
        "rewards": [round(r["reward_mean"], 3) for r in steps],
    }  # fmt: skip


def main() -> None:
    parser = options(
        __doc__, steps=6, device=("cuda", "cpu"),
        engine_path={str: "PYTHONPATH of the environment that holds SGLang"},
    )  # fmt: skip
    parser.add_argument("--layout", nargs="+", choices=["full", "text"], default=["full", "text"])
    args = parser.parse_args()
    rows = []
    with folder() as name:
        for layout in args.layout:
            source = full_layout(name) if layout == "full" else Path(str(files("astracli") / "assets" / "tiny"))
            run = name / f"run-{layout}"
            run_of(str(source), run, args)
            rows.append(judge(layout, source, run, args.device))
    show(args, {"rows": rows})
    sys.exit(1 if any(row["broken"] for row in rows) else 0)


if __name__ == "__main__":
    main()
