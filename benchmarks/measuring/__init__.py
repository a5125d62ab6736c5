"""What the benchmarks share, apart from them because asv imports every module of the suite to look for benchmarks."""

import sys
from pathlib import Path

__all__ = ["PRELOAD"]

PRELOAD = "NONLOCAL_BENCH_PRELOAD"
"""The environment variable that names modules to import before processes are forked."""

# The drivers of other implementations are in no package that is installed.
sys.path.append(str(Path(__file__).parents[2] / "conformance"))
