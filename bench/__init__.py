"""Benchmarks: pared against the strongest baselines at hand, in one run, on this machine."""
