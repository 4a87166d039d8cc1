"""vLLM's executor for one rank, which meets itself by a file.

By itself vLLM opens a TCP store of torch's for its one rank, and that listens on every interface without a token,
whatever `VLLM_HOST_IP` says. (0.20.2 and 0.33.0: `_distributed_args` in `v1/executor/uniproc_executor.py`.)
"""

from __future__ import annotations

import os

from vllm.v1.executor.uniproc_executor import UniProcExecutor

from astracli.engines.vllm.names import STORE


class FileExecutor(UniProcExecutor):
    """`distributed_executor_backend` of the engine."""

    def _distributed_args(self) -> tuple[str, int, int]:
        """(where ranks meet, rank, local rank)"""
        _, rank, local_rank = super()._distributed_args()
        return os.environ[STORE], rank, local_rank
