"""Stands in for SGLang; the server is in `launch_server.py`, and this is its offline engine."""

import time

TICK_S = 0.003


class Engine:
    """Slots that draw a token each every few milliseconds."""

    def __init__(self, *, model_path, max_running_requests, **fields):
        assert "host" not in fields and "custom_weight_loader" not in fields
        self.slots = max_running_requests

    def generate(self, prompt=None, sampling_params=None, input_ids=None, *, return_logprob=False):
        assert len(input_ids) == len(sampling_params) and return_logprob
        lengths = [each["max_new_tokens"] for each in sampling_params]
        waiting, running = lengths[::-1], []
        while waiting or running:
            while waiting and len(running) < self.slots:
                running.append(waiting.pop())
            time.sleep(TICK_S)
            running = [left - 1 for left in running if left > 1]
        return [{"output_ids": [5] * length} for length in lengths]
