"""Stands in for vLLM's AsyncLLM: a request draws token 5 every few milliseconds, with log-probability -0.5, or -9 where
it attends to keys and values that other weights computed before its prefill. The worker holds a model with fused
parameters, into which the extension is mixed as vLLM does; its one rank joins a process group as the executor says.
FAKE_VLLM=oom: dies at its start, `quiet` without a word; `late`: its engine is dead a moment after it was ready;
`open`: its rank meets itself where vLLM would have it meet; `unsalted`: its cache takes no notice of salts;
`checkpoint`: it holds the model of its config.json, though it draws as ever;
tests/test_vllm_names.py compares its names and
signatures with those of vLLM's sources."""

import asyncio
import os
import sys
import time
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

from vllm.exceptions import VLLMValidationError
from vllm.prefix_cache import PrefixCache
from vllm.v1.executor.uniproc_executor import UniProcExecutor

TICK_S = 0.003
STALE = -9.0


def found(name):
    module, _, attribute = name.rpartition(".")
    return getattr(import_module(module), attribute)


def whole_model(path):
    """The model of a checkpoint, each tensor by its name; its weights when there are some."""
    from safetensors.torch import load_file
    from transformers import AutoConfig, AutoModelForCausalLM

    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(path)).bfloat16()
    for name, parameter in model.named_parameters():
        if name.endswith("A_log"):  # fp32, as it travels
            parameter.data = parameter.data.float()

    def load_weights(weights):
        parameters = dict(model.named_parameters())
        for name, loaded in list(weights):
            parameters[name].data.copy_(loaded)

    model.load_weights = load_weights
    for shard in Path(path).glob("*.safetensors"):
        load_weights(load_file(shard).items())
    return model


class Worker:
    def __init__(self, path=None):
        from staged_tools import FusedModel  # and with it torch: seconds, which a server that dies need not spend

        self.model = whole_model(path) if os.environ.get("FAKE_VLLM") == "checkpoint" else FusedModel()

    def get_model(self):
        return self.model

    def weights(self):
        """Something that tells one version from another."""
        return tuple(float(parameter.detach().double().sum()) for parameter in self.model.parameters())


@dataclass
class RequestState:
    """Of vLLM's output processor: what is known of a request that has not ended."""

    external_req_id: str
    prompt: dict
    sampling: object
    is_prefilling: bool = True
    holds_slot: bool = False
    tokens: list = field(default_factory=list)
    logprobs: list = field(default_factory=list)
    num_cached_tokens: int = 0
    stale: bool = False
    reason: str | None = None
    first: float = 0.0
    last: float = 0.0


class OutputProcessor:
    def __init__(self):
        self.request_states = {}


class AsyncLLM:
    @classmethod
    def from_engine_args(cls, engine_args):
        if os.environ.get("FAKE_VLLM") == "oom":
            sys.exit("torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 7.83 GiB")
        if os.environ.get("FAKE_VLLM") == "quiet":
            os._exit(7)
        return cls(engine_args)

    def __init__(self, args):
        extension = found(args.worker_extension_cls)
        assert not [one for one in dir(extension) if not one.startswith("__") and hasattr(Worker, one)]
        self.worker = type("Extended", (Worker, extension), {})(args.model)
        self.args, self.paused, self.asleep = args, False, False
        if args.distributed_executor_backend:
            executor = (
                UniProcExecutor if os.environ.get("FAKE_VLLM") == "open" else found(args.distributed_executor_backend)
            )
            assert issubclass(executor, UniProcExecutor)
            method, rank, _ = executor()._distributed_args()
            import torch.distributed as dist

            dist.init_process_group("gloo", init_method=method, rank=rank, world_size=1)
        self.output_processor, self.cache = OutputProcessor(), PrefixCache()
        self.began, self.preempted, self._count = time.monotonic(), 0, 0

    async def generate(self, prompt, sampling_params, request_id):
        if len(prompt["prompt_token_ids"]) >= self.args.max_model_len:
            raise VLLMValidationError("the prompt is longer than the maximum model length")
        assert sampling_params.logprobs == 0 and sampling_params.flat_logprobs and sampling_params.ignore_eos
        self._count += 1
        states, name = self.output_processor.request_states, f"{request_id}-{self._count:08x}"
        state = states[name] = RequestState(request_id, prompt, sampling_params)
        try:
            while state.reason is None:
                await asyncio.sleep(TICK_S)
                if not self.paused and state.reason is None:
                    self._step(state)
        finally:
            states.pop(name, None)
        yield self._output(state)

    def _step(self, state):
        assert not self.asleep
        if not state.holds_slot:
            running = sum(other.holds_slot for other in self.output_processor.request_states.values())
            if self.args.max_num_seqs is not None and running >= self.args.max_num_seqs:
                return  # in the queue
            state.holds_slot = True
            self._prefill(state)
        state.last = time.monotonic()
        state.first = state.first or state.last
        state.is_prefilling = False
        state.tokens.append(5)
        state.logprobs.append(STALE if state.stale else -0.5)
        if 5 in (state.sampling.stop_token_ids or ()):
            state.reason = "stop"
        elif len(state.tokens) >= state.sampling.max_tokens:
            state.reason = "length"

    def _prefill(self, state):
        if self.args.enable_prefix_caching:
            weights = self.worker.weights()
            salt = None if os.environ.get("FAKE_VLLM") == "unsalted" else state.prompt.get("cache_salt")
            tokens = [*state.prompt["prompt_token_ids"], *state.tokens]
            state.num_cached_tokens, sources = self.cache.compute(tokens, salt, weights)
            state.stale = any(source != weights for source in sources)

    def _output(self, state):
        count = len(state.tokens)
        flat = SimpleNamespace(
            start_indices=list(range(count)), end_indices=list(range(1, count + 1)), token_ids=list(state.tokens),
            logprobs=list(state.logprobs),
        )  # fmt: skip
        output = SimpleNamespace(token_ids=state.tokens, logprobs=flat, finish_reason=state.reason)
        times = SimpleNamespace(first_token_ts=state.first, last_token_ts=state.last)
        return SimpleNamespace(
            outputs=[output], metrics=times, num_cached_tokens=state.num_cached_tokens, finished=True
        )

    async def abort(self, request_id):
        asked = {request_id} if isinstance(request_id, str) else set(request_id)
        for state in self.output_processor.request_states.values():
            if state.external_req_id in asked:
                state.reason, state.holds_slot = "abort", False

    async def pause_generation(self, *, mode="abort", clear_cache=True):
        assert mode == "keep" and not clear_cache
        self.paused = True

    async def resume_generation(self):
        self.paused = False

    async def reset_prefix_cache(self, reset_running_requests=False):
        """False, and nothing is dropped, while a request holds blocks."""
        holding = [state for state in self.output_processor.request_states.values() if state.holds_slot]
        assert self.paused or not reset_running_requests
        if holding and not reset_running_requests:
            return False
        for state in holding:
            state.holds_slot, self.preempted = False, self.preempted + 1
        self.cache.clear()
        return True

    async def sleep(self, level=1):
        assert self.args.enable_sleep_mode and level == 1 and not self.output_processor.request_states
        self.asleep = self.paused = True
        self.cache.clear()

    async def wake_up(self):
        self.asleep = self.paused = False

    async def collective_rpc(self, method):
        assert not self.asleep
        return [await asyncio.to_thread(getattr(self.worker, method))]

    async def check_health(self):
        if os.environ.get("FAKE_VLLM") == "late" and time.monotonic() > self.began + 1.0:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")

    def shutdown(self):
        pass
