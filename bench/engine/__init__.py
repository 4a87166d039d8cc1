"""The engine and the rollout worker that feeds it."""
