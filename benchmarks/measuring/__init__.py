"""What the benchmarks share, apart from them because asv imports every module of the suite to look for benchmarks."""

import sys
from pathlib import Path

# The drivers of other implementations are in no package that is installed.
sys.path.append(str(Path(__file__).parents[2] / "conformance"))
