"""`astra adapters check`: the built-in adapters pass, and each kind of fault is found and named."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import transformers

from astracli.errors import UserError
from astracli.kernels import varlen
from astracli.models import registry
from astracli.models.adapter import ModelAdapter
from astracli.training import adapter_check


def findings(adapter: ModelAdapter) -> dict[str, tuple[str, str]]:
    return {c["name"]: (c["status"], c["value"]) for c in adapter_check.check(adapter)["checks"]}


@pytest.mark.parametrize("name", ["qwen3_5", "qwen3", "qwen2", "llama"])
def test_built_in_adapters_pass(name: str) -> None:
    report = adapter_check.check(registry.get(name))
    assert report["ok"] and {c["status"] for c in report["checks"]} == {"ok"}
    assert [c["name"] for c in report["checks"]][:6] == [
        "load", "block classes", "wire names", "parameter count", "output head", "padded rows == separate",
    ]  # fmt: skip


def test_a_lost_tensor_and_a_wrong_dtype_are_named() -> None:
    good = registry.get("llama")

    def wire(model: Any) -> dict[str, Any]:
        tensors = good.wire_tensors(model)
        del tensors["model.norm.weight"]
        first = next(iter(tensors))
        return tensors | {first: replace(tensors[first], dtype="float32")}

    found = findings(replace(good, wire_tensors=wire))
    status, value = found["wire names"]
    assert status == "fail" and value.startswith("unmapped: model.norm.weight; wrong dtype: model.")
    assert found["parameter count"][0] == "ok"


def test_a_wrong_size_is_told_with_both_figures() -> None:
    good = registry.get("llama")
    shape = replace(good.memory_shape(good.tiny_config()), parameters=7)  # type: ignore[misc]
    status, value = findings(replace(good, memory_shape=lambda config: shape))["parameter count"]
    assert status == "fail" and value.startswith("memory_shape says 7, the model has ")


def test_rows_that_see_each_other_are_found() -> None:
    """Packing that resets nothing, and a mask that lets padding in from the left."""
    hybrid = registry.get("qwen3_5")

    def leaking(model: Any) -> None:
        assert hybrid.install_varlen is not None
        hybrid.install_varlen(model)
        varlen.carry_state(model)

    status, value = findings(replace(hybrid, install_varlen=leaking))["packed row == separate"]
    assert status == "fail" and float(value.split()[4]) > 0.1
    flipped = replace(registry.get("llama"), attention_mask=lambda mask: mask.flip(1))
    status, value = findings(flipped)["padded rows == separate"]
    assert status == "fail" and float(value.split()[4]) > 0.1


def test_logits_that_the_trainer_would_not_compute_are_found() -> None:
    good = registry.get("llama")

    def scaled(path: Any, *, attention: str) -> Any:
        model = good.load_for_training(path, attention=attention)
        model.register_forward_hook(lambda module, args, out: out | {"logits": out.logits * 0.5})
        return model

    status, value = findings(replace(good, load_for_training=scaled))["output head"]
    assert status == "fail" and float(value.split()[4]) > 0.1


def test_an_adapter_that_cannot_load_is_a_finding() -> None:
    def broken(path: Any, *, attention: str) -> Any:
        raise KeyError("no such layer")

    found = findings(replace(registry.get("llama"), load_for_training=broken))
    assert found == {"load": ("fail", "KeyError: 'no such layer'")}


def test_without_a_tiny_config_there_is_nothing_to_try() -> None:
    with pytest.raises(UserError, match="adapter `llama` brings no tiny_config"):
        adapter_check.check(replace(registry.get("llama"), tiny_config=None))


def test_the_table_of_other_families_says_what_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """One family that is served, one whose logits are capped, one that does not load."""
    root = Path(__file__).parents[1]
    monkeypatch.syspath_prepend(str(root / "scripts"))
    families = __import__("dense_families")
    page = (root / "docs" / "adapters-howto.md").read_text(encoding="utf-8")
    if f"transformers {transformers.__version__};" not in page:
        pytest.skip("the table is of another version of transformers")
    tried = families.table([families.tried(name) for name in ("seed_oss", "nanochat", "bloom")])
    rows = [line for line in tried.splitlines() if line.startswith("| `")]
    assert len(rows) == 3 and all(f"\n{row}\n" in page for row in rows), rows
    assert [row.split(" | ")[1] for row in rows] == ["ok", "load", "output head"]
    sys.modules.pop("dense_families")
