"""Tools: typed functions that a model calls in its own format, run in processes that can be killed."""
