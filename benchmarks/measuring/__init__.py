"""What the benchmarks share, apart from them because asv imports every module of the suite to look for benchmarks."""
