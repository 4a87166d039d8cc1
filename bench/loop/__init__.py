"""Whole runs: from import to export, killed and resumed, at full size."""
