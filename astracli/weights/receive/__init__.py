"""The engine's side of a version: fetch, check, decode, apply, prove."""
