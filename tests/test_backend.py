"""Backend choices on recorded machines: every compute capability's defaults, and what is refused with which way out."""

from __future__ import annotations

from typing import Any

import pytest
from machines import facts

from astracli import backend, machine
from astracli.adapters import llama, qwen3_5
from astracli.errors import UserError
from astracli.recipe import Recipe

HYBRID, DENSE = qwen3_5.ADAPTER, llama.ADAPTER


def recipe(**tables: dict[str, Any]) -> Recipe:
    document: dict[str, Any] = {
        "model": {"path": "Qwen/Qwen3.5-4B"},
        "data": {"source": "arithmetic"},
        "train": {"steps": 1},
        "resources": {"device": "cuda", "rollout_gpus": 1, "train_gpus": 1},
    }
    for name, table in tables.items():
        document[name] = document.get(name, {}) | table
    return Recipe.model_validate(document)


CPU = {"resources": {"device": "cpu", "rollout_gpus": 0, "train_gpus": 0}}


def test_recorded_facts_have_the_schema() -> None:
    machine.validate(facts())
    machine.validate(facts("9.0", 8))


def test_cpu() -> None:
    choice = backend.choose(HYBRID, facts(), recipe(**CPU))
    assert choice.settings() == {
        "device": "cpu",
        "engine": "embedded",
        "attention": "sdpa",
        "serving_attention": "sdpa",
        "linear_attention": "torch",
        "gdn_forward": "torch",
        "gdn_backward": "torch",
    }
    assert choice.env == {"CUDA_VISIBLE_DEVICES": ""}
    assert [row.what for row in choice.reasons] == [
        "device",
        "engine",
        "serving attention",
        "serving linear attention",
        "trainer attention",
        "micro-batches",
        "delta rule, forward",
        "delta rule, backward",
    ]
    assert all(row.reason for row in choice.reasons)


def test_a_cpu_recipe_stays_on_the_cpu_of_a_gpu_machine() -> None:
    asked = recipe(resources={"device": "auto", "rollout_gpus": 0, "train_gpus": 0})
    choice = backend.choose(HYBRID, facts("9.0", 8), asked)
    assert (choice.device, choice.engine, choice.gdn_forward) == ("cpu", "embedded", "torch")


@pytest.mark.parametrize(
    ("capability", "flashinfer", "expected"),
    [
        ("8.0", True, "flashinfer"),
        ("8.0", False, "triton"),
        ("8.6", True, "flashinfer"),
        ("8.6", False, "triton"),
        ("8.9", True, "flashinfer"),
        ("8.9", False, "triton"),
        ("9.0", True, "fa3"),
        ("9.0", False, "fa3"),
        ("10.0", True, "trtllm_mha"),
        ("10.0", False, "triton"),
        ("12.0", True, "flashinfer"),
        ("12.0", False, "triton"),
    ],
)
@pytest.mark.parametrize("adapter", [HYBRID, DENSE])
def test_serving_attention_by_capability(adapter: Any, capability: str, flashinfer: bool, expected: str) -> None:
    packages = {} if flashinfer else {"flashinfer-python": None}
    choice = backend.choose(adapter, facts(capability, 2, packages=packages), recipe())
    assert choice.serving_attention == expected
    assert choice.linear_attention == ("triton" if adapter is HYBRID else "none")
    assert choice.engine == "sglang"
    assert choice.env == {"SGLANG_RETURN_ORIGINAL_LOGPROB": "1"}


def test_fa3_is_refused_on_8_9_for_hybrids_only() -> None:
    asked = recipe(rollout={"attention_backend": "fa3"})
    with pytest.raises(UserError) as error:
        backend.choose(HYBRID, facts("8.9", 2), asked)
    assert error.value.exit_code == 2
    assert error.value.message == (
        "rollout.attention_backend = fa3 is refused for `qwen3_5` on compute capability 8.9: "
        'a Gated DeltaNet hybrid dies under load there ("CUDA error: invalid argument")'
    )
    ways = "`flashinfer`, `triton`, `torch_native`"
    assert error.value.hint == f"set rollout.attention_backend to `auto`, or to one of {ways}"
    assert backend.choose(DENSE, facts("8.9", 2), asked).serving_attention == "fa3"
    assert backend.choose(HYBRID, facts("9.0", 2), asked).serving_attention == "fa3"
    with pytest.raises(UserError, match=r"fa3 does not run on compute capability 10\.0"):
        backend.choose(DENSE, facts("10.0", 2), asked)


@pytest.mark.parametrize("capability", ["8.0", "8.6", "8.9", "10.0", "12.0"])
def test_delta_rule_off_hopper_takes_any_fla(capability: str) -> None:
    choice = backend.choose(HYBRID, facts(capability, 2, packages={"triton": "3.6.0"}), recipe())
    assert (choice.gdn_forward, choice.gdn_backward, choice.warnings) == ("fla", "fla", ())


@pytest.mark.parametrize(
    ("fla", "triton", "tilelang", "nvcc", "kernel"),
    [
        ("0.6.0", "3.7.1", None, None, "fla"),
        ("0.6.0", "3.6.0", None, None, "torch"),
        ("0.5.0", "3.7.1", None, None, "torch"),
        ("0.5.0", "3.6.0", "0.1.5", "/usr/local/cuda/bin/nvcc", "fla+tilelang"),
        ("0.5.0", "3.6.0", "0.1.5", None, "torch"),
        ("0.5.0", "3.3.1", None, None, "fla"),
    ],
)
def test_delta_rule_on_hopper(fla: str, triton: str, tilelang: str | None, nvcc: str | None, kernel: str) -> None:
    packages = {"flash-linear-attention": fla, "triton": triton, "tilelang": tilelang}
    choice = backend.choose(HYBRID, facts("9.0", 2, packages=packages, nvcc=nvcc), recipe())
    assert choice.gdn_backward == kernel
    assert bool(choice.warnings) == (kernel == "torch")
    if choice.warnings:
        assert "fla issue 640" in choice.warnings[0] and "pip install" in choice.warnings[0]


def test_without_fla_the_slow_path_is_said_aloud() -> None:
    choice = backend.choose(HYBRID, facts("8.9", 2, packages={"flash-linear-attention": None}), recipe())
    assert choice.gdn_forward == "torch"
    assert "flash-linear-attention cannot be imported" in choice.warnings[0]
    assert backend.choose(DENSE, facts("8.9", 2, packages={"flash-linear-attention": None}), recipe()).warnings == ()


def test_a_gpu_recipe_resolves_on_a_machine_without_gpus() -> None:
    choice = backend.choose(HYBRID, facts(), recipe())
    assert choice.device == "cuda" and choice.engine == "sglang"
    assert (choice.serving_attention, choice.gdn_forward) == ("auto", "auto")


def test_what_cannot_work_is_refused() -> None:
    with pytest.raises(UserError, match="sglang on a CPU") as error:
        backend.choose(HYBRID, facts(), recipe(rollout={"engine": "sglang"}, **CPU))
    assert "rollout.engine=embedded" in str(error.value.hint)
    with pytest.raises(UserError, match="are both 0"):
        backend.choose(HYBRID, facts("9.0", 8), recipe(resources={"rollout_gpus": 0, "train_gpus": 0}))
    with pytest.raises(UserError, match=r"flashinffer: sglang takes .*did you mean `flashinfer`"):
        backend.choose(HYBRID, facts("8.9", 2), recipe(rollout={"attention_backend": "flashinffer"}))
    with pytest.raises(UserError, match="flash_attention_2 does not run on a CPU"):
        backend.choose(HYBRID, facts(), recipe(train={"attention": "flash_attention_2"}, **CPU))
    with pytest.raises(UserError, match="the embedded engine takes auto, sdpa, eager"):
        backend.choose(HYBRID, facts(), recipe(rollout={"attention_backend": "fa3"}, **CPU))


def test_flash_attention_needs_more_than_a_namespace_folder() -> None:
    asked = recipe(train={"attention": "flash_attention_2"})
    with pytest.raises(UserError, match="needs flash-attn, which is only an empty namespace folder"):
        backend.choose(DENSE, facts("9.0", 2, stubs=("flash-attn",)), asked)
    with pytest.raises(UserError, match="needs flash-attn, which is not installed"):
        backend.choose(DENSE, facts("9.0", 2), asked)
    choice = backend.choose(DENSE, facts("9.0", 2, packages={"flash-attn": "2.8.0"}), asked)
    assert choice.trainer_attention == "flash_attention_2"
