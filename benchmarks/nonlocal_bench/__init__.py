"""The command `nonlocal bench`: what the benchmarks measured, as tables and a picture."""
