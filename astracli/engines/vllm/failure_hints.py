"""Known causes of a vLLM server's end, as they stand in its last lines, each with what to do.

Sources: the text of its errors in releases 0.20.2 and 0.33.0, and torch's.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from astracli.engines import contract
from astracli.engines.contract import FailureHint
from astracli.errors import RunFailed

_RAISED = r"(?m)^(?:\([^)\n]*\) ?)?(?:(?:ERROR|CRITICAL) [^\]\n]*\] ?)?[\w.]*(?:Error|Exception): [^\n]*?"


def _known(pattern: str, cause: str, hint: str) -> FailureHint:
    return FailureHint(re.compile(pattern), cause, hint)


KNOWN = (
    _known(
        r"Free memory on device [^\n]* is less than desired GPU memory utilization",
        "its GPU has less free memory than it was to take",
        "end what else uses the GPU, or lower rollout.vllm.gpu_memory_utilization",
    ),
    _known(
        r"No available memory for the cache blocks|KV cache is needed, which is larger than the available KV cache",
        "no memory was left for its KV cache",
        "raise rollout.vllm.gpu_memory_utilization, or lower rollout.context_length or rollout.max_running_requests",
    ),
    _known(
        r"CUDA out of memory|OutOfMemoryError|CUDA error: out of memory",
        "the GPU ran out of memory",
        "lower rollout.vllm.gpu_memory_utilization, rollout.vllm.max_num_batched_tokens or "
        "rollout.max_running_requests; `astra train --dry-run` shows what each needs",
    ),
    _known(
        r"Model architectures? .* (?:are|is) not supported",
        "this release of vLLM does not hold the model's architecture",
        'install a release that does (Qwen3.5\'s text model: 0.33), or take `rollout.engine = "sglang"`',
    ),
    _known(
        r"User-specified max_model_len \((\d+)\) is greater than the derived max_model_len",
        r"rollout.context_length = \1 is more than the model's",
        "`--set rollout.context_length=N` with no more than the model has",
    ),
    _known(
        _RAISED + r"No module named '([\w.]+)'",
        r"its environment lacks the module \1",
        "install it where resources.engine.python points",
    ),
    _known(
        r"no kernel image is available",
        "a kernel was built for other GPUs",
        "install the packages of the engine's environment for this GPU's compute capability",
    ),
    _known(
        r"((?:[\w./+-]+\.so[\w.]*): (?:undefined symbol|cannot open shared object file)[^\n]*)",
        r"a compiled package of its environment does not load: \1",
        "install `vllm` with its own pins in an environment of its own and name it in resources.engine.python",
    ),
    _known(
        r"driver on your system is too old|CUDA driver version is insufficient",
        "the GPU's driver is older than the CUDA that its torch was built for",
        "update the driver, or install a torch for an older CUDA; `astra doctor` shows both",
    ),
    _known(r"[Aa]ddress already in use|Errno 98", "its port was taken", "start again: ports are chosen anew"),
    _known(
        r"CUDA error: ([^\n]+)",
        r"the GPU reported an error: \1",
        "`--set rollout.vllm.attention_backend=triton_attn` takes the plainest kernels; when the same GPU fails again, "
        "look for `Xid` in `dmesg`",
    ),
)
"""In order: the first that is found explains the end."""


def death(name: str, what: str, lines: Iterable[str]) -> RunFailed:
    """The error to raise for an engine that `what` (ended with exit code 1, was not ready within 600 s)."""
    cause, hint = contract.explain(KNOWN, lines)
    return RunFailed(f"{name} {what}" + (f": {cause}" if cause else ""), hint or "its last lines are in its log")
