"""Where vLLM finds the extension of its worker. Apart from it: its module imports torch."""

QUALNAME = "astracli.engines.vllm.worker.AstraWorker"
