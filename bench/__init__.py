"""Benchmarks: blockdiff beside its peers on one machine. `make bench` runs them; no test depends on them."""
