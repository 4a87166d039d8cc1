"""The engine's own offline benchmark, for `offline.py`; its interpreter runs `python offline_child.py FILE`.

FILE holds the engine's name and arguments, and for each request its prompt and its tokens. It prints one line of JSON:
tokens generated and the seconds of the one call that asks for all of them; kernels and graphs are warm by then. It
imports nothing of astra.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

Request = tuple[list[int], int]
WARM = [([3, 4, 5, 6], 8)] * 8


def vllm(arguments: dict[str, Any]) -> Callable[[list[Request]], int]:
    from vllm import LLM, SamplingParams
    from vllm.inputs import tokens_input

    llm = LLM(**arguments)

    def generate(asked: list[Request]) -> int:
        sampling = [
            SamplingParams(max_tokens=tokens, ignore_eos=True, detokenize=False, logprobs=0, flat_logprobs=True)
            for _, tokens in asked
        ]
        outputs = llm.generate([tokens_input(prompt) for prompt, _ in asked], sampling, use_tqdm=False)
        return sum(len(output.outputs[0].token_ids) for output in outputs)

    return generate


def sglang(arguments: dict[str, Any]) -> Callable[[list[Request]], int]:
    from sglang import Engine

    engine = Engine(**arguments)

    def generate(asked: list[Request]) -> int:
        sampling = [{"max_new_tokens": tokens, "ignore_eos": True, "temperature": 1.0} for _, tokens in asked]
        prompts = [prompt for prompt, _ in asked]
        answers = engine.generate(input_ids=prompts, sampling_params=sampling, return_logprob=True)
        return sum(len(answer["output_ids"]) for answer in answers)

    return generate


def main() -> None:
    told = json.loads(Path(sys.argv[1]).read_text())
    asked = [(prompt, tokens) for prompt, tokens in told["requests"]]
    generate = {"vllm": vllm, "sglang": sglang}[told["engine"]](told["arguments"])
    generate(WARM)
    began = time.monotonic()
    tokens = generate(asked)
    print(json.dumps({"tokens": tokens, "seconds": time.monotonic() - began}), flush=True)


if __name__ == "__main__":  # both engines start processes that import this file again
    main()
