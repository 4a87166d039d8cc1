"""The option names that our command line looks for in an installed SGLang's source."""

NAMES = (
    *("custom_weight_loader", "cuda_graph_bs_decode", "disable_prefill_cuda_graph", "mamba_ssm_dtype"),
    *("prefill_delayer_queue_min_ratio", "mamba_radix_cache_strategy"),
)
