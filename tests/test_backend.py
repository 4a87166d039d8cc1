"""Backend choices on recorded machines: every compute capability's defaults, and what is refused with which way out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from machines import facts, package

from astracli.adapters import llama, qwen3_5
from astracli.backends import choice as backend
from astracli.config.recipe import Recipe
from astracli.engines.sglang import attention
from astracli.errors import UserError
from astracli.machine import documents as machine_facts
from astracli.machine import facts as machine

HYBRID, DENSE = qwen3_5.ADAPTER, llama.ADAPTER
KERNEL = package("0.4.5")
TILELANG = Path(__file__).parent / "fixtures" / "machines" / "1xh200-tilelang.json"
"""torch 2.11 with fla 0.5.0 and TileLang, an sglang-kernel without fa3."""


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


def choose(adapter: Any, document: dict[str, Any], asked: Recipe) -> backend.BackendChoice:
    return backend.choose(adapter, machine.validate(document), asked)


CPU = {"resources": {"device": "cpu", "rollout_gpus": 0, "train_gpus": 0}}


def test_recorded_facts_have_the_schema() -> None:
    machine.validate(facts())
    machine.validate(facts("9.0", 8))


def test_cpu() -> None:
    choice = choose(HYBRID, facts(), recipe(**CPU))
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
        "prefix cache",
        "trainer attention",
        "micro-batches",
        "shared prompts",
        "delta rule, forward",
        "delta rule, backward",
        "environment",
    ]
    assert all(row.reason for row in choice.reasons)


def test_a_cpu_recipe_stays_on_the_cpu_of_a_gpu_machine() -> None:
    asked = recipe(resources={"device": "auto", "rollout_gpus": 0, "train_gpus": 0})
    choice = choose(HYBRID, facts("9.0", 8), asked)
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
        ("9.0", True, "flashinfer"),
        ("9.0", False, "triton"),
        ("10.0", True, "trtllm_mha"),
        ("10.0", False, "triton"),
        ("12.0", True, "flashinfer"),
        ("12.0", False, "triton"),
    ],
)
@pytest.mark.parametrize("adapter", [HYBRID, DENSE])
def test_serving_attention_by_capability(adapter: Any, capability: str, flashinfer: bool, expected: str) -> None:
    packages = {} if flashinfer else {"flashinfer-python": None}
    choice = choose(adapter, facts(capability, 2, packages=packages), recipe())
    if adapter is DENSE and capability == "9.0":
        expected = "fa3"  # nothing is known of sglang-kernel here; no hybrid has been run with it
    assert choice.serving_attention == expected
    assert choice.linear_attention == ("triton" if adapter is HYBRID else "none")
    assert choice.engine == "sglang"
    assert choice.env == {"SGLANG_RETURN_ORIGINAL_LOGPROB": "0"}


@pytest.mark.parametrize(
    ("kernel", "flashinfer", "expected", "why"),
    [
        (KERNEL | {"compiled": ["flash_ops"]}, "0.6.18", "fa3", None),
        (KERNEL | {"compiled": None}, "0.6.18", "fa3", None),
        (KERNEL | {"compiled": []}, "0.6.18", "flashinfer", "this build of sglang-kernel has no flash_ops"),
        (package(None), "0.6.18", "flashinfer", "sglang-kernel cannot be imported"),
        (KERNEL | {"compiled": []}, None, "triton", "no flashinfer: flashinfer-python cannot be imported"),
    ],
)
def test_fa3_needs_its_kernels(kernel: Any, flashinfer: str | None, expected: str, why: str | None) -> None:
    document = facts("9.0", 1, packages={"flashinfer-python": flashinfer})
    document["packages"]["sglang-kernel"] = kernel
    choice = choose(DENSE, document, recipe())
    (reason,) = [row.reason for row in choice.reasons if row.what == "serving attention"]
    assert choice.serving_attention == expected
    assert why is None or why in reason
    if expected != "fa3":
        with pytest.raises(UserError, match=r"attention_backend = fa3: .*sglang-kernel") as error:
            choose(HYBRID, document, recipe(rollout={"sglang": {"attention_backend": "fa3"}}))
        assert "`triton`" in str(error.value.hint)
    own = recipe(resources={"engine": {"python": "/envs/sglang/bin/python"}})
    assert choose(DENSE, document, own).serving_attention == "fa3", "another environment, of which nothing is known"
    document["engine"] = {"executable": "x", "error": None, "packages": {"sglang-kernel": KERNEL | {"compiled": []}}}
    assert choose(DENSE, document, own).serving_attention == "triton"


RECORDED: list[tuple[str, str, str, str, str]] = [
    # machine, compute capability, serving a hybrid, serving a dense model, delta rule of the hybrid
    ("1xa100-80g", "8.0", "flashinfer", "flashinfer", "fla"),
    ("4xa10g", "8.6", "flashinfer", "flashinfer", "fla"),
    ("8xl40", "8.9", "flashinfer", "flashinfer", "fla"),
    ("8xh100", "9.0", "flashinfer", "fa3", "fla"),
    ("1xh200", "9.0", "flashinfer", "fa3", "fla"),
    (str(TILELANG), "9.0", "flashinfer", "flashinfer", "fla+tilelang"),
    ("8xb200", "10.0", "trtllm_mha", "trtllm_mha", "fla"),
    ("rtx5090", "12.0", "flashinfer", "flashinfer", "fla"),
    ("laptop", "none", "sdpa", "sdpa", "torch"),
]


@pytest.mark.parametrize(("name", "capability", "hybrid", "dense", "rule"), RECORDED)
def test_every_decision_on_recorded_machines(name: str, capability: str, hybrid: str, dense: str, rule: str) -> None:
    document = machine_facts.load(name).document()
    assert {gpu["compute_capability"] for gpu in document["gpus"]} == ({capability} - {"none"})
    asked = recipe(**CPU) if capability == "none" else recipe()
    for adapter, serving, delta in ((HYBRID, hybrid, rule), (DENSE, dense, "none")):
        choice = choose(adapter, document, asked)
        assert choice.serving_attention == serving
        assert (choice.gdn_forward, choice.gdn_backward) == (delta, delta)
        assert choice.warnings == ()
        assert choice.env
        linear = "none" if adapter is DENSE else "torch" if capability == "none" else "triton"
        assert (choice.linear_attention, choice.trainer_attention) == (linear, "sdpa")
        assert choice.reasons[-1].what == "environment"
        assert choice.reasons[-1].choice == " ".join(f"{name}={value}" for name, value in choice.env.items())
        assert len(choice.reasons) == 11 and all(row.reason and "\n" not in row.reason for row in choice.reasons)
        if capability != "none":
            lowest = machine.validate(document).capability or (0, 0)
            allowed, refused = attention.serving_options(adapter, lowest)
            assert "triton" in allowed, "triton serves everywhere"
            assert set(refused) == ({"fa3"} if adapter is HYBRID and capability in ("8.6", "8.9") else set())
            assert choose(adapter, document, recipe(rollout={"sglang": {"attention_backend": "triton"}}))


@pytest.mark.parametrize("ffi", ["0.1.9", "0.1.15", None])
def test_tilelang_loads_with_few_tvm_ffi_only(ffi: str | None) -> None:
    document = machine_facts.load(str(TILELANG)).document()
    document["packages"]["apache-tvm-ffi"] = package(ffi)
    choice = choose(HYBRID, document, recipe())
    assert choice.gdn_backward == "torch"
    (warning,) = choice.warnings
    assert f"tilelang 0.1.11 loads with apache-tvm-ffi 0.1.10 or 0.1.11 alone, {ffi or 'none'} is installed" in warning
    ways = warning.rpartition("; ")[2]
    assert ways.startswith("`pip install -c constraints/cuda.txt 'astracli[gpu,sglang]'`"), "the first way out"
    assert "`pip install tilelang==0.1.11 apache-tvm-ffi==0.1.11` beside a CUDA toolkit with nvcc" in ways
    document["packages"]["apache-tvm-ffi"] = package("0.1.11")  # the one that SGLang 0.5.17 asks for beside it
    assert choose(HYBRID, document, recipe()).gdn_backward == "fla+tilelang"
    del document["packages"]["apache-tvm-ffi"]
    assert choose(HYBRID, document, recipe()).gdn_backward == "fla+tilelang", "not recorded: not judged"


@pytest.mark.parametrize(
    ("capability", "reason"),
    [
        ("8.9", 'a Gated DeltaNet hybrid dies under load there ("CUDA error: invalid argument")'),
        ("8.6", "it takes the kernels of 8.9, and a Gated DeltaNet hybrid dies under load with them"),
    ],
)
def test_fa3_is_refused_on_8_6_and_8_9_for_hybrids_only(capability: str, reason: str) -> None:
    asked = recipe(rollout={"sglang": {"attention_backend": "fa3"}})
    with pytest.raises(UserError) as error:
        choose(HYBRID, facts(capability, 2), asked)
    assert error.value.exit_code == 2
    where = f"`qwen3_5` on compute capability {capability}"
    assert error.value.message == f"rollout.sglang.attention_backend = fa3 is refused for {where}: {reason}"
    ways = "`flashinfer`, `triton`, `torch_native`"
    assert error.value.hint == f"set rollout.sglang.attention_backend to `auto`, or to one of {ways}"
    assert choose(DENSE, facts(capability, 2), asked).serving_attention == "fa3"


def test_fa3_serves_a_hybrid_on_hopper_only_where_a_recipe_asks_for_it() -> None:
    """Nothing is known against it, and nothing for it: `auto` takes flashinfer and says why."""
    asked = recipe(rollout={"sglang": {"attention_backend": "fa3"}})
    assert choose(HYBRID, facts("9.0", 2), asked).serving_attention == "fa3"
    choice = choose(HYBRID, facts("9.0", 2), recipe())
    (reason,) = [row.reason for row in choice.reasons if row.what == "serving attention"]
    assert choice.serving_attention == "flashinfer"
    assert reason.endswith("(this GPU: 9.0; no fa3: not run with a Gated DeltaNet hybrid yet)")
    with pytest.raises(UserError, match=r"fa3 does not run on compute capability 10\.0"):
        choose(DENSE, facts("10.0", 2), asked)


@pytest.mark.parametrize("capability", ["8.0", "8.6", "8.9", "10.0", "12.0"])
def test_delta_rule_off_hopper_takes_any_fla(capability: str) -> None:
    choice = choose(HYBRID, facts(capability, 2, packages={"triton": "3.6.0"}), recipe())
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
    choice = choose(HYBRID, facts("9.0", 2, packages=packages, nvcc=nvcc), recipe())
    assert choice.gdn_backward == kernel
    assert bool(choice.warnings) == (kernel == "torch")
    if choice.warnings:
        assert "fla issue 640" in choice.warnings[0] and "pip install" in choice.warnings[0]


def test_without_fla_the_slow_path_is_said_aloud() -> None:
    choice = choose(HYBRID, facts("8.9", 2, packages={"flash-linear-attention": None}), recipe())
    assert choice.gdn_forward == "torch"
    assert "flash-linear-attention cannot be imported" in choice.warnings[0]
    assert choose(DENSE, facts("8.9", 2, packages={"flash-linear-attention": None}), recipe()).warnings == ()


def test_a_gpu_recipe_resolves_on_a_machine_without_gpus() -> None:
    choice = choose(HYBRID, facts(), recipe())
    assert choice.device == "cuda" and choice.engine == "sglang"
    assert (choice.serving_attention, choice.gdn_forward) == ("auto", "auto")


def test_sglang_serves_on_a_cpu_where_it_is_asked_for() -> None:
    choice = choose(HYBRID, facts(), recipe(rollout={"engine": "sglang"}, **CPU))
    assert (choice.device, choice.engine, choice.serving_attention) == ("cpu", "sglang", "torch_native")
    assert choice.env["SGLANG_USE_CPU_ENGINE"] == "1" and choice.env["SGLANG_RETURN_ORIGINAL_LOGPROB"] == "0"
    assert choice.env["CUDA_VISIBLE_DEVICES"] == "" and "bf16" in choice.reasons[1].reason
    amx = recipe(rollout={"engine": "sglang", "sglang": {"attention_backend": "intel_amx"}}, **CPU)
    assert choose(HYBRID, facts(), amx).serving_attention == "intel_amx"
    assert "SGLANG_USE_CPU_ENGINE" not in choose(HYBRID, facts("9.0", 8), recipe()).env


def test_what_cannot_work_is_refused() -> None:
    with pytest.raises(UserError, match="sglang on a CPU takes auto, torch_native, intel_amx"):
        choose(
            HYBRID, facts(), recipe(rollout={"engine": "sglang", "sglang": {"attention_backend": "flashinfer"}}, **CPU)
        )
    with pytest.raises(UserError, match="are both 0"):
        choose(HYBRID, facts("9.0", 8), recipe(resources={"rollout_gpus": 0, "train_gpus": 0}))
    with pytest.raises(UserError, match=r"flashinffer: sglang takes .*did you mean `flashinfer`"):
        choose(HYBRID, facts("8.9", 2), recipe(rollout={"sglang": {"attention_backend": "flashinffer"}}))
    with pytest.raises(UserError, match="flash_attention_2 does not run on a CPU"):
        choose(HYBRID, facts(), recipe(train={"attention": "flash_attention_2"}, **CPU))


def test_flash_attention_needs_more_than_a_namespace_folder() -> None:
    asked = recipe(train={"attention": "flash_attention_2"})
    with pytest.raises(UserError, match="needs flash-attn, which is only an empty namespace folder"):
        choose(DENSE, facts("9.0", 2, stubs=("flash-attn",)), asked)
    with pytest.raises(UserError, match="needs flash-attn, which is not installed"):
        choose(DENSE, facts("9.0", 2), asked)
    choice = choose(DENSE, facts("9.0", 2, packages={"flash-attn": "2.8.0"}), asked)
    assert choice.trainer_attention == "flash_attention_2"


SGLANG, VLLM = {"engine": "sglang"}, {"engine": "vllm"}


@pytest.mark.parametrize(
    ("adapter", "rollout", "mode", "on", "why"),
    [
        (DENSE, SGLANG, "in_place", False, "with weights.pause_mode = in_place what waits in sglang would meet"),
        (DENSE, SGLANG, "retract", False, "with weights.pause_mode = retract what waits in sglang would meet"),
        (DENSE, SGLANG, "abort", True, "computed once a version"),
        (DENSE, VLLM, "in_place", True, "computed once a version"),
        (HYBRID, SGLANG, "abort", False, "a hybrid would take 3 recurrent states of 49.1 MiB instead of 1"),
        (HYBRID, VLLM, "in_place", False, "a hybrid would take 2 recurrent states of 49.1 MiB instead of 1"),
        (HYBRID, SGLANG | {"prefix_cache": "on"}, "abort", True, "the recipe asks for it"),
        (DENSE, VLLM | {"prefix_cache": "off"}, "abort", False, "the recipe asks for it"),
        (DENSE, SGLANG | {"prefix_cache": "on"}, "in_place", None, "--set weights.pause_mode=abort`, or"),
    ],
)
def test_prefixes_are_kept_where_none_of_old_weights_can_be_found(
    adapter: Any, rollout: dict[str, Any], mode: str, on: bool | None, why: str
) -> None:
    asked, there = recipe(rollout=rollout, weights={"pause_mode": mode}), machine.validate(facts("9.0", 2))
    config = HYBRID.known_configs["Qwen/Qwen3.5-4B"] if adapter is HYBRID else None
    if on is None:
        with pytest.raises(UserError, match="would meet keys and values of old weights") as refused:
            backend.choose(adapter, there, asked, config)
        assert why in str(refused.value.hint)
        assert backend.choose(adapter, there, asked, config, updated=False).prefix_cache
        return
    choice = backend.choose(adapter, there, asked, config)
    row = next(row for row in choice.reasons if row.what == "prefix cache")
    assert (choice.prefix_cache, row.choice) == (on, "on" if on else "off") and why in row.reason


def test_no_prefixes_are_kept_on_a_cpu_or_in_a_deterministic_run() -> None:
    assert not choose(HYBRID, facts(), recipe(**CPU)).prefix_cache
    with pytest.raises(UserError, match="prefix_cache = on: the embedded engine has none"):
        choose(HYBRID, facts(), recipe(rollout={"prefix_cache": "on"}, **CPU))
    asked = recipe(rollout=VLLM, launch={"deterministic": True})
    assert not choose(DENSE, facts("9.0", 2), asked).prefix_cache
    with pytest.raises(UserError, match="trtllm_mha"):
        weights = {"pause_mode": "abort"}
        choose(HYBRID, facts("10.0", 2), recipe(rollout=SGLANG | {"prefix_cache": "on"}, weights=weights))
