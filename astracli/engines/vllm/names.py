"""Where vLLM finds what we put into its processes. Apart from it: those modules import torch or vLLM."""

WORKER = "astracli.engines.vllm.worker.AstraWorker"
"""The extension of its worker."""
EXECUTOR = "astracli.engines.vllm.executor.FileExecutor"
STORE = "ASTRA_RANK_STORE"
"""Environment of the server: the file by which its ranks meet, as a URL."""
