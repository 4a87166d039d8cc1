"""Rollout engines: one HTTP client, the embedded engine that answers it on transformers, and SGLang."""
