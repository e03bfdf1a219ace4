"""All measuring: outside the wheel, run from a checkout as `python -m benchmarks.NAME`."""
