"""Which kernels and which engine, by compute capability, model family and what is installed; each with its reason."""
