"""Benchmarks: ratios of two things timed in one run. `make bench` runs them all; no test asserts a wall time."""
