"""The trainer's side of a version: find what changed, write it, declare it stable."""
