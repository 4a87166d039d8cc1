"""Stands in for SGLang's file of that name: the environment variable that `engines.sglang.command` sets."""

SGLANG_DISTRIBUTED_INIT_METHOD_OVERRIDE = None
