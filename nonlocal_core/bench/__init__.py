"""The command `nonlocal bench`: what the benchmarks measured, as tables and a picture; needs the extra "bench"."""
