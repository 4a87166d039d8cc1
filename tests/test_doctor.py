"""The doctor's judgement: each check failing and passing on documents, what a recipe can and cannot fail."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from machines import GIB, facts, package

from astracli import machine, recipe_io
from astracli.adapters import qwen3_5
from astracli.doctor import checks
from astracli.errors import UserError

TINY, BIG, SHARED = "qwen3.5-tiny-m2po-delta", "qwen3.5-4b-m2po-delta", "qwen3.5-0.8b-m2po-delta"
Report = dict[str, Any]
Edit = Callable[[dict[str, Any]], None]


def found(report: Report, *statuses: str) -> dict[str, str]:
    return {c["name"]: c["status"] for c in report["checks"] if c["status"] in statuses}


def one(report: Report, name: str, group: str | None = None) -> dict[str, Any]:
    (check,) = [c for c in report["checks"] if c["name"] == name and group in (None, c["group"])]
    return check


def judged(recipe: str | None, document: dict[str, Any], *sets: str) -> Report:
    return checks.run(recipe_io.load(recipe, list(sets)) if recipe else None, document)


def gpu_box(capability: str = "8.9", count: int = 8, **more: Any) -> dict[str, Any]:
    return facts(capability, count, **{"host_gib": 512, **more})


CONFIG_4B = dict(qwen3_5.ADAPTER.known_configs["Qwen/Qwen3.5-4B"])


def checkpoint(**changes: Any) -> dict[str, Any]:
    """The 4B checkpoint as `gather` would find it whole, in the multimodal layout."""
    tensors = {}
    for name, shape in qwen3_5.text_shapes(CONFIG_4B).items():
        dtype = "F32" if "A_log" in name else "BF16"
        tensors[name.replace("model.", "model.language_model.", 1)] = {"dtype": dtype, "shape": list(shape)}
    tensors["model.visual.patch.weight"] = {"dtype": "BF16", "shape": [4, 4]}
    whole = {"path": "Qwen/Qwen3.5-4B", "place": "/models/q", "config": CONFIG_4B, "tensors": tensors}
    return whole | {"tokenizer": ["tokenizer.json"], "chat_template": True} | changes


NET = {"hosts": {"127.0.0.1": None}, "ports": [32768, 60999], "hub": "https://huggingface.co"}
DOWN = NET | {"hub_asked": True, "hub_error": "no route to host"}


def without_shard(d: dict[str, Any]) -> None:
    d["checkpoint"] = checkpoint(missing_files=["model-2.safetensors"])


def with_tensors(change: Callable[[dict[str, Any]], Any]) -> Edit:
    def edit(d: dict[str, Any]) -> None:
        d["checkpoint"] = checkpoint()
        change(d["checkpoint"]["tensors"])

    return edit


def put(*path: Any, value: Any) -> Edit:
    def edit(d: dict[str, Any]) -> None:
        for key in path[:-1]:
            d = d[key]
        d[path[-1]] = value

    return edit


def held_by(taken: int, who: bool = True) -> Edit:
    def edit(d: dict[str, Any]) -> None:
        d["gpus"][1]["memory_free"] -= taken
        d["gpus"][1]["processes"] = [{"pid": 4242, "name": "python", "memory": taken}] if who else []

    return edit


def dead(count: int, processes: dict[str, str] | None = None) -> Edit:
    run = {"path": "runs/a", "step": 7, "bytes": 3 * GIB, "processes": processes or {}}
    return put("runs", value=[run] * count)


def training(**changes: Any) -> Edit:
    whole = {"name": "deepscaler", "use": "train", "hub_id": "a/d", "place": "/d.jsonl", "problem": None}
    return put("data", value=[whole | changes])


def with_network(edit: Edit, network: dict[str, Any]) -> Edit:
    def both(d: dict[str, Any]) -> None:
        edit(d)
        d["network"] = copy.deepcopy(network)

    return both


def models(name: str, *held: str) -> Edit:
    return put("packages", name, "models", value=list(held))


def pins(**has: str) -> Edit:
    wants = {"torch": "2.13.0", "transformers": "5.12.1", "xgrammar": "0.1.27"}
    return put("packages", "sglang", "pins", value={n: {"wants": w, "has": has.get(n, w)} for n, w in wants.items()})


def both(*edits: Edit) -> Edit:
    def edit(d: dict[str, Any]) -> None:
        for change in edits:
            change(d)

    return edit


def absent(name: str) -> Edit:
    return put("packages", name, value=package(None))


def stub(name: str) -> Edit:
    return put("packages", name, value=package(None, stub=True))


HOLLOW = {"version": "1.0", "module": "m", "importable_spec": False, "origin": None}
NOTHING: Edit = lambda d: None  # noqa: E731

CASES: list[tuple[str, str, str, Edit, str, Edit, str]] = [
    # (check, status when wrong, part of the fix, what makes it wrong, status when right, what makes it right, group)
    ("python", "fail", "python3.12 -m venv", put("python", "version", value="3.10.12"), "ok", NOTHING, "python"),
    ("torch", "fail", "torch>=2.11", put("packages", "torch", value=package("2.4.0")), "ok", NOTHING, "python"),
    ("transformers", "fail", "transformers>=5.8", put("packages", "transformers", value=package("5.1.0")), "ok", NOTHING, "python"),
    ("numpy", "fail", "numpy>=2", absent("numpy"), "ok", NOTHING, "python"),
    ("datasets", "fail", "remove the empty folder", stub("datasets"), "ok", NOTHING, "python"),
    ("cpu cores", "warn", "", put("system", "cores_usable", value=1.0), "ok", NOTHING, "system"),
    ("memory", "warn", "end other programs", put("system", "memory_available", value=GIB), "ok", NOTHING, "system"),
    ("disk", "warn", "--run-dir", put("system", "disk_free", value=GIB), "ok", NOTHING, "system"),
    ("open files", "fail", "ulimit -n 65536", put("system", "nofile", value=256), "ok", put("system", "nofile", value=-1), "system"),
    ("open files", "warn", "--ulimit nofile", both(put("system", "nofile", value=1024), put("system", "nofile_hard", value=1024)), "ok", NOTHING, "system"),
    ("shared memory", "fail", "--shm-size=8g", put("system", "shm_total", value=64 * 2**20), "ok", NOTHING, "system"),
    ("shared memory", "warn", "--shm-size=8g", put("system", "shm_total", value=512 * 2**20), "skip", put("system", "shm_total", value=None), "system"),
    ("locked memory", "warn", "--ulimit memlock=-1", put("system", "memlock", value=65536), "ok", NOTHING, "system"),
    ("gpus", "fail", "nvidia-smi", put("gpu_error", value="no driver"), "ok", NOTHING, "gpu"),
    ("gpus", "warn", "CUDA_VISIBLE_DEVICES", put("gpus", 0, "name", value="another"), "ok", NOTHING, "gpu"),
    ("torch for gpus", "fail", "constraints/cuda.txt", put("torch_cuda", value=None), "ok", NOTHING, "gpu"),
    ("torch for gpus", "fail", "constraints/cuda.txt", both(put("torch_cuda", value="12.6"), put("gpus", 3, "compute_capability", value="12.0")), "ok", NOTHING, "gpu"),
    ("driver", "fail", "update the driver to 580", put("gpus", 0, "driver", value="550.54.15"), "ok", NOTHING, "gpu"),
    ("gpus in use", "fail", "astra ends nothing", held_by(45 * GIB), "ok", NOTHING, "gpu"),
    ("gpus in use", "warn", "CUDA_VISIBLE_DEVICES", held_by(2 * GIB, who=False), "ok", held_by(400 * 2**20, who=False), "gpu"),
    ("flash-linear-attention", "warn", "pip install flash-linear-attention", absent("flash-linear-attention"), "ok", NOTHING, "kernels"),
    ("triton", "warn", "remove the empty folder", stub("triton"), "ok", NOTHING, "kernels"),
    ("causal-conv1d", "warn", "--force-reinstall", put("packages", "causal-conv1d", value=HOLLOW), "skip", NOTHING, "kernels"),
    ("causal-conv1d", "warn", "remove the empty folder", stub("causal-conv1d"), "ok", put("packages", "causal-conv1d", value=package("1.6")), "kernels"),
    ("flash-attn", "warn", "remove the empty folder", stub("flash-attn"), "ok", put("packages", "flash-attn", value=package("2.8")), "kernels"),
    ("sglang", "fail", "astracli[sglang]", absent("sglang"), "ok", NOTHING, "serving"),
    ("sglang", "fail", "sglang>=0.5.17", models("sglang", "llama"), "ok", models("sglang", "qwen3_5"), "serving"),
    ("sglang pins", "fail", "resources.engine.python", pins(transformers="5.17.0"), "ok", pins(torch="2.13.0+cu130"), "serving"),
    ("sglang pins", "warn", "resources.engine.python", pins(xgrammar="0.1.99"), "skip", NOTHING, "serving"),
    ("glibc", "fail", "newer operating system", put("system", "libc", value="glibc 2.31"), "ok", NOTHING, "serving"),
    ("flashinfer", "fail", "pip uninstall flashinfer", both(put("packages", "flashinfer-python", value=package("1") | {"version": None}), put("packages", "flashinfer", value=package("0.1.6"))), "ok", NOTHING, "serving"),
    ("flashinfer", "warn", "pip uninstall flashinfer", put("packages", "flashinfer", value=package("0.1.6")), "skip", absent("flashinfer-python"), "serving"),
    ("config for the engine", "warn", '"full_attention_interval": 4', put("checkpoint", value=checkpoint(config=CONFIG_4B | {"text_config": {k: v for k, v in CONFIG_4B["text_config"].items() if k != "full_attention_interval"}})), "ok", put("checkpoint", value=checkpoint()), "serving"),
    ("model code", "fail", "constraints/cuda.txt", models("transformers", "llama"), "ok", models("transformers", "qwen3_5"), "trainer"),
    ("listening", "fail", "launch.host", put("network", value=NET | {"hosts": {"10.0.0.9": "cannot assign requested address"}}), "ok", put("network", value=NET), "network"),
    ("ports", "warn", "ip_local_port_range", put("network", value=NET | {"ports": [40000, 40100]}), "ok", put("network", value=NET), "network"),
    ("hub", "warn", "HF_ENDPOINT", put("network", value=DOWN), "ok", put("network", value=NET | {"hub_asked": True}), "network"),
    ("nccl", "warn", "unset it", put("env", "NCCL_P2P_DISABLE", value="1"), "ok", NOTHING, "network"),
    ("checkpoint", "fail", "hf download Qwen/Qwen3.5-4B", with_network(put("checkpoint", value={"path": "Qwen/Qwen3.5-4B", "place": None}), DOWN), "ok", put("checkpoint", value=checkpoint()), "data"),
    ("checkpoint", "fail", "hf download", both(put("checkpoint", value={"path": "Qwen/Qwen3.5-4B", "place": None}), put("env", "HF_HUB_OFFLINE", value="1")), "warn", put("checkpoint", value={"path": "Qwen/Qwen3.5-4B", "place": None}), "data"),
    ("checkpoint", "fail", "check model.path", put("checkpoint", value=checkpoint(problem="`x` is no whole safetensors file")), "ok", put("checkpoint", value=checkpoint()), "data"),
    ("checkpoint", "fail", "copy it here", without_shard, "ok", put("checkpoint", value=checkpoint()), "data"),
    ("tensor names", "fail", "model.adapter", with_tensors(lambda t: t.popitem() and t.pop("model.language_model.norm.weight")), "ok", with_tensors(lambda t: t.update({"lm_head.weight": {"dtype": "BF16", "shape": [1]}})), "data"),
    ("tensor names", "fail", "model.adapter", with_tensors(lambda t: t.update({"model.extra": {"dtype": "BF16", "shape": [1]}})), "ok", put("checkpoint", value=checkpoint()), "data"),
    ("tensor names", "fail", "model.adapter", with_tensors(lambda t: t["model.language_model.norm.weight"].update(shape=[7])), "ok", put("checkpoint", value=checkpoint()), "data"),
    ("dtypes", "fail", "unquantised", with_tensors(lambda t: t["model.language_model.norm.weight"].update(dtype="F8_E4M3")), "ok", put("checkpoint", value=checkpoint()), "data"),
    ("dtypes", "warn", "download the original", with_tensors(lambda t: t["model.language_model.layers.0.linear_attn.A_log"].update(dtype="BF16")), "ok", put("checkpoint", value=checkpoint()), "data"),
    ("tokenizer", "fail", "copy tokenizer.json", put("checkpoint", value=checkpoint(tokenizer=["tokenizer_config.json"])), "ok", put("checkpoint", value=checkpoint()), "data"),
    ("chat template", "warn", "chat_template.jinja", put("checkpoint", value=checkpoint(chat_template=False)), "ok", put("checkpoint", value=checkpoint()), "data"),
    ("training data", "fail", "ASTRA_DATA_DIR", with_network(training(place=None), DOWN), "ok", training(), "data"),
    ("training data", "fail", "recipes show", training(place=None, problem="no data set"), "warn", training(place=None), "data"),
    ("gpus", "fail", "--set resources.rollout_gpus", lambda d: d["gpus"].__delitem__(slice(6, 8)), "absent", NOTHING, "recipe"),
    ("memory", "fail", "more memory", put("system", "memory_total", value=GIB), "absent", NOTHING, "recipe"),
    ("disk", "warn", "checkpoint.keep=1", put("system", "disk_free", value=20 * GIB), "absent", NOTHING, "recipe"),
    ("dead runs", "warn", "astra runs clean runs/a", dead(1), "ok", NOTHING, "runs"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "status", "fix", "wrong", "good_status", "right", "group"),
    CASES,
    ids=[f"{c[6]}-{c[0].replace(' ', '_')}-{i}" for i, c in enumerate(CASES)],
)
def test_each_check_wrong_and_right(
    name: str, status: str, fix: str, wrong: Edit, good_status: str, right: Edit, group: str
) -> None:
    """On eight GPUs with the 4B recipe, which needs all of it."""
    sick, well = gpu_box(), gpu_box()
    wrong(sick)
    right(well)
    report = judged(BIG, sick)
    check = one(report, name, group)
    assert check["status"] == status
    assert fix in check["fix"] and check["why"]
    assert report["ok"] is (not found(report, "fail"))
    sound = [c for c in judged(BIG, well)["checks"] if (c["name"], c["group"]) == (name, group)]
    assert [c["status"] for c in sound] == ([] if good_status == "absent" else [good_status])


def test_this_machine_without_a_recipe() -> None:
    report = checks.run(None, machine.probe())
    assert report["ok"] is True, found(report, "fail")
    assert report["backends"] == []
    assert one(report, "torch")["value"] == torch.__version__
    assert report["facts"]["schema_version"] == 1
    json.dumps(report)


def test_the_report_has_the_documented_shape() -> None:
    report = judged(TINY, facts())
    assert set(report) == {"ok", "checks", "backends", "facts"}
    assert {tuple(c) for c in report["checks"]} == {("name", "group", "status", "value", "why", "fix")}
    assert {tuple(b) for b in report["backends"]} == {("what", "choice", "reason")}
    assert {c["group"] for c in report["checks"]} == {
        "system", "python", "gpu", "kernels", "serving", "trainer", "network", "data", "recipe", "runs",
    }  # fmt: skip
    machine.validate(report["facts"])
    again = judged(TINY, json.loads(json.dumps(report["facts"])))
    assert again == report


def test_only_what_the_recipe_needs_can_fail() -> None:
    """GPUs without a driver, a dead nvidia-smi, an ancient glibc and a broken sglang do not stop a CPU run."""
    document = gpu_box()
    for spoil in (put("torch_cuda", value=None), put("system", "libc", value="glibc 2.17"), stub("sglang")):
        spoil(document)
    document["gpus"][0]["driver"] = "450.1"
    document["system"] |= {"shm_total": 2**20, "nofile": 1024, "memlock": 0}
    document["packages"]["flash-attn"] = package(None, stub=True)
    report = judged(TINY, document)
    assert report["ok"] is True, found(report, "fail")
    document["gpu_error"] = "driver mismatch"
    assert judged(TINY, document)["ok"] is True
    document["torch_cuda"] = "13.0"
    assert judged(None, document)["ok"] is True
    assert judged(BIG, document)["ok"] is False


def test_hidden_gpus_are_said_to_be_hidden() -> None:
    assert one(judged(None, facts()), "gpus")["status"] == "skip"
    assert one(judged(None, facts("9.0", 2, visible="")), "gpus")["value"] == "2 hidden by CUDA_VISIBLE_DEVICES"


def test_processes_on_the_gpus_are_named() -> None:
    document = gpu_box()
    held_by(45 * GIB)(document)
    check = one(judged(BIG, document), "gpus in use")
    assert check["value"] == "GPU 1: 45.00 GiB taken by python (process 4242)"
    assert check["why"] == "the recipe needs at least 7.83 GiB there"
    assert one(judged(TINY, document), "gpus in use")["status"] == "warn"


def test_a_cpu_recipe_passes_and_shows_its_backends() -> None:
    report = judged(TINY, facts())
    assert report["ok"] is True, found(report, "fail")
    assert one(report, "adapter")["value"].startswith("qwen3_5")
    assert one(report, "fit")["value"] == f"{TINY} fits here (4 processes)"
    assert {b["what"]: b["choice"] for b in report["backends"]}["engine"] == "embedded"


def test_a_gpu_recipe_fails_for_what_it_lacks_and_warns_of_a_download() -> None:
    report = judged(BIG, gpu_box(count=2))
    assert found(report, "fail") == {"gpus": "fail"}
    assert one(report, "gpus", "recipe")["value"] == "needs 8 GPUs (this machine has 2)"
    assert one(report, "checkpoint")["status"] == "warn"
    assert judged(BIG, gpu_box())["ok"] is True


def test_a_refused_combination_is_a_failed_check_with_its_way_out() -> None:
    report = judged(BIG, gpu_box(), "rollout.attention_backend=fa3")
    refused = one(report, "refused")
    assert refused["status"] == "fail" and "CUDA error: invalid argument" in refused["why"]
    assert "`flashinfer`" in refused["fix"]
    allowed = one(report, "attention backends")
    assert allowed["status"] == "ok"
    assert allowed["value"] == "flashinfer, triton, torch_native allowed on 8.9; refused: fa3"
    assert "fa3" not in one(judged(BIG, gpu_box("9.0")), "attention backends")["value"].partition("refused")[2]


@pytest.mark.parametrize(
    ("fla", "triton", "nvcc", "status"),
    [
        ("0.5.0", "3.6.0", None, "warn"), ("0.5.0", "3.7.1", None, "warn"), ("0.6.0", "3.6.0", None, "warn"),
        ("0.6.0", "3.7.1", None, "ok"), ("0.5.0", "3.3.1", None, "ok"), ("0.5.0", "3.6.0", "/usr/bin/nvcc", "ok"),
    ],
)  # fmt: skip
def test_the_gated_backward_on_hopper(fla: str, triton: str, nvcc: str | None, status: str) -> None:
    versions = {"flash-linear-attention": fla, "triton": triton, "tilelang": "0.1.12" if nvcc else None}
    document = gpu_box("9.0", packages=versions, nvcc=nvcc)
    check = one(judged(BIG, document), "gated backward")
    assert check["status"] == status
    if status == "warn":
        assert "fla issue 640" in check["why"] and "'torch>=2.13' 'flash-linear-attention>=0.6'" in check["fix"]
    ada = gpu_box("8.9", packages=versions)
    assert one(judged(BIG, ada), "gated backward")["status"] == "ok"
    assert one(judged(None, document), "gated backward")["status"] == status


def test_tilelang_needs_an_nvcc_with_headers() -> None:
    versions = {"flash-linear-attention": "0.5.0", "triton": "3.6.0", "tilelang": "0.1.12"}
    document = gpu_box("9.0", packages=versions, nvcc="/usr/bin/nvcc")
    check = one(judged(BIG, document), "tilelang")
    assert check["status"] == "fail" and "CCCL" in check["value"]
    document["compilers"]["cccl"] = "/usr/local/cuda/include/cccl"
    assert one(judged(BIG, document), "tilelang")["status"] == "ok"
    unused = gpu_box("9.0", packages={"tilelang": "0.1.12"})
    assert one(judged(BIG, unused), "tilelang")["value"] == "0.1.12, without nvcc"


@pytest.mark.parametrize(("version", "said"), [("5.8.1", "silently"), ("5.17.0", "silently"), ("5.23.0", "refuses")])
def test_packing_is_astras_own_whatever_transformers_does(version: str, said: str) -> None:
    document = gpu_box(packages={"transformers": version})
    check = one(judged(BIG, document), "packing")
    assert check["status"] == "ok" and check["value"].startswith("astra's own varlen path") and said in check["why"]


def test_packing_without_a_varlen_path_of_its_own_fails_on_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    import dataclasses

    from astracli import registry

    leaking = dataclasses.replace(qwen3_5.ADAPTER, install_varlen=None)
    monkeypatch.setattr(registry, "resolve", lambda recipe, config=None: leaking)
    assert one(judged(BIG, gpu_box()), "packing")["status"] == "fail"
    assert one(judged(TINY, facts()), "packing")["status"] == "warn"


def test_the_engines_environment_is_judged_apart_from_the_trainers() -> None:
    """The trainer's packages hold no sglang, the engine's hold another torch: both are as they should be."""
    document = gpu_box(packages={"sglang": None, "flashinfer-python": None})
    packages = copy.deepcopy(gpu_box()["packages"])
    packages["sglang"] |= {"models": ["qwen3_5"], "pins": {"torch": {"wants": "2.11.0", "has": "2.11.0+cu130"}}}
    engine = {"executable": "/engine/bin/python", "version": "3.12.3", "packages": packages, "torch_cuda": "13.0"}
    document["engine"] = engine
    ask = "resources.engine.python=/engine/bin/python"
    report = judged(BIG, document, ask)
    assert report["ok"] is True, found(report, "fail")
    assert one(report, "engine python")["value"] == "3.12.3 at /engine/bin/python"
    assert one(report, "sglang")["value"] == "0.5.21, holds `qwen3_5`"
    assert one(report, "sglang pins")["status"] == "ok"
    assert one(judged(BIG, document), "sglang")["status"] == "fail"
    document["engine"] = engine | {"error": "no such file or directory", "packages": {}}
    assert found(judged(BIG, document, ask), "fail") == {"engine python": "fail"}
    document["engine"] = None
    assert one(judged(BIG, document, ask), "engine python")["status"] == "warn"


def test_a_choice_without_its_package_fails() -> None:
    document = gpu_box(packages={"flashinfer-python": None})
    asked = one(judged(BIG, document, "rollout.attention_backend=flashinfer"), "flashinfer")
    assert asked["status"] == "fail" and "rollout.attention_backend=triton" in asked["fix"]
    assert one(judged(BIG, document), "flashinfer")["status"] == "skip"


def test_dead_runs_and_their_processes_are_named() -> None:
    document = facts()
    dead(1, {"77": "astracli.workers.train"})(document)
    check = one(judged(TINY, document), "dead runs")
    assert check["value"] == "runs/a stopped at step 7, holds 3.00 GiB"
    assert check["why"] == "still running: astracli.workers.train (process 77)"
    dead(7)(document)
    several = [c for c in judged(TINY, document)["checks"] if c["name"] == "dead runs"]
    assert len(several) == 6 and several[-1]["value"] == "2 more, 6.00 GiB"


def test_load_is_warned_about() -> None:
    document = facts()
    document["system"]["cores_usable"] = 1.0
    check = one(judged(TINY, document), "load")
    assert (check["status"], check["why"]) == ("warn", "they will starve each other")
    assert found(judged(TINY, facts()), "warn") == {}


def test_facts_that_are_none_are_refused() -> None:
    with pytest.raises(UserError, match="not a machine description: `system`"):
        checks.run(None, {"schema_version": 1})
