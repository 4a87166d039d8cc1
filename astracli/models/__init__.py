"""Model families: the adapter contract, its registry, and checks of an adapter."""
