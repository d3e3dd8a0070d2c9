"""Speculative decoding in this process, for evaluation without a server."""
