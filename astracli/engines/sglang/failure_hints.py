"""Known causes of an engine's end, as they stand in its last lines, each with what to do.

SGLang prints much while it is well: optional modules that it could not import, libraries that a package did without,
requests that it took back for a while. Only what ends a process counts: the line of an exception, or a line that no
process outlives. A line that merely slows it down explains the end when there is nothing else.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from astracli.engines import contract
from astracli.engines.contract import FailureHint
from astracli.errors import RunFailed

_RAISED = r"(?m)^(?:\[[^\]\n]*\] ?|- )?[\w.]*(?:Error|Exception): [^\n]*?"
"""The line of an exception, up to what it says; SGLang lists the causes of a failed import with a dash."""


def _known(pattern: str, cause: str, hint: str) -> FailureHint:
    return FailureHint(re.compile(pattern), cause, hint)


KNOWN = (
    _known(
        r"flash_fwd_launch_template|CUDA error: invalid argument",
        "its attention kernel failed to launch on this GPU",
        "FlashAttention-3 with a Gated DeltaNet hybrid dies so on compute capability 8.9: "
        "`--set rollout.sglang.attention_backend=flashinfer`, or triton",
    ),
    _known(
        r"CUDA out of memory|OutOfMemoryError|Not enough memory|CUDA error: out of memory",
        "the GPU ran out of memory",
        "lower rollout.max_running_requests (each keeps its state beside the KV cache), "
        "rollout.sglang.chunked_prefill_size or rollout.sglang.mem_fraction_static; "
        "`astra train --dry-run` shows what each needs",
    ),
    _known(
        r"(?i)nccl[^\n]{0,200}?\btimed out\b|collective operation timeout",
        "a collective between GPUs timed out",
        "try `NCCL_P2P_DISABLE=1` in resources.engine.env; `astra doctor` measures an all-reduce",
    ),
    _known(
        _RAISED + r"(?:[Cc]an ?not import FA3|No module named 'flash_attn_interface')",
        "FlashAttention-3 is not in its environment",
        "`--set rollout.sglang.attention_backend=auto` takes what is there",
    ),
    _known(
        r"no kernel image is available",
        "a kernel was built for other GPUs",
        "install the packages of the engine's environment for this GPU's compute capability",
    ),
    _known(
        _RAISED + r"No module named '([\w.]+)'",
        r"its environment lacks the module \1",
        "install it where resources.engine.python points, or add its folder to PYTHONPATH in resources.engine.env",
    ),
    _known(
        r"Model architectures? .* (?:are|is) not supported",
        "this build of SGLang does not hold the model's architecture",
        "install a release that does; `astra doctor` names the ones that were tried",
    ),
    _known(
        r"User-specified context_length \((\d+)\) is greater than the derived context_length \((\d+)\)",
        r"rollout.context_length = \1 is more than the model's \2",
        "`--set rollout.context_length=N` with no more than the model has",
    ),
    _known(
        r"probability tensor contains either `inf`, `nan`|Detected errors during sampling! NaN",
        "the model produced NaN",
        "the weights that it was given are damaged, or its kernels fail on this GPU",
    ),
    _known(
        r"[Aa]ddress already in use|Errno 98",
        "its port was taken",
        "start again: ports are chosen anew",
    ),
    _known(
        r"(?<![Ss]oft )[Ww]atchdog timeout",
        "its scheduler hung",
        "look for the stacks in its log; `--set rollout.sglang.attention_backend=triton` avoids most kernel hangs",
    ),
    _known(
        _RAISED + r"((?:[\w./+-]+\.so[\w.]*): (?:undefined symbol|cannot open shared object file)[^\n]*)",
        r"a compiled package of its environment does not load: \1",
        "it was built for another torch or CUDA: install `sglang` with its own pins in an environment of its own and "
        "name it in resources.engine.python; `astra doctor RECIPE` lists the pins that are not met",
    ),
    _known(
        _RAISED + r"(?i:could not find nvcc|CUDA_HOME environment variable is not set|ninja is required)"
        r"|(?s:nvcc: (?:command )?not found.*ninja: build stopped)",
        "a kernel is compiled at first use, and there is no compiler for it",
        "install ninja and the CUDA toolkit's nvcc, or take kernels that need neither: "
        "`--set rollout.sglang.attention_backend=triton`",
    ),
    _known(
        _RAISED + r"(?:CUDA driver version is insufficient|driver on your system is too old)",
        "the GPU's driver is older than the CUDA that its torch was built for",
        "update the driver, or install a torch for an older CUDA; `astra doctor` shows both",
    ),
    _known(
        r"CUDA error: ([^\n]+)",
        r"the GPU reported an error: \1",
        "`astra doctor RECIPE` tries its kernels one by one; `--set rollout.sglang.attention_backend=triton` takes the "
        "plainest; when the same GPU fails again, look for `Xid` in `dmesg`",
    ),
)
"""In order: the first that is found explains the death. Sources: SGLang's issue tracker and our own runs."""

SLOW = (
    _known(
        r"KV cache pool (?:is )?full|[Rr]etract(?:ed)? (?:some )?requests?",
        "the KV cache was full and running requests were taken back",
        "lower rollout.max_running_requests or rollout.max_new_tokens, or raise rollout.sglang.mem_fraction_static",
    ),
)
"""An engine lives on with these: one of them explains an end that nothing else explains."""


def explain(lines: Iterable[str]) -> tuple[str | None, str | None]:
    """(cause, hint) of an engine's end, from its last lines; (None, None) when nothing in them says why."""
    lines = [line for line in lines if "ServerArgs(" not in line]  # it names every option: nccl_port, dist_timeout, ...
    found = contract.explain(KNOWN, lines)
    return found if found[0] else contract.explain(SLOW, lines)


def death(name: str, what: str, lines: Iterable[str]) -> RunFailed:
    """The error to raise for an engine that `what` (ended with exit code 1, was not ready within 600 s)."""
    cause, hint = explain(lines)
    return RunFailed(f"{name} {what}" + (f": {cause}" if cause else ""), hint or "its last lines are in its log")
