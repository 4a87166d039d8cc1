"""Try an adapter on the smallest model of its family: loading, names, sizes, log-probabilities, and that rows do not
see each other."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch

from astracli.errors import UserError
from astracli.kernels import varlen
from astracli.models.adapter import ModelAdapter
from astracli.training import packing
from astracli.training.logprob import PolicyModel

LENGTHS = (19, 7, 30)
"""Tokens of the sequences that are padded, and packed, together."""
TOLERANCE = {"cpu": 1e-4, "cuda": 2e-2}
"""Largest |difference| of fp32 logits between a sequence alone and beside others. For other shapes GPU kernels choose
other tilings, and may round matrix products to TF32. Logits have a standard deviation near 1."""


def check(adapter: ModelAdapter, device: str = "cpu") -> dict[str, Any]:
    """Report {"adapter", "ok", "checks": [{"name", "status", "value"}]}. Raises UserError without a tiny config."""
    if adapter.tiny_config is None:
        raise UserError(f"adapter `{adapter.name}` brings no tiny_config to try it on", "give ModelAdapter.tiny_config")
    checks: list[dict[str, str]] = []
    with tempfile.TemporaryDirectory() as folder:
        try:
            config, model = load_tiny(adapter, Path(folder), device)
        except Exception as error:  # whatever a foreign adapter raises is the finding
            checks.append({"name": "load", "status": "fail", "value": _words(error)})
        else:
            checks.append({"name": "load", "status": "ok", "value": type(model).__name__})
            checks += (_result(name, probe) for name, probe in _probes(adapter, config, model))
    return {"adapter": adapter.name, "ok": all(c["status"] == "ok" for c in checks), "checks": checks}


def load_tiny(adapter: ModelAdapter, folder: Path, device: str = "cpu") -> tuple[dict[str, Any], Any]:
    """A random tiny checkpoint as transformers writes it, loaded as the trainer loads it."""
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.utils import logging

    assert adapter.tiny_config is not None
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.manual_seed(0)
    # Wide weights: logits of a standard deviation near 1, so that a row that sees its neighbour shows.
    config = AutoConfig.for_model(**adapter.tiny_config() | {"initializer_range": 0.15})
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    model = adapter.load_for_training(folder, attention="sdpa").eval()
    if device == "cpu" and adapter.prepare_cpu is not None:
        adapter.prepare_cpu(model)
    model.to(device)
    return json.loads((folder / "config.json").read_text()), model


def _probes(
    adapter: ModelAdapter, config: dict[str, Any], model: Any
) -> Iterator[tuple[str, Callable[[], tuple[bool, str]]]]:
    yield "block classes", lambda: (True, ", ".join(sorted(adapter.block_classes(model))))
    yield "wire names", lambda: _wire(adapter, model)
    yield "parameter count", lambda: _count(adapter, config, model)
    yield "output head", lambda: _head(model)
    yield "padded rows == separate", lambda: _padded(adapter, model)
    if adapter.install_varlen is not None or not adapter.hybrid:
        yield "packed row == separate", lambda: _packed(adapter, model)
    if adapter.shares_prompts:
        yield "shared prompt == separate", lambda: _shared(adapter, model)


def _result(name: str, probe: Callable[[], tuple[bool, str]]) -> dict[str, str]:
    try:
        good, value = probe()
    except Exception as error:  # a broken adapter may raise anything; that is what is reported
        good, value = False, _words(error)
    return {"name": name, "status": "ok" if good else "fail", "value": value}


def _words(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


def _wire(adapter: ModelAdapter, model: Any) -> tuple[bool, str]:
    """Every trained parameter travels once, under one name, fp32 exactly where `keep_fp32` says so."""
    wire = adapter.wire_tensors(model)
    parameters = {name: tuple(p.shape) for name, p in model.named_parameters() if p.requires_grad}
    lost = sorted(parameters.keys() - wire.keys())
    extra = sorted(wire.keys() - parameters.keys())
    twice = len(wire) - len({tensor.name for tensor in wire.values()})
    shapes = sorted(n for n in wire.keys() & parameters.keys() if tuple(wire[n].shape) != parameters[n])
    wanted = {
        n: "float32" if any(part in t.name for part in adapter.keep_fp32) else "bfloat16" for n, t in wire.items()
    }
    dtypes = sorted(n for n, t in wire.items() if t.dtype != wanted[n])
    problems = [("unmapped", lost), ("left over", extra), ("wrong shape", shapes), ("wrong dtype", dtypes)]
    found = [f"{what}: {', '.join(names)}" for what, names in problems if names]
    found += [f"{twice} names used twice"] if twice else []
    return not found, "; ".join(found) or f"{len(wire)} tensors"


def _count(adapter: ModelAdapter, config: dict[str, Any], model: Any) -> tuple[bool, str]:
    said, counted = adapter.memory_shape(config).parameters, sum(p.numel() for p in model.parameters())
    return said == counted, f"{counted}" if said == counted else f"memory_shape says {said}, the model has {counted}"


def _head(model: Any) -> tuple[bool, str]:
    """The trainer multiplies hidden states by the output head's weight: the model must do nothing else to its logits
    (scale or cap them)."""
    row = _rows(model)[0]
    predict = torch.arange(len(row) - 1, device=row.device)
    with torch.no_grad():
        trained = PolicyModel(model)(row[None], None, None, predict, row[1:])[0]
        logprobs = model(input_ids=row[None], use_cache=False).logits[0, :-1].float().log_softmax(-1)
    worst = float((logprobs[predict, row[1:]] - trained).abs().max())
    allowed = TOLERANCE[row.device.type]
    return worst <= allowed, f"largest |difference of log-probabilities| {worst:.1e} (at most {allowed:.0e})"


def _rows(model: Any) -> list[Any]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(2, model.config.vocab_size, (n,), generator=generator).to(model.device) for n in LENGTHS]


def _alone(model: Any, rows: list[Any]) -> list[Any]:
    with torch.no_grad():
        return [model(input_ids=row[None], use_cache=False).logits[0] for row in rows]


def _padded(adapter: ModelAdapter, model: Any) -> tuple[bool, str]:
    rows = _rows(model)
    ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    mask = (torch.arange(ids.shape[1])[None] < torch.tensor(LENGTHS)[:, None]).long().to(model.device)
    options = {"position_ids": adapter.position_ids(mask)} if adapter.position_ids is not None else {}
    with torch.no_grad():
        logits = model(input_ids=ids, attention_mask=adapter.attention_mask(mask), use_cache=False, **options).logits
    return _close([logits[i, : len(row)] for i, row in enumerate(rows)], _alone(model, rows))


def _packed(adapter: ModelAdapter, model: Any) -> tuple[bool, str]:
    rows = _rows(model)
    alone = _alone(model, rows)
    varlen.install(model, adapter)
    bounds = np.cumsum([0, *LENGTHS])
    positions = torch.from_numpy(packing.positions(bounds))[None].to(model.device)
    options = varlen.boundaries(bounds, model.device)
    with torch.no_grad():
        packed = model(input_ids=torch.cat(rows)[None], position_ids=positions, use_cache=False, **options)
    return _close(list(packed.logits[0].split(list(LENGTHS))), alone)


def _shared(adapter: ModelAdapter, model: Any) -> tuple[bool, str]:
    """The first of the sequences is a prompt; the others go on from it, and from its last token."""
    prompt, *answers = _rows(model)
    alone = _alone(model, [torch.cat([prompt, answer]) for answer in answers])
    varlen.install(model, adapter)
    parts = [prompt[:-1], *(torch.cat([prompt[-1:], answer]) for answer in answers)]
    bounds, parents = np.cumsum([0, *map(len, parts)]), np.array([-1] + [0] * len(answers))
    positions = torch.from_numpy(packing.positions(bounds, parents))[None].to(model.device)
    options = varlen.boundaries(bounds, model.device, parents)
    with torch.no_grad():
        logits = model(input_ids=torch.cat(parts)[None], position_ids=positions, use_cache=False, **options).logits[0]
    found = [logits[a:b] for a, b in pairwise(bounds[1:])]
    return _close(found, [whole[len(prompt) - 1 :] for whole in alone])


def _close(found: list[Any], alone: list[Any]) -> tuple[bool, str]:
    worst = max(float((a - b).abs().max()) for a, b in zip(found, alone, strict=True))
    allowed = TOLERANCE[found[0].device.type]
    return worst <= allowed, f"largest |difference of logits| {worst:.1e} (at most {allowed:.0e})"
