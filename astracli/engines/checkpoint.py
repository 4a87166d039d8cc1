"""The directory that a foreign engine is started on: the text model's config.json, and its weights if it loads them.

The text model alone is served, whatever layout the checkpoint has: some engines build an image processor
for a multimodal checkpoint, and a text server that meets names it does not know loads nothing and answers success.
"""

from __future__ import annotations

import json
from pathlib import Path

from astracli.errors import RunFailed
from astracli.models.adapter import SHARD_INDEX, ModelAdapter, read_config


def prepare(out: Path, checkpoint: Path, adapter: ModelAdapter, *, weights: bool) -> Path:
    """Make `out` a model directory of the text model; returns it.

    `weights`: False leaves them out (the engine starts from made-up ones and gets every version over the wire). Files
    whose tensors already carry wire names are linked, others are written again, text tensors only, a shard at a time.
    """
    out.mkdir(parents=True, exist_ok=True)
    config = adapter.text_only_config(read_config(checkpoint))
    config.pop("auto_map", None)  # it names code beside the checkpoint, and engines have run it unasked
    (out / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    if weights:
        _weights(out, checkpoint, adapter, tied=bool(config.get("tie_word_embeddings")))
    return out


def _weights(out: Path, checkpoint: Path, adapter: ModelAdapter, *, tied: bool) -> None:
    from safetensors import safe_open
    from safetensors.torch import save_file

    shards = sorted(checkpoint.glob("*.safetensors"))
    if not shards:
        raise RunFailed(f"no .safetensors file in `{checkpoint}`", "an engine loads safetensors checkpoints only")
    placed: dict[str, str] = {}
    for shard in shards:
        target = out / shard.name
        target.unlink(missing_ok=True)
        with safe_open(shard, framework="pt") as source:
            names = {name: adapter.wire_name(name) for name in source.keys()}  # noqa: SIM118
            wanted = {n: w for n, w in names.items() if w and not (tied and w.endswith("lm_head.weight"))}
            if all(name == wire for name, wire in names.items()):
                target.symlink_to(shard.resolve())
            elif wanted:
                tensors = {wire: source.get_tensor(name) for name, wire in wanted.items()}
                save_file(tensors, target, metadata={"format": "pt"})
        placed |= dict.fromkeys(wanted.values(), shard.name)
    index = {"metadata": {}, "weight_map": dict(sorted(placed.items()))}
    (out / SHARD_INDEX).write_text(json.dumps(index, indent=2) + "\n")
