"""Environments: how a problem becomes an episode, and an episode a score."""
