"""Measures this package against its peers, side by side: `python -m benchmarks`."""
