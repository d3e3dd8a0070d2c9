"""GPU kernels: one file each, the reference first; see `cases.py` for what tests and benchmarks share."""
