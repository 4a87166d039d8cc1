from dataclasses import dataclass


@dataclass(kw_only=True)
class AsyncEngineArgs:
    """The fields of vLLM's that we set; all of them are in 0.20.2 and in 0.33.0. Defaults that it takes from its
    configurations are not repeated."""

    model: str
    tokenizer: str | None = None
    skip_tokenizer_init: bool = False
    load_format: str = "auto"
    dtype: str = "auto"
    seed: int = 0
    max_model_len: int | None = None
    max_num_seqs: int | None = None
    max_num_batched_tokens: int | None = None
    gpu_memory_utilization: float = 0.9
    enable_prefix_caching: bool | None = None
    enable_sleep_mode: bool = False
    enforce_eager: bool = False
    logprobs_mode: str = "raw_logprobs"
    generation_config: str = "auto"
    worker_extension_cls: str = ""
    distributed_executor_backend: str | None = None
    enable_log_requests: bool = False
    disable_log_stats: bool = False
    attention_backend: str | None = None
