"""A checkpoint of random weights: `python -m astracli.training.random_weights SOURCE OUT ADAPTER SEED`.

Config, tokenizer and tensor names are those of SOURCE; what is never trained is copied from it.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from astracli.models import registry
from astracli.models.adapter import ModelAdapter
from astracli.training.export import export
from astracli.training.optimizer import DTYPES


def write(source: Path, out: Path, adapter: ModelAdapter, seed: int) -> None:
    """Draw every trained tensor as the model class does when it is made from its config, on the CPU."""
    loaded = adapter.load_for_training(source, attention="sdpa")
    torch.manual_seed(seed)
    model = type(loaded)(loaded.config).float()
    parameters = dict(model.named_parameters())
    wire = adapter.wire_tensors(model)
    export(
        out, source, {one.name: parameters[name].detach().to(DTYPES[one.dtype]) for name, one in wire.items()}, adapter
    )


if __name__ == "__main__":
    _, source, out, name, seed = sys.argv
    write(Path(source), Path(out), registry.get(name), int(seed))
