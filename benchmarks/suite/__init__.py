"""The benchmarks, for asv; frameworks are imported where a benchmark runs, or once before all that need the same."""

import importlib
import os
import sys
from pathlib import Path

# asv finds this package, but not its neighbours.
sys.path.append(str(Path(__file__).parents[1]))

from measuring import PRELOAD

# In the process that asv forks for each benchmark: an import takes longer than most of them.
if "run_server" in sys.argv:
    for _module in os.environ.get(PRELOAD, "").split():
        importlib.import_module(_module)
