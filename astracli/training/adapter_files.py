"""A run's LoRA adapter as `peft` stores one: adapter_config.json and adapter_model.safetensors.

Source: https://huggingface.co/docs/peft/en/developer_guides/checkpoint. Factors are fp32, as they were trained. Names
are those of the language model as `AutoModelForCausalLM` loads it.
"""

from __future__ import annotations

import json
from pathlib import Path

from safetensors.torch import save_file

from astracli.config.recipe import ModelTable
from astracli.models.lora_targets import last_name
from astracli.process.atomic import whole_folder
from astracli.runs.run_dir import ORIGIN
from astracli.training.lora import Adapters

PREFIX = "base_model.model."


def config(adapters: Adapters, model: ModelTable) -> dict[str, object]:
    """What adapter_config.json says."""
    table = adapters.table
    names = dict.fromkeys(last_name(target.name) for target in adapters.targets)
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": model.path,
        "revision": model.revision,
        "r": table.rank,
        "lora_alpha": int(table.alpha) if table.alpha == int(table.alpha) else table.alpha,
        "lora_dropout": 0.0,
        "target_modules": list(names) if table.targets == "auto" else list(table.targets),
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "inference_mode": True,
        "modules_to_save": None,
        "use_dora": False,
        "use_rslora": False,
    }


def write(out: Path, adapters: Adapters, model: ModelTable, *, step: int) -> Path:
    """Write the adapter into the directory `out`, replacing what is there; `step`: the steps that it was trained."""
    with whole_folder(out) as working:
        tensors = {
            f"{PREFIX}{name}.weight": factor.detach().cpu().contiguous() for name, factor in adapters.factors.items()
        }
        save_file(tensors, working / "adapter_model.safetensors", metadata={"format": "pt"})
        text = json.dumps(config(adapters, model), indent=2, sort_keys=True)
        (working / "adapter_config.json").write_text(text + "\n")
        (working / ORIGIN).write_text(json.dumps({"step": step, "layout": "adapter"}) + "\n")
    return out
