from enum import Enum
from types import SimpleNamespace


class RequestOutputKind(Enum):
    FINAL_ONLY = 2


class SamplingParams(SimpleNamespace):
    """Of vLLM's: the fields, and that stop strings need a detokenizer."""

    def __init__(self, **fields):
        assert fields["output_kind"] is RequestOutputKind.FINAL_ONLY and fields["logprobs"] == 0
        assert fields["ignore_eos"] and (fields["detokenize"] or not fields["stop"])
        super().__init__(**fields)
