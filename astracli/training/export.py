"""A trained model as a Hugging Face directory: in the layout it was loaded from, or its text part alone.

Same layout: every shard of the source checkpoint is written again under its own name. Trained tensors are replaced,
others (vision tower, mtp head) copied; config, processor and tokenizer files come along. Text only: the trained tensors
under their wire names, and the text config that the adapter derives. The directory is written beside its place and
renamed into it when whole.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from huggingface_hub import save_torch_state_dict
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from astracli.config import reading
from astracli.errors import RunFailed
from astracli.models.adapter import SHARD_INDEX, ModelAdapter, read_config
from astracli.models.adapter_tools import is_buffer
from astracli.process.atomic import whole_folder
from astracli.runs.run_dir import ORIGIN

SHARD_BYTES = 4 * 2**30
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf")
_PROCESSOR = ("preprocessor_config.json", "video_preprocessor_config.json", "processor_config.json")


def export(
    out: Path,
    model_dir: Path,
    tensors: Mapping[str, Tensor],
    adapter: ModelAdapter,
    *,
    text_only: bool = False,
    step: int | None = None,
) -> Path:
    """Write `tensors` (wire name -> wire dtype, CPU) as a checkpoint at `out`, replacing what is there. Returns `out`.
    `step`: the steps that they were trained, which `ORIGIN` beside them then says.

    Raises RunFailed naming tensors that the source does not hold, holds in another shape, or holds untrained.
    """
    with whole_folder(out) as working:
        if text_only:
            save_torch_state_dict(dict(tensors), working, max_shard_size=SHARD_BYTES)
            config = json.dumps(adapter.text_only_config(read_config(model_dir)), indent=2, sort_keys=True)
            (working / "config.json").write_text(config + "\n")
            _copy_files(model_dir, working, but=("config.json", *_PROCESSOR))
        else:
            _write_as_source(working, model_dir, tensors, adapter)
            _copy_files(model_dir, working)
        if step is not None:
            origin = {"step": step, "layout": "text" if text_only else "source"}
            (working / ORIGIN).write_text(json.dumps(origin) + "\n")
    return out


def source_names(model_dir: Path, tensors: Mapping[str, Tensor], adapter: ModelAdapter) -> dict[str, str | None]:
    """Name in the source's files -> the wire name that replaces it, or None to copy it; tied copies are left out.

    Raises RunFailed when trained tensors and source do not cover each other.
    """
    in_files: dict[str, tuple[int, ...]] = {}
    for file in _shards(model_dir):
        with safe_open(file, framework="pt") as source:
            in_files |= {name: tuple(source.get_slice(name).get_shape()) for name in source.keys()}  # noqa: SIM118
    tied = bool(read_config(model_dir).get("tie_word_embeddings"))
    result: dict[str, str | None] = {}
    untrained, misshapen = [], []
    for name, shape in in_files.items():
        wire = adapter.wire_name(name)
        if wire is not None and wire not in tensors:
            if is_buffer(wire):
                result[name] = None
            elif not (tied and wire.endswith("lm_head.weight")):
                untrained.append(name)
            continue
        if wire is not None and tuple(tensors[wire].shape) != shape:
            misshapen.append(f"{name} {list(shape)} -> {list(tensors[wire].shape)}")
        result[name] = wire
    missing = sorted(set(tensors) - {wire for wire in result.values() if wire})
    for what, names in (("not in the source", missing), ("not trained", untrained), ("of another shape", misshapen)):
        if names:
            raise RunFailed(
                f"cannot export onto `{model_dir}`: {len(names)} tensors {what}: {', '.join(names[:8])}",
                f"adapter `{adapter.name}` does not fit this checkpoint",
            )
    return result


def frozen_tensors(model_dir: Path, adapter: ModelAdapter) -> dict[str, Tensor]:
    """Name in the source's files -> tensor, of everything that is never trained."""
    result: dict[str, Tensor] = {}
    for file in _shards(model_dir):
        with safe_open(file, framework="pt") as source:
            result |= {name: source.get_tensor(name) for name in source.keys() if adapter.wire_name(name) is None}  # noqa: SIM118
    return result


def _shards(model_dir: Path) -> list[Path]:
    shards = sorted(model_dir.glob("*.safetensors"))
    index = model_dir / SHARD_INDEX
    if index.exists():
        named = set(reading.from_json(index.read_text())["weight_map"].values())
        shards = [shard for shard in shards if shard.name in named]
    if not shards:
        raise RunFailed(f"no .safetensors file in `{model_dir}`", "the source checkpoint must still be there to export")
    return shards


def _write_as_source(working: Path, model_dir: Path, tensors: Mapping[str, Tensor], adapter: ModelAdapter) -> None:
    """One source shard in memory at a time."""
    names = source_names(model_dir, tensors, adapter)
    placed: dict[str, str] = {}
    total = 0
    for file in _shards(model_dir):
        shard: dict[str, Tensor] = {}
        with safe_open(file, framework="pt") as source:
            for name in names.keys() & source.keys():
                wire, tensor = names[name], source.get_tensor(name)
                if wire is not None:  # the dtype is the wider of the two: readers find the precision they expect
                    tensor = tensors[wire].to(torch.promote_types(tensors[wire].dtype, tensor.dtype))
                shard[name] = tensor.contiguous()
        save_file(shard, working / file.name, metadata={"format": "pt"})
        placed |= dict.fromkeys(shard, file.name)
        total += sum(t.nbytes for t in shard.values())
    if (model_dir / SHARD_INDEX).exists():
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(placed.items()))}
        (working / SHARD_INDEX).write_text(json.dumps(index, indent=2) + "\n")


def _copy_files(model_dir: Path, working: Path, but: Iterable[str] = ()) -> None:
    """Everything of the source that holds no weights: config, tokenizer, chat template, processor, licence."""
    for file in sorted(model_dir.iterdir()):
        weights = file.name.endswith(_WEIGHTS) or file.name.endswith(".index.json")
        if file.is_file() and not weights and not file.name.startswith(".") and file.name not in (*but, ORIGIN):
            shutil.copyfile(file, working / file.name)
