"""The benchmarks, for asv; frameworks are imported where a benchmark runs and nowhere before."""

import sys
from pathlib import Path

# asv finds this package, but not its neighbours.
sys.path.append(str(Path(__file__).parents[1]))
