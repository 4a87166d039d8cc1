"""Model families: the adapter contract and its registry."""
