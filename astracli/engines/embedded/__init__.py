"""The embedded engine: SGLang's HTTP subset on transformers, for a CPU."""
