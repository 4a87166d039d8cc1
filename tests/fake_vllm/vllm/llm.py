"""Stands in for vLLM's offline engine: slots that draw a token each every few milliseconds."""

import time
from types import SimpleNamespace

from vllm.v1.engine.async_llm import TICK_S


class LLM:
    def __init__(self, model, **fields):
        self.slots = fields["max_num_seqs"]

    def generate(self, prompts, sampling_params=None, *, use_tqdm=True):
        assert len(prompts) == len(sampling_params)
        waiting, running = [each.max_tokens for each in reversed(sampling_params)], []
        while waiting or running:
            while waiting and len(running) < self.slots:
                running.append(waiting.pop())
            time.sleep(TICK_S)
            running = [left - 1 for left in running if left > 1]
        return [SimpleNamespace(outputs=[SimpleNamespace(token_ids=[5] * each.max_tokens)]) for each in sampling_params]
