"""Run directories: what lies in one, finding one, metrics and where they go."""
