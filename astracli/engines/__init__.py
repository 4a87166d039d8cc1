"""Rollout engines: one HTTP client, and the embedded engine that answers it on transformers."""
