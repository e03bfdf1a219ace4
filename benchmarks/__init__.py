"""Benchmarks, not in the wheel: run them from a checkout as `python -m benchmarks.NAME`."""
