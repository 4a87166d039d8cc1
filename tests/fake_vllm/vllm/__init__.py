from vllm.sampling_params import SamplingParams

__all__ = ["LLM", "SamplingParams"]


def __getattr__(name):
    if name == "LLM":
        from vllm.llm import LLM

        return LLM
    raise AttributeError(name)
