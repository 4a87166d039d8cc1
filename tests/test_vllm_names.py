"""What we use of vLLM, and what tests/fake_vllm stands in for, is what vLLM has: read from its sources, which are not
imported. They are those of an installed vLLM, or of the folder ASTRA_VLLM_SOURCE (an unpacked wheel)."""

from __future__ import annotations

import ast
import importlib.util
import os
from pathlib import Path

import pytest

from astracli.engines.vllm.server import ENV

FAKE = Path(__file__).parent / "fake_vllm" / "vllm"


def _installed() -> Path | None:
    if asked := os.environ.get("ASTRA_VLLM_SOURCE"):
        return Path(asked) / "vllm"
    spec = importlib.util.find_spec("vllm")
    return Path(spec.origin).parent if spec is not None and spec.origin is not None else None


REAL = _installed()
pytestmark = pytest.mark.skipif(REAL is None, reason="no vLLM here, and ASTRA_VLLM_SOURCE names no sources of one")
LLM = "v1/engine/async_llm.py"
CALLS = {
    LLM: ("AsyncLLM", ("from_engine_args", "generate", "abort", "pause_generation", "resume_generation", "sleep",
                       "reset_prefix_cache", "wake_up", "collective_rpc", "check_health", "shutdown")),
    "v1/executor/uniproc_executor.py": ("UniProcExecutor", ("_distributed_args",)),
}  # fmt: skip


def tree(root: Path | None, file: str) -> ast.Module:
    assert root is not None
    return ast.parse((root / file).read_text())


def a_class(root: Path | None, file: str, name: str) -> ast.ClassDef:
    return next(node for node in tree(root, file).body if isinstance(node, ast.ClassDef) and node.name == name)


def function(body: list[ast.stmt], name: str) -> ast.FunctionDef | ast.AsyncFunctionDef:
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef)
    return next(node for node in body if isinstance(node, kinds) and node.name == name)


def parameters(node: ast.FunctionDef | ast.AsyncFunctionDef) -> dict[str, tuple[int | None, str | None]]:
    """Name -> (place, None for one that goes by name alone; its default as it is written)."""
    args = node.args
    given = [*args.posonlyargs, *args.args]
    defaults: list[ast.expr | None] = [*[None] * (len(given) - len(args.defaults)), *args.defaults]
    found = {
        arg.arg: (place, None if default is None else ast.unparse(default))
        for place, (arg, default) in enumerate(zip(given, defaults, strict=True))
    }
    named = zip(args.kwonlyargs, args.kw_defaults, strict=True)
    return found | {arg.arg: (None, None if default is None else ast.unparse(default)) for arg, default in named}


def fields(node: ast.ClassDef) -> dict[str, str | None]:
    own = (each for each in node.body if isinstance(each, ast.AnnAssign) and isinstance(each.target, ast.Name))
    return {each.target.id: None if each.value is None else ast.unparse(each.value) for each in own}  # type: ignore[attr-defined]


def same_call(real: ast.FunctionDef | ast.AsyncFunctionDef, fake: ast.FunctionDef | ast.AsyncFunctionDef) -> None:
    """What the stand-in takes, vLLM takes at the same place and with the same default, and it demands nothing more."""
    there, here = parameters(real), parameters(fake)
    assert type(real) is type(fake), f"{real.name}: one of the two is no coroutine"
    for name, told in here.items():
        assert there.get(name) == told, f"{real.name}: `{name}` is {told} in the stand-in, {there.get(name)} in vLLM"
    demanded = {name for name, (place, default) in there.items() if place is not None and default is None}
    assert demanded <= here.keys(), f"{real.name}: vLLM demands {demanded - here.keys()}"


@pytest.mark.parametrize(
    ("file", "owner", "name"), [(file, owner, name) for file, (owner, names) in CALLS.items() for name in names]
)
def test_a_method_is_called_as_it_is_defined(file: str, owner: str, name: str) -> None:
    real, fake = (function(a_class(root, file, owner).body, name) for root in (REAL, FAKE))
    same_call(real, fake)


def test_the_stand_in_has_no_method_of_its_own() -> None:
    names = {node.name for node in a_class(FAKE, LLM, "AsyncLLM").body if isinstance(node, ast.AsyncFunctionDef)}
    assert names <= set(CALLS[LLM][1])


def test_fields_are_there() -> None:
    real = fields(a_class(REAL, "sampling_params.py", "SamplingParams"))
    fake = fields(a_class(FAKE, "sampling_params.py", "SamplingParams"))
    assert fake.items() <= real.items()
    kinds = [a_class(root, "sampling_params.py", "RequestOutputKind") for root in (REAL, FAKE)]
    assert [ast.unparse(each) for each in kinds[0].body if isinstance(each, ast.Assign)] == [
        ast.unparse(each) for each in kinds[1].body
    ]
    arguments = fields(a_class(REAL, "engine/arg_utils.py", "EngineArgs"))
    arguments |= fields(a_class(REAL, "engine/arg_utils.py", "AsyncEngineArgs"))
    assert fields(a_class(FAKE, "engine/arg_utils.py", "AsyncEngineArgs")).keys() <= arguments.keys()
    assert {"first_token_ts", "last_token_ts"} <= fields(
        a_class(REAL, "v1/metrics/stats.py", "RequestStateStats")
    ).keys()
    flat = fields(a_class(REAL, "logprobs.py", "FlatLogprobs"))
    assert {"start_indices", "end_indices", "token_ids", "logprobs"} <= flat.keys()
    output = parameters(function(a_class(REAL, "outputs.py", "RequestOutput").body, "__init__"))
    assert {"outputs", "metrics", "finished", "num_cached_tokens"} <= output.keys()
    assert {"token_ids", "logprobs", "finish_reason"} <= fields(a_class(REAL, "outputs.py", "CompletionOutput")).keys()


def test_what_a_running_request_says_of_itself() -> None:
    """AsyncLLM.output_processor.request_states: name -> RequestState."""

    def assigned(file: str, owner: str) -> set[str]:
        body = ast.walk(function(a_class(REAL, file, owner).body, "__init__"))
        targets = [node.target if isinstance(node, ast.AnnAssign) else node.targets[0] for node in body
                   if isinstance(node, (ast.Assign, ast.AnnAssign))]  # fmt: skip
        return {target.attr for target in targets if isinstance(target, ast.Attribute)}

    assert "output_processor" in assigned(LLM, "AsyncLLM")
    processor = "v1/engine/output_processor.py"
    assert "request_states" in assigned(processor, "OutputProcessor")
    assert {"external_req_id", "is_prefilling"} <= assigned(processor, "RequestState")


def test_functions_errors_and_environment() -> None:
    fake = function(tree(FAKE, "inputs/__init__.py").body, "tokens_input")
    same_call(function(tree(REAL, "inputs/engine.py").body, "tokens_input"), fake)
    assert "tokens_input" in ast.unparse(tree(REAL, "inputs/__init__.py"))
    refused = a_class(REAL, "exceptions.py", "VLLMValidationError")
    assert ast.unparse(refused.bases[0]) in ("ValueError", "VLLMClientError")
    assert REAL is not None and all(f'"{name}": ' in (REAL / "envs.py").read_text() for name in ENV)
    worker = {node.name for node in a_class(REAL, "v1/worker/gpu_worker.py", "Worker").body
              if isinstance(node, ast.FunctionDef)}  # fmt: skip
    assert "get_model" in worker and not [name for name in worker if name.startswith("astra_")]
