from types import SimpleNamespace

KNOWN = {
    *("model", "tokenizer", "skip_tokenizer_init", "load_format", "dtype", "seed", "max_model_len", "max_num_seqs"),
    *("max_num_batched_tokens", "gpu_memory_utilization", "enable_prefix_caching", "enable_sleep_mode"),
    *("enforce_eager", "logprobs_mode", "generation_config", "worker_extension_cls", "enable_log_requests"),
    *("disable_log_stats", "attention_backend", "distributed_executor_backend"),
}
"""Fields of vLLM's that we set; all of them are in 0.20.2 and in 0.33.0."""


class AsyncEngineArgs(SimpleNamespace):
    def __init__(self, **fields):
        assert fields.keys() <= KNOWN, fields.keys() - KNOWN
        super().__init__(**fields)
