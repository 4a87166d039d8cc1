"""What makes each check of the doctor wrong and right: edits of a machine document, as a table of cases."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from machines import GIB, package

from astracli.adapters import qwen3_5, qwen3_5_sizes

Edit = Callable[[dict[str, Any]], Any]

ID_4B = "Qwen/Qwen3.5-4B"
CONFIG_4B = dict(qwen3_5.ADAPTER.known_configs[ID_4B])
_TEXT = CONFIG_4B["text_config"]
NO_INTERVAL = CONFIG_4B | {"text_config": {k: v for k, v in _TEXT.items() if k != "full_attention_interval"}}
NORM, A_LOG = "model.language_model.norm.weight", "model.language_model.layers.0.linear_attn.A_log"
HOLLOW = {"version": "1.0", "module": "m", "importable_spec": False, "origin": None}
NAMELESS = package("1") | {"version": None}
NET = {"hosts": {"127.0.0.1": None}, "ports": [32768, 60999], "hub": "https://huggingface.co"}
DOWN = NET | {"hub_asked": True, "hub_error": "no route to host"}


def nothing(document: dict[str, Any]) -> None:
    """The document as it is."""


def put(*path: Any, value: Any) -> Edit:
    def edit(d: dict[str, Any]) -> None:
        for key in path[:-1]:
            d = d[key]
        d[path[-1]] = copy.deepcopy(value)

    return edit


def both(*edits: Edit) -> Edit:
    def edit(d: dict[str, Any]) -> None:
        for change in edits:
            change(d)

    return edit


def box(**changes: Any) -> Edit:
    return lambda d: d["system"].update(changes)


def net(**changes: Any) -> Edit:
    return put("network", value=NET | changes)


def pkg(name: str, version: str | None) -> Edit:
    return put("packages", name, value=package(version))


def stub(name: str) -> Edit:
    return put("packages", name, value=package(None, stub=True))


def checkpoint(**changes: Any) -> dict[str, Any]:
    """The 4B checkpoint as `gather` would find it whole, in the multimodal layout."""
    tensors = {}
    for name, shape in qwen3_5_sizes.text_shapes(CONFIG_4B).items():
        dtype = "F32" if "A_log" in name else "BF16"
        tensors[name.replace("model.", "model.language_model.", 1)] = {"dtype": dtype, "shape": list(shape)}
    tensors["model.visual.patch.weight"] = {"dtype": "BF16", "shape": [4, 4]}
    whole = {"path": ID_4B, "place": "/models/q", "config": CONFIG_4B, "tensors": tensors}
    return whole | {"tokenizer": ["tokenizer.json"], "chat_template": True} | changes


def ckpt(**changes: Any) -> Edit:
    return put("checkpoint", value=checkpoint(**changes))


def tensors(change: Callable[[dict[str, Any]], Any]) -> Edit:
    return both(ckpt(), lambda d: change(d["checkpoint"]["tensors"]))


NO_CKPT = put("checkpoint", value={"path": ID_4B, "place": None})


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


def benchmark(**changes: Any) -> Edit:
    whole = {"name": "aime24", "use": "eval", "hub_id": "a/b", "place": "/b.jsonl", "problem": None}
    return put("data", value=[whole | changes])


def models(name: str, *held: str) -> Edit:
    return put("packages", name, "models", value=list(held))


def pins(**has: str) -> Edit:
    wants = {"torch": "2.13.0", "transformers": "5.12.1", "xgrammar": "0.1.27"}
    return put("packages", "sglang", "pins", value={n: {"wants": w, "has": has.get(n, w)} for n, w in wants.items()})


@dataclass(frozen=True)
class Case:
    group: str
    name: str
    status: str
    """When wrong."""
    fix: str
    """Part of the mending."""
    wrong: Edit
    right: Edit = nothing
    good: str = "ok"
    """Status when right; `absent` = the check says nothing then."""


CASES = [
    Case("python", "python", "fail", "python3.12 -m venv", put("python", "version", value="3.10.12")),
    Case("python", "torch", "fail", "torch>=2.11", pkg("torch", "2.4.0")),
    Case("python", "transformers", "fail", "transformers>=5.8", pkg("transformers", "5.1.0")),
    Case("python", "numpy", "fail", "numpy>=2", pkg("numpy", None)),
    Case("python", "datasets", "fail", "remove the empty folder", stub("datasets")),
    Case("system", "cpu cores", "warn", "", box(cores_usable=1.0)),
    Case("system", "memory", "warn", "end other programs", box(memory_available=GIB)),
    Case("system", "disk", "warn", "--run-dir", box(disk_free=GIB)),
    Case("system", "open files", "fail", "ulimit -n 65536", box(nofile=256), box(nofile=-1)),
    Case("system", "open files", "warn", "--ulimit nofile", box(nofile=1024, nofile_hard=1024)),
    Case("system", "shared memory", "fail", "--shm-size=8g", box(shm_total=64 * 2**20)),
    Case("system", "shared memory", "warn", "--shm-size=8g", box(shm_total=512 * 2**20), box(shm_total=None), "skip"),
    Case("system", "locked memory", "warn", "--ulimit memlock=-1", box(memlock=65536)),
    Case("gpu", "gpus", "fail", "nvidia-smi", put("gpu_error", value="no driver")),
    Case("gpu", "gpus", "warn", "CUDA_VISIBLE_DEVICES", put("gpus", 0, "name", value="another")),
    Case("gpu", "torch for gpus", "fail", "constraints/cuda.txt", put("torch_cuda", value=None)),
    Case(
        "gpu", "torch for gpus", "fail", "constraints/cuda.txt",
        both(put("torch_cuda", value="12.6"), put("gpus", 3, "compute_capability", value="12.0")),
    ),
    Case("gpu", "driver", "fail", "update the driver to 580", put("gpus", 0, "driver", value="550.54.15")),
    Case("gpu", "gpus in use", "fail", "astra ends nothing", held_by(45 * GIB)),
    Case("gpu", "gpus in use", "warn", "DEVICES", held_by(2 * GIB, who=False), held_by(400 * 2**20, who=False)),
    Case("kernels", "flash-linear-attention", "warn", "pip install flash", pkg("flash-linear-attention", None)),
    Case("kernels", "triton", "warn", "remove the empty folder", stub("triton")),
    Case(
        "kernels", "causal-conv1d", "warn", "--force-reinstall",
        put("packages", "causal-conv1d", value=HOLLOW), nothing, "skip",
    ),
    Case("kernels", "causal-conv1d", "warn", "empty folder", stub("causal-conv1d"), pkg("causal-conv1d", "1.6")),
    Case("kernels", "flash-attn", "warn", "empty folder", stub("flash-attn"), pkg("flash-attn", "2.8")),
    Case("serving", "sglang", "fail", "astracli[sglang]", pkg("sglang", None)),
    Case("serving", "sglang", "fail", "sglang>=0.5.17", models("sglang", "llama"), models("sglang", "qwen3_5")),
    Case(
        "serving", "sglang pins", "fail", "resources.engine.python", pins(transformers="5.17.0"),
        pins(torch="2.13.0+cu130"),
    ),
    Case("serving", "sglang pins", "warn", "engine.python", pins(xgrammar="0.1.99"), nothing, "skip"),
    Case("serving", "glibc", "fail", "newer operating system", box(libc="glibc 2.31")),
    Case(
        "serving", "flashinfer", "fail", "pip uninstall flashinfer",
        both(put("packages", "flashinfer-python", value=NAMELESS), pkg("flashinfer", "0.1.6")),
    ),
    Case(
        "serving", "flashinfer", "warn", "pip uninstall flashinfer", pkg("flashinfer", "0.1.6"),
        pkg("flashinfer-python", None), "skip",
    ),
    Case(
        "serving", "config for the engine", "warn", '"full_attention_interval": 4', ckpt(config=NO_INTERVAL), ckpt()
    ),
    Case(
        "trainer", "model code", "fail", "constraints/cuda.txt", models("transformers", "llama"),
        models("transformers", "qwen3_5"),
    ),
    Case("network", "listening", "fail", "launch.host", net(hosts={"10.0.0.9": "cannot assign"}), net()),
    Case("network", "ports", "warn", "ip_local_port_range", net(ports=[40000, 40100]), net()),
    Case("network", "hub", "warn", "HF_ENDPOINT", put("network", value=DOWN), net(hub_asked=True)),
    Case("network", "nccl", "warn", "unset it", put("env", "NCCL_P2P_DISABLE", value="1")),
    Case(
        "data", "checkpoint", "fail", "hf download Qwen/Qwen3.5-4B", both(NO_CKPT, put("network", value=DOWN)), ckpt()
    ),
    Case(
        "data", "checkpoint", "fail", "hf download", both(NO_CKPT, put("env", "HF_HUB_OFFLINE", value="1")), NO_CKPT,
        "warn",
    ),
    Case("data", "checkpoint", "fail", "check model.path", ckpt(problem="`x` is no whole safetensors file"), ckpt()),
    Case("data", "checkpoint", "fail", "copy it here", ckpt(missing_files=["model-2.safetensors"]), ckpt()),
    Case(
        "data", "tensor names", "fail", "model.adapter", tensors(lambda t: t.pop(NORM)),
        tensors(lambda t: t.update({"lm_head.weight": {"dtype": "BF16", "shape": [1]}})),
    ),
    Case(
        "data", "tensor names", "fail", "model.adapter",
        tensors(lambda t: t.update({"model.extra": {"dtype": "BF16", "shape": [1]}})), ckpt(),
    ),
    Case("data", "tensor names", "fail", "model.adapter", tensors(lambda t: t[NORM].update(shape=[7])), ckpt()),
    Case("data", "dtypes", "fail", "bf16", tensors(lambda t: t[NORM].update(dtype="F8_E4M3")), ckpt()),
    Case("data", "dtypes", "warn", "download the original", tensors(lambda t: t[A_LOG].update(dtype="BF16")), ckpt()),
    Case("data", "tokenizer", "fail", "copy tokenizer.json", ckpt(tokenizer=["tokenizer_config.json"]), ckpt()),
    Case("data", "chat template", "warn", "chat_template.jinja", ckpt(chat_template=False), ckpt()),
    Case(
        "data", "training data", "fail", "ASTRA_DATA_DIR", both(training(place=None), put("network", value=DOWN)),
        training(),
    ),
    Case(
        "data", "training data", "fail", "recipes show", training(place=None, problem="no data set"),
        training(place=None), "warn",
    ),
    Case(
        "data", "benchmarks", "fail", "put aime24.jsonl into DIR/eval",
        both(benchmark(place=None), put("network", value=DOWN)), benchmark(),
    ),
    Case(
        "recipe", "gpus", "fail", "--set resources.rollout_gpus", lambda d: d["gpus"].__delitem__(slice(6, 8)),
        good="absent",
    ),
    Case("recipe", "memory", "fail", "more memory", box(memory_total=GIB), good="absent"),
    Case("recipe", "disk", "warn", "checkpoint.keep=1", box(disk_free=20 * GIB), good="absent"),
    Case("runs", "dead runs", "warn", "astra runs clean runs/a", dead(1)),
]  # fmt: skip
