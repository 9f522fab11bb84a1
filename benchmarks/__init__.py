"""Benchmarks: every figure of the documentation can be made again by one of these."""
