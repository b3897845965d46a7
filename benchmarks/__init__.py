"""Benchmarks: fastgrpo and its peers on the same tensors, against the same fp64 oracle."""
