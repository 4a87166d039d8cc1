"""What ended an engine, and what it only said meanwhile."""

from __future__ import annotations

from pathlib import Path

import pytest

from astracli.engines.sglang import failure_hints

DIED = Path(__file__).parent / "fixtures" / "sglang_died.log"
"""A real SGLang: how it started, and how it ended because its cache could not be flushed."""


@pytest.mark.parametrize(
    ("line", "cause"),
    [
        ('  File "flash_fwd_launch_template.h", line 180: CUDA error', "attention kernel failed"),
        ("RuntimeError: CUDA error: invalid argument", "attention kernel failed"),
        ("KV cache pool full, retract 3 requests", "KV cache was full"),
        ("Scheduler watchdog timeout (self.watchdog_timeout=300)", "scheduler hung"),
        ("- ImportError: libnvrtc.so.12: cannot open shared object file: No such file", "libnvrtc.so.12: cannot open"),
        ("ImportError: /site/x.abi3.so: undefined symbol: _ZN3c10", "does not load: /site/x.abi3.so: undefined symbol"),
        ("OSError: CUDA_HOME environment variable is not set. Please set it", "no compiler for it"),
        ("/bin/sh: 1: /usr/local/cuda/bin/nvcc: not found\nninja: build stopped: subcommand failed.", "no compiler"),
        ("torch.OutOfMemoryError: CUDA out of memory.", "ran out of memory"),
        ("[Rank 0] NCCL watchdog: collective operation timeout: WorkNCCL", "collective between GPUs timed out"),
        ("RuntimeError: NCCL communicator was aborted: it timed out", "collective between GPUs timed out"),
        ("ImportError: Can not import FA3 in sgl_kernel. Please check", "FlashAttention-3 is not in its environment"),
        ("ModuleNotFoundError: No module named 'orjson'", "lacks the module orjson"),
        ("RuntimeError: CUDA error: no kernel image is available for execution", "built for other GPUs"),
        ("RuntimeError: Could not find nvcc and default cuda_home='/usr/local/cuda'", "no compiler for it"),
        ("RuntimeError: The NVIDIA driver on your system is too old (found version 12020).", "driver is older"),
        ("ImportError: libcudart.so.13: cannot open shared object file: No such file", "libcudart.so.13: cannot open"),
        ("User-specified context_length (8192) is greater than the derived context_length (512).",
         "rollout.context_length = 8192 is more than the model's 512"),
        ("ValueError: something nobody has seen", "ValueError: something nobody has seen"),
    ],
)  # fmt: skip
def test_what_the_last_lines_mean(line: str, cause: str) -> None:
    error = failure_hints.death("engine0", "ended with exit code 1", ["all is well", line, "Killed"])
    assert cause in error.message and error.hint
    assert failure_hints.explain(["all is well"]) == (None, None)


@pytest.mark.parametrize(
    ("line", "hint"),
    [
        ('File "flash_fwd_launch_template.h", line 180', "rollout.sglang.attention_backend=flashinfer"),
        ("RuntimeError: CUDA error: invalid argument", "rollout.sglang.attention_backend=flashinfer"),
        ("KV cache pool full, retract 3 requests", "rollout.max_new_tokens"),
        ("torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2 GiB", "rollout.sglang.chunked_prefill_size"),
        ("[Rank 0] Watchdog caught collective operation timeout: WorkNCCL", "NCCL_P2P_DISABLE=1"),
    ],
)
def test_known_failures_have_a_hint_of_their_own(line: str, hint: str) -> None:
    assert hint in str(failure_hints.death("engine0", "ended with exit code 1", [line]).hint)
    nothing = failure_hints.death("engine0", "ended with exit code 1", ["Killed"])
    assert hint not in str(nothing.hint) and "log" in str(nothing.hint)


def test_the_list_of_options_explains_nothing() -> None:
    """SGLang prints all of them first: `nccl_port`, `watchdog_timeout`, `dist_timeout`, ..."""
    options = "[2026-11-23 11:40:02] server_args=ServerArgs(nccl_port=None, dist_timeout=None, watchdog-timeout=300)"
    assert failure_hints.explain([options, "Killed"]) == (None, None)
    assert failure_hints.explain(["NCCL nets: 2; watchdog_timeout=300"]) == (None, None)


HARMLESS = [
    "[2026-11-23 12:17:04] Ignore import error when loading sglang.srt.models.inkling: No module named 'helion'",
    "[2026-11-23 12:17:04] Ignore import error when loading sglang.srt.x: No module named 'flash_attn_interface'",
    "/site/torchvision/io/image.py:14: UserWarning: Failed to load image Python extension: 'libjpeg.so.8: cannot open "
    "shared object file: No such file or directory'If you don't plan on using image functionality, ignore this",
    "No CUDA runtime is found, using CUDA_HOME='/usr/local/cuda'",
    "/site/tvm_ffi/cpp/extension.py:12: UserWarning: CUDA_HOME environment variable is not set; no kernel is compiled",
    "/bin/sh: 1: nvcc: not found",
    "[2026-11-23 12:20:04] Soft watchdog timeout (self.watchdog_timeout=120)",
    "[rank0]:[W1123 12:17:48 ProcessGroupNCCL.cpp:1575] Warning: destroy_process_group() was not called before exit; "
    "timeout 600000 ms",
    "/site/torch/cuda/__init__.py:61: UserWarning: The NVIDIA driver on your system is too old (found version 12020).",
]


@pytest.mark.parametrize("line", HARMLESS)
def test_what_an_engine_lives_on_with_explains_nothing(line: str) -> None:
    assert failure_hints.explain([line, "Killed"]) == (None, None)
    assert failure_hints.explain([line, "ValueError: the end"])[0] == "ValueError: the end"


def test_a_real_death_among_real_chatter() -> None:
    lines = DIED.read_text().splitlines()
    assert any("No module named 'helion'" in line for line in lines)
    assert failure_hints.explain(lines) == ("AssertionError: Cache flush failed after updating weights", None)
    end = next(i for i, line in enumerate(lines) if "Traceback" in line)
    assert failure_hints.explain(lines[:end]) == (None, None)


def test_requests_taken_back_explain_only_what_nothing_else_does() -> None:
    taken = "[2026-11-23 12:17:04] KV cache pool is full. Retract requests. #retracted_reqs: 1"
    assert failure_hints.explain([taken, "Killed"])[0] == "the KV cache was full and running requests were taken back"
    assert failure_hints.explain([taken, "ValueError: the end"])[0] == "ValueError: the end"
    assert (
        failure_hints.explain([taken, "ModuleNotFoundError: No module named 'x'"])[0]
        == "its environment lacks the module x"
    )
