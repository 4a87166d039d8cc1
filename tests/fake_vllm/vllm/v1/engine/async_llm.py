"""Stands in for vLLM's AsyncLLM: a request draws token 5 every few milliseconds, with log-probability -0.5. The worker
holds a model with fused parameters, into which the extension is mixed as vLLM does; its one rank joins a process group
as the executor says. FAKE_VLLM=oom: dies at its start; `late`: its engine is dead a moment after it was ready; `open`:
its rank meets itself where vLLM would have it meet."""

import asyncio
import os
import sys
import time
from importlib import import_module
from types import SimpleNamespace

import torch.distributed as dist
from staged_tools import FusedModel

from vllm.v1.executor.uniproc_executor import UniProcExecutor

TICK_S = 0.003


def found(name):
    module, _, attribute = name.rpartition(".")
    return getattr(import_module(module), attribute)


class Worker:
    def __init__(self):
        self.model = FusedModel()

    def get_model(self):
        return self.model


class AsyncLLM:
    @classmethod
    def from_engine_args(cls, args):
        if os.environ.get("FAKE_VLLM") == "oom":
            sys.exit("torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 7.83 GiB")
        return cls(args)

    def __init__(self, args):
        extension = found(args.worker_extension_cls)
        assert not [one for one in dir(extension) if not one.startswith("__") and hasattr(Worker, one)]
        self.worker = type("Extended", (Worker, extension), {})()
        self.args, self.paused, self.asleep = args, False, False
        if backend := getattr(args, "distributed_executor_backend", None):
            executor = UniProcExecutor if os.environ.get("FAKE_VLLM") == "open" else found(backend)
            assert issubclass(executor, UniProcExecutor)
            method, rank, _ = executor()._distributed_args()
            dist.init_process_group("gloo", init_method=method, rank=rank, world_size=1)
        self.running, self.began, self.preempted = {}, time.monotonic(), 0

    async def generate(self, prompt, sampling, request_id):
        assert request_id not in self.running
        assert ("cache_salt" in prompt) == self.args.enable_prefix_caching
        if len(prompt["prompt_token_ids"]) >= self.args.max_model_len:
            raise ValueError("the prompt is longer than the maximum model length")
        state = self.running[request_id] = SimpleNamespace(tokens=[], reason=None, first=0.0, last=0.0)
        try:
            while state.reason is None:
                await asyncio.sleep(TICK_S)
                if self.paused or state.reason is not None:
                    continue
                assert not self.asleep
                state.tokens.append(5)
                state.last = time.monotonic()
                state.first = state.first or state.last
                if 5 in sampling.stop_token_ids:
                    state.reason = "stop"
                elif len(state.tokens) >= sampling.max_tokens:
                    state.reason = "length"
        finally:
            self.running.pop(request_id, None)
        logprobs = [{5: SimpleNamespace(logprob=-0.5)} for _ in state.tokens]
        output = SimpleNamespace(token_ids=state.tokens, logprobs=logprobs, finish_reason=state.reason)
        times = SimpleNamespace(first_token_ts=state.first, last_token_ts=state.last)
        yield SimpleNamespace(outputs=[output], metrics=times)

    async def abort(self, request_ids):
        for name in request_ids:
            if name in self.running:
                self.running[name].reason = "abort"

    async def pause_generation(self, *, mode, clear_cache):
        assert mode == "keep" and not clear_cache
        self.paused = True

    async def resume_generation(self):
        self.paused = False

    async def reset_prefix_cache(self, reset_running_requests=False):
        assert self.paused or not reset_running_requests
        self.preempted += len(self.running) if reset_running_requests else 0
        return True

    async def sleep(self, level):
        assert self.args.enable_sleep_mode and level == 1 and not self.running
        self.asleep = self.paused = True

    async def wake_up(self):
        self.asleep = self.paused = False

    async def collective_rpc(self, method):
        assert not self.asleep
        return [await asyncio.to_thread(getattr(self.worker, method))]

    async def check_health(self):
        if os.environ.get("FAKE_VLLM") == "late" and time.monotonic() > self.began + 1.5:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")

    def shutdown(self):
        pass
