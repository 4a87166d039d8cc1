"""Ways to have agents on other hosts: each is an entry point in the group `astra.clusters` (contract.py)."""
