"""Rollout engines: the contract, the registry and the HTTP client; each built-in engine has a folder of its own."""
